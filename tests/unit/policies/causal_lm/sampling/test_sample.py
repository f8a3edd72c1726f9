"""A sample has generate's distribution, its own noise for each sample, and ends where it should: on both ways alike."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sampling_models import CONTEXT, VOCABULARY, characters, gpt2, llama, mamba, mistral, prompts, seeds
from torch import Tensor, nn

from raftune.errors import ConfigError, DataError, ModelError, OutOfMemory
from raftune.policies.causal_lm.sampling.backend import generate
from raftune.policies.causal_lm.sampling.completions import StopStrings
from raftune.policies.causal_lm.sampling.token_choice import GeneratedCompletion, SamplingParams

PATHS = ["fused", "forked", "generate"]
LENGTHS = (3, 9, 5, 12, 1, 7)
COUNTS = (2, 1, 3, 0, 2, 4)
SETTINGS = SamplingParams(max_completion_length=25, eos_ids=(2, 5), batch_size=6)


def ids_of(generated: Sequence[Sequence[GeneratedCompletion]]) -> list[list[list[int]]]:
    return [[sample.ids for sample in group] for group in generated]


def flat(generated: Sequence[Sequence[GeneratedCompletion]]) -> list[GeneratedCompletion]:
    return [sample for group in generated for sample in group]


# --- the distribution -------------------------------------------------------------------------------------------------

FEW = 6
WARPS = {
    "nothing": SamplingParams(),
    "temperature": SamplingParams(temperature=0.6),
    "top_k": SamplingParams(top_k=3),
    "top_p": SamplingParams(top_p=0.7),
    "min_p": SamplingParams(min_p=0.3),
    "repetition_penalty": SamplingParams(repetition_penalty=1.6),
    "all": SamplingParams(temperature=1.7, top_k=5, top_p=0.95, min_p=0.05, repetition_penalty=0.7),
}


def next_by_generate(model: nn.Module, prefix: list[int], settings: SamplingParams) -> Tensor:
    """The distribution from which `generate` would sample the next token."""
    out = model.generate(
        input_ids=torch.tensor([prefix]),
        attention_mask=torch.ones(1, len(prefix), dtype=torch.int64),
        do_sample=True,
        max_new_tokens=1,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        repetition_penalty=settings.repetition_penalty,
        min_p=settings.min_p or None,
        pad_token_id=0,
        eos_token_id=None,
        output_scores=True,
        return_dict_in_generate=True,
    )
    return out.scores[0][0].softmax(-1).double()


@pytest.mark.parametrize("name", WARPS)
@pytest.mark.parametrize("path", PATHS)
def test_pairs_of_tokens_have_the_distribution_of_generate(path: str, name: str) -> None:
    """Hoeffding over the 36 pairs: a false alarm for one in a million sets of seeds."""
    draws = 3000 if path == "generate" else 6000
    model, prompt = llama(vocab_size=FEW), [3, 1, 4]
    settings = replace(WARPS[name], max_completion_length=2, batch_size=1000)
    first = next_by_generate(model, prompt, settings)
    expected = torch.stack([first[token] * next_by_generate(model, [*prompt, token], settings) for token in range(FEW)])
    generated = generate(model, None, [prompt], [list(range(draws))], settings, path)
    counts = np.zeros((FEW, FEW))
    for sample in generated[0]:
        counts[tuple(sample.ids)] += 1
    bound = np.sqrt(np.log(2 * FEW**2 / 1e-6) / (2 * draws))
    assert np.abs(counts / draws - expected.numpy()).max() < bound
    assert counts[expected.numpy() == 0].sum() == 0


# --- noise of its own -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_a_sample_does_not_depend_on_its_batch_or_its_order(path: str) -> None:
    model, asked, noise = llama(), prompts(*LENGTHS), seeds(*COUNTS)
    whole = ids_of(generate(model, None, asked, noise, replace(SETTINGS, batch_size=100), path))
    assert ids_of(generate(model, None, asked, noise, replace(SETTINGS, batch_size=5), path)) == whole
    assert ids_of(generate(model, None, asked[::-1], noise[::-1], SETTINGS, path)) == whole[::-1]
    assert ids_of(generate(model, None, asked[5:], [noise[5][2:3]], SETTINGS, path)) == [[whole[5][2]]]
    assert len({tuple(ids) for group in whole for ids in group}) > 8


@pytest.mark.parametrize("name", WARPS)
def test_both_ways_choose_the_same_tokens(name: str) -> None:
    settings = replace(WARPS[name], max_completion_length=25, eos_ids=(2, 5), batch_size=6, stop_strings=("q",))
    asked, noise = prompts(*LENGTHS), seeds(*COUNTS)
    fused, one, other = (generate(llama(), characters(), asked, noise, settings, path) for path in PATHS)
    assert ids_of(fused) == ids_of(one)
    assert ids_of(one) == ids_of(other)
    assert [[sample.finish for sample in group] for group in one] == [
        [sample.finish for sample in group] for group in other
    ]
    for sample, same in zip(flat(one), flat(other), strict=True):
        assert np.allclose(sample.logprobs, same.logprobs, atol=1e-4)


@pytest.mark.parametrize("model", [mamba, lambda: mistral(8)], ids=["mamba", "sliding window"])
def test_models_that_fall_back_keep_noise_of_their_own_too(model: Any) -> None:
    asked, noise = prompts(*LENGTHS), seeds(*COUNTS)
    whole = ids_of(generate(model(), None, asked, noise, SETTINGS))
    assert ids_of(generate(model(), None, asked[2:3], noise[2:3], SETTINGS)) == whole[2:3]


def test_another_seed_generates_another_completion() -> None:
    answers = generate(llama(), None, prompts(6), [list(range(40))], SamplingParams(max_completion_length=10))
    assert len({tuple(sample.ids) for sample in answers[0]}) == 40


# --- where it ends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_every_eos_id_ends_a_completion_and_belongs_to_it(path: str) -> None:
    settings = SamplingParams(max_completion_length=25, eos_ids=(2, 5, 8, 13, 21))
    generated = generate(llama(), None, prompts(*LENGTHS), seeds(*[8] * 6), settings, path)
    ended = [sample.ids for group in generated for sample in group if sample.finish == "eos"]
    assert len({ids[-1] for ids in ended}) > 2
    assert all(ids[-1] in settings.eos_ids and not set(ids[:-1]) & set(settings.eos_ids) for ids in ended)
    rest = [sample for group in generated for sample in group if sample.finish != "eos"]
    assert rest
    assert all(
        len(sample.ids) == 25 and sample.finish == "length" and not set(sample.ids) & {2, 5, 8, 13, 21}
        for sample in rest
    )


@pytest.mark.parametrize("path", PATHS)
def test_groups_of_different_sizes_keep_their_order(path: str) -> None:
    generated = generate(llama(), None, prompts(*LENGTHS), seeds(*COUNTS), SETTINGS, path)
    assert [len(group) for group in generated] == list(COUNTS)
    assert generate(llama(), None, [], [], SETTINGS, path) == []
    assert generate(llama(), None, prompts(3, 3), [[], []], SETTINGS, path) == [[], []]


@pytest.mark.parametrize("path", PATHS)
def test_no_completion_is_longer_than_asked(path: str) -> None:
    generated = generate(
        llama(), None, prompts(*LENGTHS), seeds(*COUNTS), SamplingParams(max_completion_length=1), path
    )
    assert all(
        len(sample.ids) == len(sample.logprobs) == 1 and sample.finish == "length"
        for group in generated
        for sample in group
    )


@pytest.mark.parametrize(("path", "model"), [*((path, llama) for path in PATHS), ("forked", gpt2), ("generate", gpt2)])
def test_the_context_limits_a_completion(path: str, model: Any) -> None:
    settings = SamplingParams(max_completion_length=40, batch_size=8)
    generated = generate(
        model(), None, prompts(5, CONTEXT - 20, CONTEXT - 1, CONTEXT - 40, 9), seeds(*[2] * 5), settings, path
    )
    assert [[len(sample.ids) for sample in group] for group in generated] == [
        [40] * 2,
        [20] * 2,
        [1] * 2,
        [40] * 2,
        [40] * 2,
    ]
    assert all(sample.finish == "length" for group in generated for sample in group)


def test_a_prompt_that_fills_the_context_or_is_empty_is_refused() -> None:
    with pytest.raises(DataError, match=r"shorter than the model's context of 128 tokens.*prompt 1 .* has 128"):
        generate(llama(), None, prompts(5, CONTEXT), seeds(1, 1), SETTINGS)
    with pytest.raises(DataError, match=r"at least one token; prompt 1 .* is empty"):
        generate(llama(), None, [[3], []], seeds(1, 1), SETTINGS)


def lettered() -> nn.Module:
    """Twelve tokens, all of them likely: eight letters and the four bytes of an emoji."""
    return llama(vocab_size=12, initializer_range=0.05)


def cut_at(ids: list[int], stops: Sequence[str]) -> list[int]:
    """The shortest beginning whose text holds a stop string."""
    text = characters(12).decode
    return next((ids[:n] for n in range(1, len(ids) + 1) if any(stop in text(ids[:n]) for stop in stops)), ids)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stops", [("e",), ("gh", "b"), ("hgh", "efe")])
def test_a_stop_string_ends_a_completion_with_the_token_that_completes_it(path: str, stops: tuple[str, ...]) -> None:
    model, tokenizer = lettered(), characters(12)
    free = SamplingParams(max_completion_length=40, eos_ids=(2,))
    asked, noise = [[3, 1, 4], [9, 2]], seeds(30, 30)
    unstopped = generate(model, tokenizer, asked, noise, free, path)
    stopped = generate(model, tokenizer, asked, noise, replace(free, stop_strings=stops), path)
    expected = [[cut_at(sample.ids, stops) for sample in group] for group in unstopped]
    assert ids_of(stopped) == expected
    for sample, whole in zip(flat(stopped), flat(unstopped), strict=True):
        ended = any(stop in characters(12).decode(sample.ids) for stop in stops) and sample.ids[-1] != 2
        assert sample.finish == ("stop" if ended else whole.finish)
    assert any(sample.finish == "stop" for sample in flat(stopped))


def test_a_stop_string_of_several_byte_tokens_ends_with_its_last_byte() -> None:
    stops = StopStrings(characters(12), ["🙂"])  # its bytes are the tokens 8, 9, 10, 11
    ends = [stops.ends(np.array([0, 1, 8, 9, 10, 11][:n])) for n in range(1, 7)]
    assert ends == [False] * 5 + [True]
    assert not stops.ends(np.array([3] * 40 + [9, 10, 11]))
    assert stops.ends(np.array([3] * 40 + [8, 9, 10, 11]))


def test_a_stop_string_longer_than_one_token_is_found_late_in_a_long_text() -> None:
    stops = StopStrings(characters(30), ["abcdefghij", "zz"])
    assert stops.ends(np.array([25] + [20] * 100 + list(range(10))))
    assert not stops.ends(np.array([20] * 100 + list(range(1, 10))))
    assert not stops.ends(np.array([25, 20, 25]))


def test_an_eos_counts_before_a_stop_string() -> None:
    settings = SamplingParams(max_completion_length=40, eos_ids=(4,), stop_strings=("e",))  # 4 is the letter e
    generated = generate(lettered(), characters(12), [[3, 1, 4]], seeds(20), settings)
    assert {sample.finish for sample in generated[0]} == {"eos"}


# --- what belongs to generate alone -----------------------------------------------------------------------------------


def test_beam_search_returns_generates_own_beams() -> None:
    model, asked = llama(), prompts(5, 8)
    settings = SamplingParams(max_completion_length=9, eos_ids=(2,), generation_kwargs={"num_beams": 4})
    generated = generate(model, None, asked, seeds(3, 3), settings)
    for prompt, group in zip(asked, generated, strict=True):
        ids = torch.tensor([prompt])
        beams = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            num_beams=4,
            num_return_sequences=3,
            max_new_tokens=9,
            eos_token_id=2,
            pad_token_id=0,
        )[:, len(prompt) :].tolist()
        assert [sample.ids for sample in group] == [
            beam[: len(sample.ids)] for beam, sample in zip(beams, group, strict=True)
        ]
        for sample in group:
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([prompt + sample.ids])).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(sample.ids)[:, None])[:, 0]
            assert np.allclose(sample.logprobs, expected, atol=1e-4)


def test_other_options_of_generate_take_effect_and_can_be_repeated() -> None:
    settings = SamplingParams(max_completion_length=30, temperature=0.3, generation_kwargs={"no_repeat_ngram_size": 1})
    asked, noise = prompts(*LENGTHS), seeds(*COUNTS)
    generated = generate(llama(), None, asked, noise, settings)
    assert all(len(set(sample.ids)) == len(sample.ids) == 30 for group in generated for sample in group)
    assert [len(group) for group in generated] == list(COUNTS)
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    assert generate(llama(), None, asked, noise, settings) == generated
    assert torch.equal(torch.random.get_rng_state(), state)


def test_stop_strings_hold_under_options_of_generate() -> None:
    settings = SamplingParams(
        max_completion_length=40, stop_strings=("e",), generation_kwargs={"no_repeat_ngram_size": 3}
    )
    generated = generate(lettered(), characters(12), [[3, 1, 4]], seeds(20), settings)
    assert all(sample.ids.index(4) == len(sample.ids) - 1 for sample in generated[0] if sample.finish == "stop")
    assert any(sample.finish == "stop" for sample in generated[0])


def test_options_that_generate_refuses_are_named() -> None:
    few = SamplingParams(generation_kwargs={"num_beams": 2})
    with pytest.raises(
        ConfigError, match=r"sampling.generation_kwargs .* got \{'num_beams': 2\} and num_generations 3"
    ):
        generate(llama(), None, prompts(5), seeds(3), few)
    with pytest.raises(ConfigError, match="num_baems"):
        generate(llama(), None, prompts(5), seeds(3), SamplingParams(generation_kwargs={"num_baems": 2}))


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_logits_that_are_not_numbers_are_refused(path: str) -> None:
    model = llama()
    model.lm_head.weight.data[7] = torch.nan
    with pytest.raises(ModelError, match="logits must be numbers"):
        generate(model, None, prompts(5), seeds(3), SETTINGS, path)


class RunsOut(nn.Module):
    """A last layer for which a single step is too much."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[weakref.ref[Tensor]] = []

    def forward(self, states: Tensor) -> Tensor:
        if states.shape[1] > 1:
            return states
        self.held.append(weakref.ref(states))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


@pytest.mark.parametrize("path", PATHS)
def test_memory_that_runs_out_is_an_error_with_the_batch_size_and_releases_the_tensors(path: str) -> None:
    model = llama()
    model.model.norm = RunsOut()
    with pytest.raises(OutOfMemory, match=r"batch_size must leave room .* got 6 rows") as caught:
        generate(model, None, prompts(*LENGTHS), seeds(*COUNTS), SETTINGS, path)
    assert caught.value.batch_size == 6
    gc.collect()
    assert [reference() for reference in model.model.norm.held] == [None]


def test_the_vocabulary_bounds_every_token() -> None:
    generated = generate(llama(), None, prompts(*LENGTHS), seeds(*COUNTS), replace(SETTINGS, temperature=50.0))
    tokens = [token for group in generated for sample in group for token in sample.ids]
    assert min(tokens) >= 0
    assert max(tokens) < VOCABULARY
    assert len(set(tokens)) > 50
