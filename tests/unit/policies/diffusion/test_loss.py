"""The loss of a batch is the named mean over latents and noise levels, and its noise is a function of step and row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel

from raftune.config.training import DiffusionTraining
from raftune.errors import DataError
from raftune.policies.diffusion.images import columns_of
from raftune.policies.diffusion.pipelines.base import Conditions, PipelineAdapter, PipelineCall, SampledImages
from raftune.policies.diffusion.schedules import FlowMatching, Schedule, VariancePreserving
from raftune.policies.diffusion.training import DenoisingLoss, ImageRow, StepCounter, batch_of, read_rows
from raftune.training.fit import MovingAverage
from raftune.training.objectives import Sft
from tests.unit.policies.diffusion.fits import write_rows

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow")


class OneImage(PipelineAdapter):
    """A denoiser whose whole knowledge is one image `mean`, said in whatever way the schedule wants."""

    pipelines = ()
    denoiser_name = "unet"
    takes = "text"
    lora_layers = ""

    def __init__(self, schedule: Schedule, mean: torch.Tensor) -> None:
        self.pipe = SimpleNamespace(unet=SimpleNamespace(dtype=torch.float32))
        self.schedule, self.mean = schedule, mean
        self.asked: list[float] = []

    def encode(self, prompts: Sequence[Any]) -> Conditions:
        return Conditions({"number": torch.tensor([[float(prompt)] for prompt in prompts])})

    def empty(self, negative: str | None = None) -> Conditions:
        return self.encode([-1.0])

    def sample(self, conditions: Conditions, negative: Any, generators: Any, call: PipelineCall) -> SampledImages:
        raise NotImplementedError

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        self.asked += conditions.tensors["number"].flatten().tolist()
        x0 = self.mean.expand_as(x_t)
        zero, one = torch.zeros_like(x_t), torch.ones_like(x_t)
        implied = (x_t - self.schedule.noised(x0, zero, t)) / self.schedule.noised(zero, one, t)
        return self.schedule.target(x0, implied, t)


def schedule_for(prediction: str) -> Schedule:
    if prediction == "flow":
        return FlowMatching(1000, 3.0)
    return VariancePreserving(torch.linspace(0.00085, 0.012, 1000), prediction)


def denoising(schedule: Schedule, mean: torch.Tensor, prompts: int = 3, **changes: Any) -> DenoisingLoss:
    binding = OneImage(schedule, mean)
    conditions = Conditions.joined([binding.encode(range(prompts)), binding.empty()])
    return DenoisingLoss(
        binding, schedule, DiffusionTraining(**{"condition_dropout": 0.0, **changes}), conditions, 7, StepCounter()
    )


def rows_of(x0: torch.Tensor, coefficients: Sequence[float]) -> list[ImageRow]:
    return [ImageRow(i, i % 3, c, one) for i, (one, c) in enumerate(zip(x0, coefficients, strict=True))]


# -- the objective ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [None, 2.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_best_image_is_the_weighted_mean_of_the_rows_whatever_is_predicted(
    prediction: str, gamma: float | None
) -> None:
    """At one level the error of any prediction is a multiple of the error of x0, so the noise cancels: exact."""
    if prediction == "flow" and gamma:
        return
    x0 = torch.randn(6, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0, 0.25])
    mean = torch.zeros(2, 3, 3, requires_grad=True)
    narrow = {"noise_range": (0.4, 0.4004), "level_sampling": "uniform", "min_snr_gamma": gamma}
    found = denoising(schedule_for(prediction), mean, **narrow)
    loss, mass = Sft().loss(found, batch_of(rows_of(x0, weights.tolist())))
    assert mass.item() == pytest.approx(weights.sum().item() * 18)
    (slope,) = torch.autograd.grad(loss, mean, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), mean)
    wanted = (weights[:, None, None, None] * x0).sum(0) / weights.sum()
    torch.testing.assert_close(-slope / bend, wanted, rtol=2e-3, atol=2e-3)


def test_the_loss_is_the_sum_over_rows_of_coefficient_and_squared_error_a_mean_over_levels() -> None:
    schedule, x0 = schedule_for("v_prediction"), torch.randn(4, 2, 3, 3)
    coefficients = [0.5, 1.0, 2.0, 0.0]
    found = denoising(schedule, torch.zeros(2, 3, 3), noise_levels=3, min_snr_gamma=5.0)
    batch = batch_of(rows_of(x0, coefficients))
    draws = found.draws(range(4), (2, 3, 3))
    assert draws.noise.shape == (4, 3, 2, 3, 3)
    wanted = 0.0
    for i, coefficient in enumerate(coefficients):
        for share, noise in zip(draws.shares[i], draws.noise[i], strict=True):
            t = schedule.times(share[None])
            said = found.predict(schedule.noised(x0[i : i + 1], noise[None], t), t, torch.tensor([i % 3]))
            error = (said - schedule.target(x0[i : i + 1], noise[None], t)).square().sum()
            wanted += coefficient / 3 * float(schedule.weights(t, 5.0)) * float(error)
    assert Sft().loss(found, batch)[0].item() == pytest.approx(wanted, rel=1e-5)


def test_micro_batches_of_a_step_add_up_to_the_step() -> None:
    x0 = torch.randn(6, 2, 3, 3)
    rows = rows_of(x0, [0.5] * 6)
    found = denoising(schedule_for("flow"), torch.zeros(2, 3, 3), noise_levels=2)
    whole = Sft().loss(found, batch_of(rows))
    parts = [Sft().loss(found, batch_of(rows[i : i + 2])) for i in (0, 2, 4)]
    torch.testing.assert_close(whole[0], sum((loss for loss, _ in parts), torch.zeros(())))
    torch.testing.assert_close(whole[1], sum((mass for _, mass in parts), torch.zeros(())))


# -- noise -----------------------------------------------------------------------------------------------------------


def test_noise_depends_on_seed_step_and_row_and_on_nothing_else() -> None:
    found = denoising(schedule_for("epsilon"), torch.zeros(2, 3, 3), noise_levels=2)
    first, alone = found.draws([4, 9], (2, 3, 3)), found.draws([9], (2, 3, 3))
    assert torch.equal(first.noise[1], alone.noise[0])
    assert torch.equal(first.shares[1], alone.shares[0])
    assert not torch.equal(first.noise[0], first.noise[1])
    other = replace(found, seed=8).draws([9], (2, 3, 3))
    found.clock.on_step_begin(None, SimpleNamespace(global_step=1), None)
    later = found.draws([9], (2, 3, 3))
    assert not torch.equal(alone.noise, other.noise)
    assert not torch.equal(alone.noise, later.noise)


def test_a_row_s_noise_is_standard_normal_and_its_levels_are_spread() -> None:
    found = denoising(schedule_for("epsilon"), torch.zeros(2, 3, 3), noise_levels=4)
    draws = found.draws(range(500), (2, 3, 3))
    numbers = draws.noise.flatten()
    assert abs(float(numbers.mean())) < 5 / len(numbers) ** 0.5
    assert abs(float(numbers.var()) - 1) < 5 * (2 / len(numbers)) ** 0.5
    assert ((draws.shares * 4).long() == torch.arange(4)).all()


def test_dropped_rows_are_asked_without_their_prompt_as_often_as_is_reported() -> None:
    """2,000 levels, each left out with probability .3: 600 +- 6 sigma of 20.5."""
    found = denoising(schedule_for("epsilon"), torch.zeros(1, 1, 1), condition_dropout=0.3, noise_levels=4)
    Sft().loss(found, batch_of(rows_of(torch.zeros(500, 1, 1, 1), [1.0] * 500)))
    asked = found.adapter.asked  # type: ignore[attr-defined]
    assert 477 <= asked.count(-1.0) <= 723
    kept = [(i // 4 % 500) % 3 for i, number in enumerate(asked) if number != -1.0]
    assert kept == [number for number in asked if number != -1.0]
    assert -1.0 not in _requests_without_dropout()


def _requests_without_dropout() -> list[float]:
    found = denoising(schedule_for("epsilon"), torch.zeros(1, 1, 1))
    Sft().loss(found, batch_of(rows_of(torch.zeros(500, 1, 1, 1), [1.0] * 500)))
    return found.adapter.asked  # type: ignore[attr-defined, no-any-return]


# -- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_give_back_the_latents_that_were_generated_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    x0 = torch.randn(3, 4, 2, 2).to(dtype)
    rows = [{"prompt": prompt, **columns_of(one)} for prompt, one in zip(("a", "b", "a"), x0, strict=True)]
    found = read_rows(write_rows(tmp_path / "r.parquet", rows, round_=5), (4, 2, 2), "token", 3)
    batch = batch_of(found.rows)
    assert torch.equal(batch["x0"], x0.float())
    assert batch["prompts"] == [0, 1, 0]
    assert [prompt.content for prompt in found.prompts] == ["a", "b"]
    assert found.round == 5


def test_weights_and_the_named_mean_make_the_coefficients(tmp_path: Path) -> None:
    """Three rows of 8 numbers, one step: two answer prompt a with weights 1 and 3, one prompt b with weight 2."""
    rows = [
        {"prompt": p, "weight": w, **columns_of(torch.zeros(2, 2, 2))}
        for p, w in (("a", 1), ("a", 3), ("b", 2), ("b", 0))
    ]
    path = write_rows(tmp_path / "r.parquet", rows)

    def coefficients(normalization: Any) -> list[float]:
        return [row.coefficient for row in read_rows(path, (2, 2, 2), normalization, 3).rows]

    for name, wanted in {"token": [1 / 6, 3 / 6, 2 / 6], "prompt": [1 / 8, 3 / 8, 4 / 8]}.items():
        np.testing.assert_allclose([8 * share for share in coefficients(name)], wanted)
    assert len(coefficients("sample")) == 3
    assert coefficients("sample") == coefficients("token")  # all are of one size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": None, "latents_shape": None, "latents_dtype": None}, r"s1 has none\. Take a reference image"),
        ({"latents": None, "invalid": "flat: every pixel is the same colour"}, r"s1 has none \(flat: every pixel"),
        (columns_of(torch.zeros(4, 3, 3)), r"shape \(4, 2, 2\) of this run's images; those of s1 have \(4, 3, 3\)"),
        (columns_of(torch.full((4, 2, 2), torch.nan)), "must be finite; those of s1"),
        ({"latents": b"1234"}, "s1: latents of the shape"),
        ({"weight": -1.0}, "weight must be finite and not negative; got -1"),
        ({"weight": float("nan")}, "weight must be finite"),
    ],
)
def test_a_row_that_cannot_be_learned_is_named(tmp_path: Path, changes: Any, message: str) -> None:
    rows = [{"prompt": "a", **columns_of(torch.zeros(4, 2, 2)), **extra} for extra in ({}, changes)]
    with pytest.raises(DataError, match=message):
        read_rows(write_rows(tmp_path / "r.parquet", rows), (4, 2, 2), "token", 3)


# -- the moving average ----------------------------------------------------------------------------------------------


def test_the_average_is_the_one_of_diffusers_and_of_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(5, generator=generator))
    ours, theirs = MovingAverage({"w": weight}, 0.4), EMAModel([weight], decay=0.4)
    by_hand = np.zeros(5)
    for step in range(1, 9):
        with torch.no_grad():
            weight.copy_(torch.randn(5, generator=generator))
        ours.follow({"w": weight})
        theirs.step([weight])
        decay = 0.0 if step == 1 else min(0.4, step / (step + 9))
        by_hand = decay * by_hand + (1 - decay) * weight.detach().double().numpy()
    torch.testing.assert_close(ours.shadow["w"], theirs.shadow_params[0])
    np.testing.assert_allclose(ours.shadow["w"].numpy(), by_hand, rtol=1e-5)
    ours.publish({"w": weight})
    np.testing.assert_allclose(weight.detach().numpy(), by_hand, rtol=1e-5)


def test_an_average_read_from_a_checkpoint_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    weights = [{"w": torch.randn(3)} for _ in range(6)]
    whole = MovingAverage(weights[0], 0.9)
    for one in weights[:3]:
        whole.follow(one)
    whole.write(tmp_path)
    again = MovingAverage({"w": torch.zeros(3)}, 0.9)
    again.read(tmp_path)
    for one in weights[3:]:
        whole.follow(one)
        again.follow(one)
    assert torch.equal(whole.shadow["w"], again.shadow["w"])


def test_bfloat16_weights_are_averaged_in_float32() -> None:
    """A move of 1 % of a unit in the last place is lost in bfloat16, and adds up here."""
    average = MovingAverage({"w": torch.ones(1, dtype=torch.bfloat16)}, 0.99)
    for _ in range(400):
        average.follow({"w": torch.full((1,), 1.0078125, dtype=torch.bfloat16)})
    assert average.shadow["w"].dtype == torch.float32
    assert average.shadow["w"].item() > 1.0075
