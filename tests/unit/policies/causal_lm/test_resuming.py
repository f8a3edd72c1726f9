"""A fit is exact under every interruption, and publishes nothing that is not finite or did not fit into memory."""

from __future__ import annotations

import gc
import json
import math
import re
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from raftune.config.training import TrainingConfig
from raftune.errors import ConfigError, ModelError, OutOfMemory
from raftune.policies.causal_lm import CausalLM, sft_loss
from raftune.policies.model_files import OPTIMIZER
from raftune.store import interruption, partial
from raftune.training import fit
from raftune.training.checkpoints import MANIFEST, REQUIRED, newest_verified, verifies
from tests.builders import KillAfter, Killed, Parts, parts, tree_hash, write_rows
from tests.unit.policies.causal_lm.fits import model_folders, some_rows, trained


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return model_folders(tmp_path_factory.mktemp("models"))


# -- interruptions ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "lora"), [("gpt2", False), ("llama", True)])
def test_interrupted_at_every_checkpoint_the_model_is_the_same_bit_for_bit(
    folders: Any, tmp_path: Path, arch: str, lora: bool
) -> None:
    """Two epochs of three steps; GPT-2 has dropout, so random states matter too."""
    config = parts(folders[arch], lora=lora, gradient_accumulation_steps=1)
    rows = write_rows(tmp_path / "r.parquet", some_rows())
    whole, report = trained(config, tmp_path / "whole", rows)
    assert report.steps == 6
    for step in range(1, 6):
        root = tmp_path / f"killed-{step}"
        with pytest.raises(Killed):
            trained(config, root, rows, callbacks=[KillAfter(step)])
        assert not (root / "round-0001" / "model").exists()
        again, resumed = trained(config, root, rows)
        assert tree_hash(again) == tree_hash(whole), step
        assert resumed == report


def test_interrupted_again_and_again_under_accumulation_the_model_is_the_same(folders: Any, tmp_path: Path) -> None:
    config = parts(folders["gpt2"], per_device_train_batch_size=2, gradient_accumulation_steps=2)
    rows = write_rows(tmp_path / "r.parquet", some_rows())
    whole, report = trained(config, tmp_path / "whole", rows)
    for step in range(1, report.steps):
        with pytest.raises(Killed):
            trained(config, tmp_path / "killed", rows, callbacks=[KillAfter(step)])
    assert tree_hash(trained(config, tmp_path / "killed", rows)[0]) == tree_hash(whole)


def _missing(path: Path) -> None:
    path.unlink()


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.fixture(scope="module")
def killed(folders: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Parts, Path, Path, dict[str, str]]:
    """A fit that was ended after its third of six steps, and the files that it should have led to."""
    root = tmp_path_factory.mktemp("killed")
    config = parts(folders["gpt2"])
    rows = write_rows(root / "r.parquet", some_rows())
    whole = tree_hash(trained(config, root / "whole", rows)[0])
    with pytest.raises(Killed):
        trained(config, root / "run", rows, callbacks=[KillAfter(3)])
    return config, root / "run", rows, whole


@pytest.mark.parametrize("harm", [_missing, _truncated, _flipped])
@pytest.mark.parametrize("file", [*sorted(REQUIRED), MANIFEST])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_used(
    killed: Any, tmp_path: Path, file: str, harm: Any
) -> None:
    config, run, rows, whole = killed
    shutil.copytree(run, tmp_path / "run")
    work = tmp_path / "run" / "round-0001" / "train"
    harm(work / "checkpoint-3" / file)
    start = tmp_path / "run" / "round-0000" / "model"
    policy = CausalLM.load(config, start, start)
    policy.train(rows, work, tmp_path / "out")
    assert policy.notes()[0] == "checkpoint-3 did not verify and was not used"
    assert re.fullmatch(r"training was taken up after step [12] of \d+", policy.notes()[1])
    assert tree_hash(tmp_path / "out") == whole


def test_without_one_good_checkpoint_the_fit_starts_anew_to_the_same_end(killed: Any, tmp_path: Path) -> None:
    config, run, rows, whole = killed
    shutil.copytree(run, tmp_path / "run")
    work = tmp_path / "run" / "round-0001" / "train"
    for folder in work.glob("checkpoint-*"):
        _flipped(folder / "optimizer.pt")
    assert tree_hash(trained(config, tmp_path / "run", rows)[0]) == whole


def test_a_checkpoint_of_other_rows_is_not_continued_from(killed: Any, tmp_path: Path) -> None:
    config, run, _, _ = killed
    shutil.copytree(run, tmp_path / "run")
    other = write_rows(tmp_path / "other.parquet", some_rows(9))
    clean = tree_hash(trained(config, tmp_path / "clean", other)[0])
    assert tree_hash(trained(config, tmp_path / "run", other)[0]) == clean


def test_a_file_that_the_manifest_does_not_name_is_not_enough(killed: Any, tmp_path: Path) -> None:
    _, run, _, _ = killed
    shutil.copytree(run / "round-0001" / "train", tmp_path / "train")
    identity = json.loads((tmp_path / "train" / "checkpoint-3" / MANIFEST).read_text())["identity"]
    newest = tmp_path / "train" / "checkpoint-3"
    assert verifies(newest, identity)
    assert not verifies(newest, "another fit")
    manifest = json.loads((newest / MANIFEST).read_text())
    del manifest["files"]["rng_state.pth"]
    (newest / MANIFEST).write_text(json.dumps(manifest))
    assert newest_verified(tmp_path / "train", identity) == (tmp_path / "train" / "checkpoint-2", ["checkpoint-3"])


def test_no_checkpoint_is_written_where_the_model_itself_follows(folders: Any, tmp_path: Path) -> None:
    config = parts(folders["llama"], save_steps=2)
    trained(config, tmp_path, write_rows(tmp_path / "r.parquet", some_rows()))
    saved = [path.name for path in (tmp_path / "round-0001" / "train").iterdir()]
    assert sorted(saved) == ["checkpoint-2", "checkpoint-4"]


class AskToStop(TrainerCallback):
    """Ctrl-C in the middle of this step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            assert interruption.ask_to_stop() == "what is done until then is kept"


def test_checkpoints_are_taken_by_time_and_when_they_were_taken_leaves_no_trace(
    folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, rows = parts(folders["gpt2"], save_steps=None), write_rows(tmp_path / "r.parquet", some_rows())
    whole, report = trained(config, tmp_path / "whole", rows)
    assert not list((tmp_path / "whole" / "round-0001" / "train").glob("checkpoint-*"))
    monkeypatch.setattr(partial, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(partial, "SHARE", 1e9)
    with pytest.raises(Killed):
        trained(config, tmp_path / "killed", rows, callbacks=[KillAfter(3)])
    again, resumed = trained(config, tmp_path / "killed", rows)
    assert tree_hash(again) == tree_hash(whole) and resumed == report


def test_training_that_is_interrupted_keeps_its_current_step(folders: Any, tmp_path: Path) -> None:
    config, rows = parts(folders["gpt2"], save_steps=None), write_rows(tmp_path / "r.parquet", some_rows())
    whole = tree_hash(trained(config, tmp_path / "whole", rows)[0])
    with pytest.raises(KeyboardInterrupt):
        trained(config, tmp_path / "stopped", rows, callbacks=[AskToStop(4)])
    interruption.forget()
    assert [path.name for path in (tmp_path / "stopped" / "round-0001" / "train").iterdir()] == ["checkpoint-4"]
    assert tree_hash(trained(config, tmp_path / "stopped", rows)[0]) == whole


# -- numbers that are none -------------------------------------------------------------------------------------------


def test_a_rate_that_blows_up_publishes_nothing(folders: Any, tmp_path: Path) -> None:
    config = parts(folders["llama"], learning_rate=1e38, num_train_epochs=8)
    with pytest.raises(ModelError, match=r"must be finite.*lower training\.learning_rate"):
        trained(config, tmp_path, write_rows(tmp_path / "r.parquet", some_rows()))
    assert not (tmp_path / "round-0001" / "model").exists()
    manifests = list((tmp_path / "round-0001" / "train").glob(f"*/{MANIFEST}"))
    weights = [fit.load_file(path.parent / fit.WEIGHTS) for path in manifests]
    assert all(torch.isfinite(tensor).all() for tensors in weights for tensor in tensors.values())


def test_a_gradient_that_is_not_finite_stops_the_step(folders: Any, tmp_path: Path, monkeypatch: Any) -> None:
    def broken(model: Any) -> Any:
        weight = next(p for p in model.parameters() if p.requires_grad)
        return lambda batch: ((weight * 0).sqrt().sum(), torch.ones(()))  # the loss is 0, its gradient is not a number

    monkeypatch.setattr(sft_loss, "loss_of", lambda objective, name: broken)
    with pytest.raises(ModelError, match="The gradient of step 1 must be finite; got nan"):
        trained(parts(folders["llama"]), tmp_path, write_rows(tmp_path / "r.parquet", some_rows()))


def test_a_weight_that_is_not_finite_is_named_before_anything_is_written(folders: Any, tmp_path: Path) -> None:
    class Corrupt(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            with torch.no_grad():
                model.lm_head.weight[5, 5] = math.inf  # a row that no text needs

    with pytest.raises(ModelError, match=r"an infinity in lm_head\.weight"):
        trained(
            parts(folders["llama"]), tmp_path, write_rows(tmp_path / "r.parquet", some_rows()), callbacks=[Corrupt()]
        )
    assert not (tmp_path / "round-0001" / "model").exists()


# -- memory ----------------------------------------------------------------------------------------------------------


def limit_memory(monkeypatch: pytest.MonkeyPatch, rows: int, error: Exception) -> list[int]:
    """Batches of more than `rows` rows raise; the returned list fills with the sizes that were tried."""
    tried, real = [], sft_loss.loss_of

    def limited(objective: Any, name: str) -> Any:
        def bind(model: Any) -> Any:
            loss = real(objective, name)(model)

            def checked(batch: Any) -> Any:
                tried.append(len(batch["input_ids"]))
                if tried[-1] > rows:
                    raise error
                return loss(batch)

            return checked

        return bind

    monkeypatch.setattr(sft_loss, "loss_of", limited)
    return tried


@pytest.mark.slow
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_full_memory_halves_the_micro_batch_and_keeps_the_step(
    folders: Any, tmp_path: Path, monkeypatch: Any, error: Exception
) -> None:
    rows = write_rows(tmp_path / "r.parquet", some_rows())
    wanted = trained(parts(folders["llama"], per_device_train_batch_size=8), tmp_path / "free", rows)[1]
    limit_memory(monkeypatch, 2, error)
    found = trained(parts(folders["llama"], per_device_train_batch_size=8), tmp_path / "tight", rows)[1]
    assert found.details["micro_batch"] == 2
    assert found.details["gradient_accumulation_steps"] == 4
    assert found.details["out_of_memory_at"] == [8, 4]
    assert found.steps == wanted.steps
    np.testing.assert_allclose(found.losses, wanted.losses, atol=1e-4)


@pytest.mark.slow
def test_a_fit_that_had_to_halve_resumes_in_the_smaller_batches(folders: Any, tmp_path: Path, monkeypatch: Any) -> None:
    rows = write_rows(tmp_path / "r.parquet", some_rows())
    tried = limit_memory(monkeypatch, 2, torch.OutOfMemoryError())
    whole, report = trained(parts(folders["gpt2"]), tmp_path / "whole", rows)
    with pytest.raises(Killed):
        trained(parts(folders["gpt2"]), tmp_path / "run", rows, callbacks=[KillAfter(3)])
    tried.clear()
    again, resumed = trained(parts(folders["gpt2"]), tmp_path / "run", rows)
    assert max(tried) == 2
    assert tree_hash(again) == tree_hash(whole)
    assert resumed == report


@pytest.mark.slow
def test_where_one_row_does_not_fit_the_error_says_what_helps(folders: Any, tmp_path: Path, monkeypatch: Any) -> None:
    limit_memory(monkeypatch, 0, torch.OutOfMemoryError())
    with pytest.raises(OutOfMemory, match=r"training\.gradient_checkpointing") as caught:
        trained(parts(folders["llama"]), tmp_path, write_rows(tmp_path / "r.parquet", some_rows()))
    assert caught.value.batch_size == 1


def test_a_fit_leaves_no_model_behind_without_a_collection(folders: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Ten rounds would else hold ten models and their optimizers until Python next collects cycles."""
    left = []

    def write(model: Any, *args: Any) -> None:
        left.append(weakref.ref(next(model.parameters())))

    monkeypatch.setattr("raftune.policies.causal_lm.policy.write_model", write)
    rows = write_rows(tmp_path / "r.parquet", some_rows())
    gc.disable()
    try:
        for lora in (False, True):
            trained(parts(folders["llama"], lora=lora), tmp_path / str(lora), rows)
        assert [weight() for weight in left] == [None, None]
    finally:
        gc.enable()


def test_several_processes_are_refused_and_several_gpus_are_not_split_over(
    folders: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    config, size = parts(folders["llama"]).training, fit.MicroBatch(4, 1)
    monkeypatch.setattr(fit.TrainingArguments, "n_gpu", property(lambda self: self.__dict__.get("_n_gpu", 2) or 2))
    found = fit.arguments(config, size, tmp_path, torch.device("cpu"), 0)
    assert found._n_gpu == 1
    assert found.train_batch_size == 4
    monkeypatch.setattr(fit.TrainingArguments, "world_size", property(lambda self: 2))
    with pytest.raises(ConfigError, match="1 process; a launcher began 2"):
        fit.arguments(config, size, tmp_path, torch.device("cpu"), 0)


def test_what_the_trainer_refuses_is_an_error_of_the_configuration(folders: Any, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "r.parquet", some_rows())
    for field in ("optim", "lr_scheduler_type"):
        with pytest.raises(ConfigError, match=r"must be what transformers' Trainer takes.*nothing.? is not a valid"):
            trained(parts(folders["llama"], **{field: "nothing"}), tmp_path / field, rows)
    with pytest.raises(ValueError, match="got 'num_workers'"):
        TrainingConfig(trainer_kwargs={"num_workers": 1})


# -- the optimizer between rounds ------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor"])
def test_carried_two_rounds_are_one_longer_fit_where_the_rate_is_constant(
    folders: Any, tmp_path: Path, optim: str
) -> None:
    """One row, so that the order says nothing: two rounds of three steps against six steps in one."""
    rows = write_rows(tmp_path / "r.parquet", some_rows(1))
    same = {"optim": optim, "lr_scheduler_type": "constant", "save_steps": 100, "learning_rate": 1e-2}
    once, _ = trained(parts(folders["llama"], num_train_epochs=6, **same), tmp_path / "once", rows)
    models = {}
    for state in ("carried", "fresh"):
        config = parts(folders["llama"], num_train_epochs=3, optimizer_state=state, **same)
        first, _ = trained(config, tmp_path / state, rows)
        start, out = tmp_path / state / "round-0000" / "model", tmp_path / state / "round-0002" / "model"
        CausalLM.load(config, first, start).train(rows, tmp_path / state / "work", out)
        assert (out / OPTIMIZER).exists() == (state == "carried" and optim != "sgd")
        models[state] = (out / "model.safetensors").read_bytes()
    wanted = (once / "model.safetensors").read_bytes()
    assert models["carried"] == wanted
    assert (models["fresh"] == wanted) == (optim == "sgd")  # which has no state to carry


def test_a_carried_fit_resumes_exactly(folders: Any, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "r.parquet", some_rows())
    config = parts(folders["gpt2"], optimizer_state="carried")
    first, _ = trained(config, tmp_path, rows)
    policy = CausalLM.load(config, first, tmp_path / "round-0000" / "model")
    policy.train(rows, tmp_path / "w1", tmp_path / "whole")
    with pytest.raises(Killed):
        policy.train(rows, tmp_path / "w2", tmp_path / "resumed", [KillAfter(2)])
    policy.train(rows, tmp_path / "w2", tmp_path / "resumed")
    assert tree_hash(tmp_path / "resumed") == tree_hash(tmp_path / "whole")
