"""Training minimises the objective that was named, on the ids that were generated."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raftune.config.training import TrainingConfig
from raftune.errors import DataError
from raftune.policies.causal_lm import CausalLM
from raftune.policies.causal_lm.encoding import TextEncoder
from raftune.policies.causal_lm.likelihood import TokenizedCompletion
from raftune.policies.causal_lm.sft_loss import LearnedLM, TrainingRow, batch_of, read_rows
from raftune.training.fit import POOL, LengthGroupedSampler, grouped_order
from raftune.training.objectives import Sft, coefficients
from tests.builders import EOS, PAD, Parts, parts, tiny_model, tiny_tokenizer, tree_hash, write_rows
from tests.unit.policies.causal_lm.fits import model_folders, some_rows, trained


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return model_folders(tmp_path_factory.mktemp("models"))


# -- order -----------------------------------------------------------------------------------------------------------


def test_every_row_is_seen_once_in_an_epoch_and_epochs_differ() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, size=1003).tolist()
    first, second = (grouped_order(lengths, 16, 7, epoch) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(1003))
    assert not np.array_equal(first, second)
    assert np.array_equal(first, grouped_order(lengths, 16, 7, 0))
    assert not np.array_equal(first, grouped_order(lengths, 16, 8, 0))


def test_rows_of_a_step_are_of_like_length_and_the_places_of_long_steps_are_random() -> None:
    lengths = np.random.default_rng(1).integers(1, 1000, size=16 * POOL)
    steps = lengths[grouped_order(lengths.tolist(), 16, 0, 0)].reshape(-1, 16)
    assert np.ptp(steps, axis=1).max() < 100
    assert not np.all(np.diff(steps.mean(axis=1)) < 0)


def test_what_does_not_fill_a_step_comes_last_even_if_that_is_all() -> None:
    assert sorted(grouped_order([5, 1, 3], 16, 0, 0)) == [0, 1, 2]
    assert len(grouped_order([], 16, 0, 0)) == 0


def test_the_sampler_follows_set_epoch() -> None:
    sampler = LengthGroupedSampler(list(range(40)), 4, 3)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert len(sampler) == 40


# -- the objective ---------------------------------------------------------------------------------------------------


def gradient(model: Any, rows: list[TrainingRow], batches: list[list[int]]) -> torch.Tensor:
    """The summed gradient of the batches, flat."""
    model.zero_grad()
    learned = LearnedLM(model)
    for batch in batches:
        Sft().loss(learned, batch_of([rows[i] for i in batch], PAD))[0].backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters()])


def made_rows(weights: Any, normalization: Any, step: int, prompts: Any = None, seed: int = 0) -> list[TrainingRow]:
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 9, size=(len(weights), 2))
    examples = [TokenizedCompletion.of(random.integers(3, 200, a), random.integers(3, 200, b)) for a, b in sizes]
    names = prompts or [str(i) for i in range(len(weights))]
    shares = coefficients(np.asarray(weights, dtype=float), [e.tokens for e in examples], names, normalization, step)
    return [TrainingRow(example, share) for example, share in zip(examples, shares, strict=True)]


@pytest.mark.parametrize("normalization", ["token", "sample", "prompt"])
def test_four_micro_batches_of_four_give_the_gradient_of_one_of_sixteen(normalization: str) -> None:
    model = tiny_model("llama").double()
    rows = made_rows(np.linspace(0.5, 2, 16), normalization, 16, [str(i // 3) for i in range(16)])
    whole = gradient(model, rows, [list(range(16))])
    parts_ = gradient(model, rows, [list(range(i, i + 4)) for i in range(0, 16, 4)])
    assert (whole - parts_).abs().max() < 1e-6 * max(1.0, float(whole.abs().max()))


@pytest.mark.parametrize("normalization", ["token", "sample", "prompt"])
def test_the_gradient_is_that_of_the_named_mean_written_out(normalization: str) -> None:
    model = tiny_model("gpt2").double()
    weights, prompts = np.array([1.0, 2.0, 0.5, 1.0, 3.0]), ["a", "a", "b", "c", "c"]
    rows = made_rows(weights, normalization, 8, prompts)
    found = gradient(model, rows, [[0, 1], [2, 3, 4]])
    nll, tokens = [], []
    for row in rows:
        ids = torch.from_numpy(row.example.ids.astype(np.int64))
        steps = model(input_ids=ids[None]).logits[0].float().log_softmax(-1)
        nll.append(-sum(steps[i - 1, ids[i]] for i in range(row.example.start, len(ids))))
        tokens.append(row.example.tokens)
    per_sample = [n / t for n, t in zip(nll, tokens, strict=True)]
    means = {
        "token": sum(w * n for w, n in zip(weights, nll, strict=True)) / (weights @ np.array(tokens)),
        "sample": sum(w * n for w, n in zip(weights, per_sample, strict=True)) / weights.sum(),
        "prompt": (
            (per_sample[0] + 2 * per_sample[1]) / 3 + per_sample[2] + (per_sample[3] + 3 * per_sample[4]) / 4
        ) / 3,
    }  # fmt: skip
    model.zero_grad()
    means[normalization].backward()
    wanted = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    assert (found - wanted).abs().max() < 1e-5 * float(wanted.abs().max())


def test_a_row_of_weight_two_counts_as_the_row_twice() -> None:
    model = tiny_model("llama").double()
    heavy = made_rows([2.0, 1.0], "token", 8)
    twice = [heavy[0].example, heavy[0].example, heavy[1].example]
    shares = coefficients(np.ones(3), [e.tokens for e in twice], ["0", "0", "1"], "token", 8)
    light = [TrainingRow(example, share) for example, share in zip(twice, shares, strict=True)]
    apart = gradient(model, heavy, [[0, 1]]) - gradient(model, light, [[0, 1, 2]])
    assert float(apart.abs().max()) < 1e-6


def test_the_average_step_is_the_mean_over_all_rows_however_rows_share_steps() -> None:
    weights = np.random.default_rng(0).uniform(0.5, 2, 20)
    tokens = np.arange(1, 21)
    shares = coefficients(weights, tokens.tolist(), [str(i) for i in range(20)], "token", 4)
    np.testing.assert_allclose(shares / 5, weights / (weights @ tokens))  # five steps in an epoch


def test_with_fewer_rows_than_a_step_holds_the_one_step_is_the_whole_mean() -> None:
    np.testing.assert_allclose(coefficients(np.ones(3), [1, 2, 3], ["a", "b", "c"], "token", 16), np.full(3, 1 / 6))


class OneToken(torch.nn.Module):
    """A policy over answers of one token each: a table of logits, of which the prompt, token 0, picks a row."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.table = torch.nn.Embedding.from_pretrained(logits.clone(), freeze=False)

    def forward(self, batch: Any) -> torch.Tensor:
        logits = self.table(batch["input_ids"]).flatten(0, 1)[batch["positions"]]
        nll = torch.nn.functional.cross_entropy(logits, batch["targets"], reduction="none")
        return batch["coefficients"].to(nll.dtype) @ nll


@pytest.mark.parametrize("scheme", ["prompt", "over K"])
def test_the_normalisation_is_the_objective_on_completions_of_one_token(scheme: str) -> None:
    """oracles.md 7: expected first steps by enumeration of all outcomes, K = 3 and a 0/1 reward, to 1e-6.

    All positives normalised per prompt, prompts without any dropped: (1 - (1 - s)^K) grad log s. Positives divided by
    K: grad s. Here a fit has one prompt's rows: "prompt" gives the first, and weights of 1/K the second.
    """
    torch.manual_seed(0)
    logits, good, K = torch.randn(1, 4, dtype=torch.float64), (0, 2), 3
    p = logits.softmax(-1)[0]
    s = float(p[list(good)].sum())
    expected = torch.zeros(4, 4, dtype=torch.float64)
    for outcome in np.ndindex(4, 4, 4):
        kept = [y for y in outcome if y in good]
        if not kept:
            continue
        examples = [TokenizedCompletion.of([0], [y]) for y in kept]
        shares = coefficients(np.ones(len(kept)), [1] * len(kept), ["x"] * len(kept), "prompt", 99)
        if scheme == "over K":
            shares = shares * len(kept) / K
        model = OneToken(logits.expand(4, 4))
        (-model(batch_of([TrainingRow(e, c) for e, c in zip(examples, shares, strict=True)], PAD))).backward()
        expected += float(p[list(outcome)].prod()) * model.table.weight.grad
    table = logits.clone().requires_grad_()
    success = table.softmax(-1)[0, list(good)].sum()
    (success if scheme == "over K" else (1 - (1 - s) ** K) * success.log()).backward()
    assert (expected[0] - table.grad[0]).abs().max() < 1e-6


# -- rows ------------------------------------------------------------------------------------------------------------


def encoder(context: int | None = 128) -> TextEncoder:
    return TextEncoder(tiny_tokenizer(), parts("x").sampling, context, EOS)


def test_ids_are_learnt_as_they_were_generated_and_not_as_their_text_would_be_tokenised(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    a, b = (tokenizer.convert_tokens_to_ids(letter) for letter in "ab")
    assert tokenizer("ab")["input_ids"] != [a, b]
    rows = read_rows(
        write_rows(tmp_path / "r.parquet", [{"prompt": "a", "completion_ids": [a, b, EOS]}]),
        encoder(),
        TrainingConfig(),
    )
    assert rows.examples[0].ids.tolist() == [*tokenizer("a")["input_ids"], a, b, EOS]
    assert rows.examples[0].tokens == 3


def test_the_round_comes_with_the_rows(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "r.parquet", some_rows(2), round_=7)
    assert read_rows(path, encoder(), TrainingConfig()).round == 7


def test_truncated_completions_are_left_out_only_on_request(tmp_path: Path) -> None:
    rows = [{**row, "finish": "length" if i % 2 else "eos"} for i, row in enumerate(some_rows(6))]
    path = write_rows(tmp_path / "r.parquet", rows)
    assert len(read_rows(path, encoder(), TrainingConfig()).examples) == 6
    masked = read_rows(path, encoder(), TrainingConfig(mask_truncated_completions=True))
    assert (len(masked.examples), masked.truncated) == (3, 3)


def test_rows_that_were_all_cut_off_leave_nothing_to_learn_from(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "r.parquet", [{**row, "finish": "length"} for row in some_rows(4)])
    with pytest.raises(DataError, match="leaves nothing to learn from: all 4 kept completions were cut off"):
        read_rows(path, encoder(), TrainingConfig(mask_truncated_completions=True))


def test_rows_without_weight_are_not_learnt(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "r.parquet", [{**row, "weight": float(i)} for i, row in enumerate(some_rows(3))])
    first, second = read_rows(path, encoder(), TrainingConfig(loss_normalization="token")).rows
    assert second.coefficient == 2 * first.coefficient > 0


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_a_weight_that_is_no_weight_is_refused(tmp_path: Path, weight: float) -> None:
    path = write_rows(tmp_path / "r.parquet", [{**some_rows(1)[0], "weight": weight}])
    with pytest.raises(DataError, match="finite and not negative"):
        read_rows(path, encoder(), TrainingConfig())


def test_a_row_longer_than_the_context_and_an_empty_one_are_refused(tmp_path: Path) -> None:
    long = write_rows(tmp_path / "long.parquet", [{"prompt": "xxxx", "completion_ids": [5] * 5}])
    with pytest.raises(DataError, match="context of 8 tokens; those of prompt xxxx have 4 and 5"):
        read_rows(long, encoder(8), TrainingConfig())
    empty = write_rows(tmp_path / "empty.parquet", [{"prompt": "xxxx", "completion_ids": []}])
    with pytest.raises(DataError, match="at least one token"):
        read_rows(empty, encoder(), TrainingConfig())


def test_the_generation_prefix_is_not_trained_on(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "r.parquet", some_rows(1))
    prefixed = TextEncoder(tiny_tokenizer(), parts("x", few_shot_prefix="Q: ").sampling, 128, EOS)
    assert np.array_equal(
        read_rows(path, prefixed, TrainingConfig()).examples[0].ids,
        read_rows(path, encoder(), TrainingConfig()).examples[0].ids,
    )


# -- the fit ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("lora", [False, True])
def test_a_fit_makes_its_rows_likelier_eos_included(folders: Any, tmp_path: Path, arch: str, lora: bool) -> None:
    config = parts(folders[arch], lora=lora, num_train_epochs=6, learning_rate=2e-2)
    out, report = trained(config, tmp_path, write_rows(tmp_path / "r.parquet", some_rows()))
    assert report.rows == 10
    assert report.steps == len(report.losses) == 18
    assert np.mean(report.losses[-3:]) < 0.8 * np.mean(report.losses[:3])
    json.dumps(dataclasses.asdict(report))
    before, after = (_eos_after(config, tmp_path, folder) for folder in (tmp_path / "round-0000" / "model", out))
    assert after > before + 0.5


def _eos_after(config: Parts, root: Path, folder: Path) -> float:
    policy = CausalLM.load(config, folder, root / "round-0000" / "model")
    rows = some_rows()
    ids = [[*policy.tokenizer(row["prompt"])["input_ids"], *row["completion_ids"]] for row in rows]
    with torch.no_grad():
        steps = [policy.model(input_ids=torch.tensor([row])).logits[0, -2].log_softmax(-1)[EOS] for row in ids]
    return float(torch.stack(steps).mean())


def test_accumulation_is_the_larger_batch_to_rounding(folders: Any, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "r.parquet", some_rows(16))
    plain = {"optim": "sgd", "learning_rate": 0.1, "num_train_epochs": 1, "max_grad_norm": 1e9}
    sizes = [{"per_device_train_batch_size": 16}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}]
    models = []
    for i, size in enumerate(sizes):
        config = parts(folders["llama"], **plain, **size)
        out, report = trained(config, tmp_path / str(i), rows)
        assert report.steps == 1
        models.append((CausalLM.load(config, out, out).model, report.losses))
    moved = [torch.cat([w.detach().flatten() for w in model.parameters()]) for model, _ in models]
    assert float((moved[0] - moved[1]).abs().max()) < 1e-6
    assert models[0][1][0] == pytest.approx(models[1][1][0], abs=1e-5)


def test_the_reported_loss_is_nats_per_token_of_the_step(folders: Any, tmp_path: Path) -> None:
    rows = some_rows(4)
    config = parts(folders["llama"], num_train_epochs=1)
    _, report = trained(config, tmp_path, write_rows(tmp_path / "r.parquet", rows))
    start = tmp_path / "round-0000" / "model"
    policy = CausalLM.load(config, start, start)
    nll = 0.0
    for row in rows:
        prompt = policy.tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor([[*prompt, *row["completion_ids"]]])
        with torch.no_grad():
            nll += float(
                policy.model(input_ids=ids, labels=ids.clone().index_fill(1, torch.arange(len(prompt)), -100)).loss
            ) * len(row["completion_ids"])
    assert report.losses[0] == pytest.approx(nll / sum(len(row["completion_ids"]) for row in rows), abs=1e-4)


def test_the_model_of_the_fit_and_the_one_read_back_agree_bit_for_bit(
    folders: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    kept = {}

    def keep(model: Any, *args: Any) -> None:
        kept["model"] = model
        write_model(model, *args)

    from raftune.policies.causal_lm import policy as module

    write_model = module.write_model
    monkeypatch.setattr(module, "write_model", keep)
    config = parts(folders["gpt2"])
    out, _ = trained(config, tmp_path, write_rows(tmp_path / "r.parquet", some_rows()))
    again = CausalLM.load(config, out, tmp_path / "round-0000" / "model").model
    assert again is not kept["model"]
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(kept["model"].eval()(input_ids=ids).logits, again(input_ids=ids).logits)
    assert "forward" not in vars(again)


def test_global_random_states_are_left_as_they_were(folders: Any, tmp_path: Path) -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    wanted = (torch.rand(1).item(), np.random.rand())
    torch.manual_seed(5)
    np.random.seed(5)
    trained(parts(folders["gpt2"]), tmp_path, write_rows(tmp_path / "r.parquet", some_rows()))
    assert (torch.rand(1).item(), np.random.rand()) == wanted


def test_a_fit_says_nothing_on_stdout_or_stderr(folders: Any, tmp_path: Path, capfd: Any) -> None:
    trained(parts(folders["llama"], lora=True), tmp_path, write_rows(tmp_path / "r.parquet", some_rows()))
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")


def test_another_round_has_another_order_and_the_same_round_the_same_bytes(folders: Any, tmp_path: Path) -> None:
    config = parts(folders["llama"])
    trees = []
    for name, round_ in (("a", 1), ("b", 1), ("c", 2)):
        rows = write_rows(tmp_path / f"{name}.parquet", some_rows(), round_)
        trees.append(tree_hash(trained(config, tmp_path / name, rows)[0]))
    assert trees[0] == trees[1]
    assert trees[0]["model.safetensors"] != trees[2]["model.safetensors"]


@pytest.mark.slow
def test_gradient_checkpointing_and_bfloat16_arithmetic_take_effect_and_leave_float32_weights(
    folders: Any, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "r.parquet", some_rows())
    plain, less = (
        trained(parts(folders["llama"], lora=True, gradient_checkpointing=c), tmp_path / str(c), rows)[1].losses
        for c in (False, True)
    )
    np.testing.assert_allclose(plain, less, atol=1e-5)
    config = parts(folders["llama"], bf16=True)
    out, half = trained(config, tmp_path / "bf16", rows)
    full = trained(parts(folders["llama"]), tmp_path / "full", rows)[1]
    assert half.losses[0] != full.losses[0]
    assert half.losses[0] == pytest.approx(full.losses[0], rel=0.02)
    assert CausalLM.load(config, out, out).model.dtype == torch.float32
