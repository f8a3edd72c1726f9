"""Inverse-CDF sampling follows the weights, in any vocabulary, and never takes what has no weight."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raftune.policies.causal_lm.sampling.token_choice import SamplingParams, TokenSampler, inverse_cdf, uniforms


def by_hand(weights: np.ndarray, noise: np.ndarray) -> np.ndarray:
    sums = weights.astype(np.float64).cumsum(1)
    return np.array([np.searchsorted(row, u * row[-1], side="right") for row, u in zip(sums, noise, strict=True)])


@pytest.mark.parametrize("vocabulary", [1, 5, 63, 64, 65, 300, 2048])
def test_a_token_is_where_the_cumulative_weight_passes_the_noise(vocabulary: int) -> None:
    rng = np.random.default_rng(vocabulary)
    weights = rng.random((500, vocabulary), dtype=np.float32) ** 4
    noise = rng.random(500)
    found = inverse_cdf(torch.from_numpy(weights), torch.from_numpy(noise)).numpy()
    expected = by_hand(weights, noise)
    # Block sums are rounded to float32, so noise within 1e-6 of an edge may fall on either side: rarely one of 500.
    assert (found != expected).sum() <= 1
    assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("noise", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("only", [0, 63, 64, 130, 199])
def test_a_token_without_weight_is_never_taken(noise: float, only: int) -> None:
    weights = torch.zeros(1, 200)
    weights[0, only] = 1e-30
    assert inverse_cdf(weights, torch.tensor([noise], dtype=torch.float64)).tolist() == [only]


def test_tokens_without_weight_are_not_taken_among_many_with() -> None:
    rng = np.random.default_rng(0)
    weights = torch.from_numpy(rng.random((2000, 1000), dtype=np.float32))
    weights[:, rng.permutation(1000)[:900]] = 0
    noise = np.concatenate([rng.random(1998), [0.0, 1 - 2**-53]])
    found = inverse_cdf(weights, torch.from_numpy(noise))
    assert (weights.gather(1, found[:, None]) > 0).all()


def test_a_large_vocabulary_keeps_its_unlikely_tokens() -> None:
    """Half of the mass lies on one token, half on 150,000 tokens of 3e-6 each: their sums need double precision."""
    vocabulary, draws = 150_001, 400
    weights = torch.ones(1, vocabulary)
    weights[0, 0] = vocabulary - 1
    noise = torch.linspace(0.5, 1, draws + 2, dtype=torch.float64)[1:-1]
    found = inverse_cdf(torch.softmax(weights.log(), -1).expand(draws, -1), noise).numpy()
    expected = 1 + (noise.numpy() - 0.5) * 2 * (vocabulary - 1)
    assert np.abs(found - expected).max() < 3  # tokens, of 150,000


def test_log_probabilities_are_those_of_the_raw_logits_whatever_the_warping() -> None:
    torch.manual_seed(0)
    logits = torch.randn(50, 70) * 3
    seen = torch.randint(0, 70, (50, 4))
    noise = uniforms(np.arange(50), 0)
    for settings in (
        SamplingParams(),
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=0),
        SamplingParams(temperature=2.0, top_k=9, top_p=0.8, min_p=0.01, repetition_penalty=1.3),
    ):
        tokens, logprobs = TokenSampler(settings)(logits, torch.from_numpy(noise), seen)
        expected = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        assert torch.allclose(logprobs, expected, atol=1e-5)


def test_temperature_zero_takes_the_best_token_after_the_repetition_penalty() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.9], [1.0, 3.0, 2.9]])
    seen = torch.tensor([[0, 0], [1, 0]])
    noise = torch.tensor([0.99, 0.99], dtype=torch.float64)
    assert TokenSampler(SamplingParams(temperature=0))(logits, noise, None)[0].tolist() == [1, 1]
    penalised = TokenSampler(SamplingParams(temperature=0, repetition_penalty=1.5))(logits, noise, seen)
    assert penalised[0].tolist() == [1, 2]


def test_warping_does_not_change_its_input_logits() -> None:
    logits = torch.randn(3, 9)
    before = logits.clone()
    settings = SamplingParams(temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.2)
    TokenSampler(settings)(logits, torch.full((3,), 0.4, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.int64))
    assert torch.equal(logits, before)
