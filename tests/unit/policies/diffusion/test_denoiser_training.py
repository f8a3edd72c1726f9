"""Training learns the images that were kept, exactly resumable, and says what it did."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler
from safetensors.torch import load_file
from transformers import TrainerCallback

from raftune.errors import ConfigError, DataError, ModelError, OutOfMemory
from raftune.policies.diffusion import Diffusion
from raftune.policies.diffusion import training as losses
from raftune.policies.diffusion.images import columns_of, latents_of
from raftune.policies.model_files import OPTIMIZER
from raftune.training.checkpoints import MANIFEST, REQUIRED
from raftune.training.fit import AVERAGE
from tests.builders import KillAfter, Killed, tree_hash
from tests.pipelines import CELLS, save_tiny, tiny_pipeline
from tests.unit.policies.diffusion.fits import parts, samples_of, some_rows, start_of, trained, write_rows

MODEL = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("sd", tmp_path_factory.mktemp("pipe") / "sd")


@pytest.fixture(scope="module")
def sd_v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("sd-v", tmp_path_factory.mktemp("pipe") / "sd-v")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.parquet", some_rows())


# -- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_thirty_steps_lower_the_loss_and_move_samples_towards_the_kept_image(sd_v: Path, tmp_path: Path) -> None:
    """One image for every prompt; of a random denoiser with some ten thousand weights no more can be asked."""
    wanted = torch.randn((4, CELLS, CELLS), generator=torch.Generator().manual_seed(5))
    rows = write_rows(
        tmp_path / "r.parquet", [{"prompt": p, **columns_of(wanted)} for p in ("a circle", "a square")] * 2
    )
    config = parts(sd_v, num_train_epochs=30, noise_levels=4, save_steps=100, condition_dropout=0.0, learning_rate=2e-2)
    out, report = trained(config, tmp_path, rows)
    assert report.steps == 30
    assert np.mean(report.losses[-5:]) < 0.9 * report.losses[0]
    details = report.details
    assert all(
        now < 0.9 * then for now, then in zip(details["loss_by_quarter"], details["start_loss_by_quarter"], strict=True)
    )
    assert details["drift"] > 0.1
    start = tmp_path / "round-0000" / "model"
    distances = []
    for folder in (start, out):
        payloads = [sample.payload for sample in samples_of(config, folder, start, ["a circle", "a square"], k=2)]
        latents = [latents_of(p["latents"], p["latents_shape"], p["latents_dtype"]) for p in payloads]
        distances.append(float(np.mean([(one - wanted).square().mean() for one in latents])))
    assert distances[1] < 0.85 * distances[0]


@pytest.mark.slow
def test_a_row_of_weight_nothing_is_as_good_as_absent(sd: Path, tmp_path: Path) -> None:
    few, more = some_rows(count=4), some_rows(count=5)
    more[4]["weight"] = 0.0
    config = parts(sd, num_train_epochs=1)
    hashes = []
    for name, found in (("few", few), ("more", more)):
        out, _ = trained(config, tmp_path / name, write_rows(tmp_path / f"{name}.parquet", found))
        hashes.append(tree_hash(out)[MODEL])
    assert hashes[0] == hashes[1]


@pytest.mark.slow
def test_every_option_of_the_denoising_loss_changes_what_is_learned(sd: Path, tmp_path: Path, rows: Path) -> None:
    options: list[dict[str, Any]] = [
        {},
        {"noise_levels": 2},
        {"noise_range": (0.0, 0.5)},
        {"level_sampling": "logit_normal"},
    ]
    options += [{"min_snr_gamma": 1.0}, {"condition_dropout": 0.9}, {"ema_decay": 0.9}]
    found = [trained(parts(sd, num_train_epochs=1, **one), tmp_path / str(i), rows)[0] for i, one in enumerate(options)]
    assert len({tree_hash(out)[MODEL] for out in found}) == len(options)


@pytest.mark.slow
def test_the_evidence_says_what_was_learned_and_how_far_the_denoiser_moved(
    sd: Path, tmp_path: Path, rows: Path
) -> None:
    """A LoRA is switched off for it, a whole denoiser is compared with the start that is read again: both see it."""
    starts = []
    for lora in (False, True):
        _, report = trained(parts(sd, lora=lora, noise_levels=2), tmp_path / str(lora), rows)
        details = report.details
        assert (details["noise_levels"], details["prompts"], details["probed"]) == (2, 4, 6)
        assert len(details["loss_by_quarter"]) == len(details["drift_by_quarter"]) == 4
        assert details["drift"] > 0
        assert report.rows == 6
        starts.append(details["start_loss_by_quarter"])
    np.testing.assert_allclose(starts[0], starts[1], rtol=1e-5)


def test_a_fit_that_learns_nothing_has_not_moved(sd: Path, tmp_path: Path, rows: Path) -> None:
    _, report = trained(parts(sd, learning_rate=1e-30, num_train_epochs=1), tmp_path, rows)
    assert report.details["drift"] == 0
    assert report.details["loss_by_quarter"] == report.details["start_loss_by_quarter"]


# -- interruptions ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lora", "options"),
    [
        (False, {"ema_decay": 0.9, "noise_levels": 2}),
        (True, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "condition_dropout": 0.5}),
    ],
)
def test_interrupted_at_every_checkpoint_the_model_is_the_same_bit_for_bit(
    sd: Path, tmp_path: Path, rows: Path, lora: bool, options: dict[str, Any]
) -> None:
    config = parts(sd, lora=lora, **options)
    whole, report = trained(config, tmp_path / "whole", rows)
    assert report.steps == 4
    root = tmp_path / "killed"
    for step in range(1, report.steps):  # again and again: each goes on from where the last one ended
        with pytest.raises(Killed):
            trained(config, root, rows, callbacks=[KillAfter(step)])
        assert not (root / "round-0001" / "model").exists()
    again, resumed = trained(config, root, rows)
    assert tree_hash(again) == tree_hash(whole)
    assert resumed == report


@pytest.mark.slow
def test_a_lora_with_dropout_resumes_exactly_too(sd: Path, tmp_path: Path, rows: Path) -> None:
    from raftune.config.policy import AdapterConfig

    config = parts(sd, lora=AdapterConfig(r=2, dropout=0.5))
    whole, _ = trained(config, tmp_path / "whole", rows)
    with pytest.raises(Killed):
        trained(config, tmp_path / "killed", rows, callbacks=[KillAfter(2)])
    assert tree_hash(trained(config, tmp_path / "killed", rows)[0]) == tree_hash(whole)


@pytest.mark.slow
def test_a_damaged_average_is_noticed_like_any_other_file_of_a_checkpoint(sd: Path, tmp_path: Path, rows: Path) -> None:
    config = parts(sd, ema_decay=0.9)
    whole, _ = trained(config, tmp_path / "whole", rows)
    with pytest.raises(Killed):
        trained(config, tmp_path / "run", rows, callbacks=[KillAfter(2)])
    work = tmp_path / "run" / "round-0001" / "train"
    named = json.loads((work / "checkpoint-2" / MANIFEST).read_text())["files"]
    assert {*REQUIRED, AVERAGE} <= set(named)
    path = work / "checkpoint-2" / AVERAGE
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    start = tmp_path / "run" / "round-0000" / "model"
    policy = Diffusion.load(config, start, start)
    policy.train(rows, work, tmp_path / "out")
    assert "checkpoint-2 did not verify and was not used" in policy.notes()
    assert tree_hash(tmp_path / "out") == tree_hash(whole)


# -- the moving average ----------------------------------------------------------------------------------------------


class Steps(TrainerCallback):  # type: ignore[misc]
    """Keeps the weights after every step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, np.ndarray[Any, Any]]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        named = model.denoiser.named_parameters()
        self.weights.append({name: weight.detach().double().numpy().copy() for name, weight in named})


def test_the_published_model_is_the_average_of_the_weights_after_each_step(
    sd: Path, tmp_path: Path, rows: Path
) -> None:
    seen = Steps()
    out, _ = trained(parts(sd, ema_decay=0.3), tmp_path, rows, callbacks=[seen])
    assert len(seen.weights) == 4
    published = load_file(out / MODEL)
    for name, last in seen.weights[-1].items():
        average = seen.weights[0][name]
        for step, weights in enumerate(seen.weights[1:], 2):
            decay = min(0.3, step / (step + 9))
            average = decay * average + (1 - decay) * weights[name]
        np.testing.assert_allclose(published[name].numpy(), average, rtol=1e-4, atol=1e-6)
        assert last.shape == average.shape
    assert any(not np.allclose(published[name].numpy(), last, rtol=1e-4) for name, last in seen.weights[-1].items())


# -- rounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_the_next_round_goes_on_from_the_last_one_and_carries_its_moments(sd: Path, tmp_path: Path, lora: bool) -> None:
    """One row and one level, so that the order says nothing. Two rounds generate other noise than one long round
    does.
    """
    rows = write_rows(tmp_path / "r.parquet", some_rows(count=2))
    config = parts(sd, lora=lora, num_train_epochs=3, optimizer_state="carried", lr_scheduler_type="constant")
    first, _ = trained(config, tmp_path, rows)
    start, work = tmp_path / "round-0000" / "model", tmp_path / "work"
    assert (first / OPTIMIZER).is_file()
    second = tmp_path / "round-0002" / "model"
    report = Diffusion.load(config, first, start).train(rows, work, second)
    assert report.details["start_loss_by_quarter"] != report.details["loss_by_quarter"]
    fresh = tmp_path / "fresh"
    shutil.copytree(first, fresh)
    (fresh / OPTIMIZER).unlink()
    other = tmp_path / "round-0003" / "model"
    Diffusion.load(config, fresh, start).train(rows, tmp_path / "work3", other)
    with pytest.raises(Killed):
        Diffusion.load(config, first, start).train(rows, tmp_path / "w4", tmp_path / "o4", [KillAfter(2)])
    Diffusion.load(config, first, start).train(rows, tmp_path / "w4", tmp_path / "o4")
    hashes = [tree_hash(folder) for folder in (second, other, tmp_path / "o4")]
    assert hashes[0] == hashes[2]
    assert hashes[0] != hashes[1]


# -- memory, precision -----------------------------------------------------------------------------------------------


def limit_memory(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Batches of more than `rows` rows raise."""
    real = losses.DenoisingLoss.terms

    def limited(self: Any, batch: Any) -> Any:
        if len(batch["x0"]) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, batch)

    monkeypatch.setattr(losses.DenoisingLoss, "terms", limited)


@pytest.mark.slow
def test_a_full_memory_halves_the_micro_batch_and_keeps_the_step_and_its_noise(
    sd: Path, tmp_path: Path, rows: Path, monkeypatch: Any
) -> None:
    wanted = trained(parts(sd, ema_decay=0.5), tmp_path / "free", rows)[1]
    limit_memory(monkeypatch, 2)
    found = trained(parts(sd, ema_decay=0.5), tmp_path / "tight", rows)[1]
    assert (found.details["micro_batch"], found.details["out_of_memory_at"]) == (2, [4])
    np.testing.assert_allclose(found.losses, wanted.losses, rtol=1e-3)


@pytest.mark.slow
def test_where_one_image_does_not_fit_the_error_says_what_helps(
    sd: Path, tmp_path: Path, rows: Path, monkeypatch: Any
) -> None:
    limit_memory(monkeypatch, 0)
    with pytest.raises(OutOfMemory, match=r"one image does not fit.*noise_levels: 1"):
        trained(parts(sd), tmp_path, rows)


@pytest.mark.slow
def test_gradient_checkpointing_changes_the_memory_and_not_the_model(sd: Path, tmp_path: Path, rows: Path) -> None:
    found = [trained(parts(sd, gradient_checkpointing=one), tmp_path / str(one), rows) for one in (False, True)]
    weights = [load_file(out / MODEL) for out, _ in found]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_reaches_the_denoiser(sd: Path, tmp_path: Path, rows: Path) -> None:
    seen: list[bool] = []

    class Look(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            seen.append(bool(model.denoiser.is_gradient_checkpointing))

    trained(parts(sd, gradient_checkpointing=True, num_train_epochs=1), tmp_path, rows, callbacks=[Look()])
    assert seen == [True, True]


@pytest.mark.slow
def test_in_bfloat16_the_adapter_stays_float32_and_the_model_samples(sd: Path, tmp_path: Path) -> None:
    x0 = torch.randn(4, 4, CELLS, CELLS).to(torch.bfloat16)
    rows = write_rows(tmp_path / "r.parquet", [{"prompt": "a circle", **columns_of(one)} for one in x0])
    for lora in (False, True):
        config = parts(sd, lora=lora, dtype="bfloat16")
        out, report = trained(config, tmp_path / str(lora), rows)
        assert np.isfinite(report.losses).all()
        file = out / ("pytorch_lora_weights.safetensors" if lora else MODEL)
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32 if lora else torch.bfloat16}
        payload = samples_of(config, out, tmp_path / str(lora) / "round-0000" / "model")[0].payload
        assert (payload["latents_dtype"], payload["invalid"]) == ("bfloat16", None)


# -- what is refused -------------------------------------------------------------------------------------------------


def saved_with(scheduler: Any, folder: Path) -> Path:
    pipe = tiny_pipeline("sd")
    pipe.scheduler = scheduler
    pipe.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (EDMEulerScheduler(), "got EDMEulerScheduler. Known are"),
        (DDIMScheduler(rescale_betas_zero_snr=True), "must predict v or x0; DDIMScheduler"),
    ],
)
def test_a_scheduler_that_cannot_be_trained_is_refused_when_the_run_starts(
    tmp_path: Path, scheduler: Any, message: str
) -> None:
    config = parts(saved_with(scheduler, tmp_path / "pipe"))
    with pytest.raises(ModelError, match=message):
        start_of(config, tmp_path)


def test_options_that_mean_nothing_are_refused_when_the_run_starts(sd: Path, tmp_path: Path) -> None:
    flow = save_tiny("sd3", tmp_path / "sd3")
    with pytest.raises(ConfigError, match="min_snr_gamma must be left out for flow matching"):
        start_of(parts(flow, min_snr_gamma=5.0), tmp_path / "a")
    with pytest.raises(ConfigError, match=r"policy\.dtype must be float32 or bfloat16 where the whole denoiser"):
        start_of(parts(sd, dtype="float16"), tmp_path / "b")
    with pytest.raises(ConfigError, match="trainer_kwargs must not hold 'neftune_noise_alpha'"):
        start_of(parts(sd, trainer_kwargs={"neftune_noise_alpha": 5}), tmp_path / "c")
    plain = save_tiny("ddpm", tmp_path / "ddpm")
    with pytest.raises(ConfigError, match="condition_dropout means nothing to a DDPMPipeline, which takes no prompt"):
        start_of(parts(plain, "ddpm", condition_dropout=0.2), tmp_path / "d")


def test_latents_of_another_size_are_refused_before_anything_is_fitted(sd: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "r.parquet", [{"prompt": "a", **columns_of(torch.zeros(4, 6, 6))}])
    with pytest.raises(DataError, match=r"those of s0 have \(4, 6, 6\)"):
        trained(parts(sd), tmp_path, rows)
    assert not (tmp_path / "round-0001" / "model").exists()


def test_a_rate_that_blows_up_publishes_nothing(sd: Path, tmp_path: Path, rows: Path) -> None:
    with pytest.raises(ModelError, match=r"must be finite.*lower training\.learning_rate"):
        trained(parts(sd, learning_rate=1e38, num_train_epochs=8), tmp_path, rows)
    assert not (tmp_path / "round-0001" / "model").exists()
