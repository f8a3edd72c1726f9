"""Several processes train as one does, for real: over gloo, with two processes on the CPU.

Each start of the processes takes seconds, so claims that can share a start do.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from raftune.config import RunConfig, validate
from raftune.config.load import validate_as
from raftune.config.sft import SftConfig
from raftune.engines.training import Result
from raftune.errors import EngineError, NotFinite
from raftune.policies.causal_lm import CausalLM
from raftune.policies.diffusion import Diffusion
from raftune.runtime.distributed import trainer_for
from raftune.sft import sft
from raftune.store import interruption
from tests import pipelines
from tests.builders import save_tiny, tiny_llama, tiny_tokenizer, tree_hash, write_rows
from tests.unit.policies.causal_lm.fits import some_rows
from tests.unit.policies.diffusion import fits as images

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

REPOSITORY = Path(__file__).parents[2]
EPOCHS = 2
# Objectives that do what a test needs in one process, at its fourth micro-batch; then they are sft.
OBJECTIVES = """
import os, signal
from pathlib import Path
import torch
from raftune.training.objectives import Sft

class Wrong(Sft):
    calls = 0

    def loss(self, model, batch):
        loss, weight = super().loss(model, batch)
        Wrong.calls += 1
        if os.environ.get("RANK") == "1" and Wrong.calls == 4:
            return self.wrong(loss), weight
        return loss, weight

class NotANumber(Wrong):
    def wrong(self, loss):
        return loss * float("nan")

class Killed(Wrong):
    def wrong(self, loss):
        if not (mark := Path(__file__).with_name("killed")).exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return loss

class TooLarge(Sft):
    def loss(self, model, batch):
        if os.environ.get("RANK") == "1" and len(batch["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().loss(model, batch)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, rows whose last step is not full, and objectives."""
    root = tmp_path_factory.mktemp("processes")
    save_tiny(root / "llama", "llama")
    save_tiny(root / "gpt2", "gpt2")  # with dropout, and an output layer tied to the embeddings
    for count in (18, 21):  # of steps of 2 x 4 rows the last has 2 rows, or 5
        write_rows(root / f"{count}.parquet", some_rows(count))
    (root / "objectives.py").write_text(OBJECTIVES)
    return root


@pytest.fixture(autouse=True)
def two_threads_are_one_for_each() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(folder: Path, arch: str = "llama", *, lora: bool = False, objective: str = "", **training: Any) -> RunConfig:
    """Steps of eight rows, in two micro-batches."""
    adapter = {"adapter": {"r": 4, "alpha": 8.0}} if lora else {}
    if objective:
        training["objective"] = f"{folder / 'objectives.py'}:{objective}"
    steps = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": EPOCHS}
    return validate(
        {
            "data": {"prompts": "not read"},
            "policy": {"model": str(folder / arch), "device": "cpu", **adapter},
            "training": {"learning_rate": 1e-2, **steps, "save_steps": 1, **training},
            "engine": {"threads": 2},
        }
    )


def trained(given: RunConfig, root: Path, rows: Path, progress: Callable[[int, int], None] | None = None) -> Result:
    """Trains from the start into root/out, in as many processes as configured."""
    family: Any = CausalLM if given.policy.family == "causal_lm" else Diffusion
    start, work, out = root / "start", root / "train", root / "out"
    if not start.exists():
        family.start(given, start)
    train = trainer_for(given, start, *([progress] if progress else []))
    if train is not None:
        return train(start, rows, work, out)
    policy = family.load(given, start, start)
    return policy.train(rows, work, out), policy.notes()


def distance(a: Path, b: Path) -> float:
    """The largest difference of two models' weights, which have the same names."""
    one, two = (load_file(next(folder.rglob("*model*.safetensors"))) for folder in (a, b))
    assert one.keys() == two.keys()
    return max(float((one[name].float() - two[name].float()).abs().max()) for name in one)


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Uninterrupted trainings by one process, and by two in both ways."""
    roots = {name: tmp_path_factory.mktemp(name) for name in ("one", "ddp", "fsdp")}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    results = {"one": trained(config(folder), roots["one"], folder / "21.parquet")}
    for name in ("ddp", "fsdp"):
        results[name] = trained(config(folder, processes=2, parallel=name), roots[name], folder / "21.parquet")
    torch.set_num_threads(before)
    return {name: (roots[name] / "out", result[0]) for name, result in results.items()}


# -- the same as one process -----------------------------------------------------------------------------------------


def test_two_processes_train_to_the_bits_of_one_that_accumulates_the_same_micro_batches(whole: Any) -> None:
    (one, report), (two, other) = whole["one"], whole["ddp"]
    assert tree_hash(one) == tree_hash(two)
    assert other.losses == report.losses
    assert other.details == report.details | {
        "gradient_accumulation_steps": 1,
        "processes": 2,
        "parallel": "ddp",
    }


def test_shards_train_to_the_same_weights_within_rounding(whole: Any) -> None:
    (one, report), (two, other) = whole["one"], whole["fsdp"]
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    assert 0 < distance(one, two) < 1e-5
    assert other.losses == pytest.approx(report.losses, abs=1e-5)


def test_a_process_without_rows_in_the_last_step_adds_nothing_to_it(folder: Path, tmp_path: Path) -> None:
    """With LoRA. Two rows are left for the last step, and one micro-batch takes them."""
    for name, processes in (("one", 1), ("two", 2)):
        trained(config(folder, lora=True, processes=processes), tmp_path / name, folder / "18.parquet")
    assert tree_hash(tmp_path / "one" / "out") == tree_hash(tmp_path / "two" / "out")


def test_four_bit_weights_are_trained_around_by_two_processes_as_by_one(folder: Path, tmp_path: Path) -> None:
    """bitsandbytes packs blocks of 64 weights."""
    pytest.importorskip("bitsandbytes")
    model = tiny_llama(hidden_size=64, intermediate_size=128)
    model.save_pretrained(tmp_path / "llama")
    tiny_tokenizer().save_pretrained(tmp_path / "llama")
    for name, processes in (("one", 1), ("two", 2)):
        given = config(folder, lora=True, processes=processes)
        changes = {"model": str(tmp_path / "llama"), "load_in_4bit": True}
        given = given.model_copy(update={"policy": given.policy.model_copy(update=changes)})
        trained(given, tmp_path / name, folder / "18.parquet")
    assert tree_hash(tmp_path / "one" / "out") == tree_hash(tmp_path / "two" / "out")


def test_sft_trains_on_several_processes(folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"say {word}", "completion": f"{word} it is"} for word in "abcdefghijklmnop"]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told: list[tuple[int, int]] = []

    def observe(kind: str, facts: dict[str, Any]) -> None:
        if kind == "trained":
            told.append((facts["done"], facts["of"]))

    for name, processes in (("one", 1), ("two", 2)):
        training = config(folder, processes=processes, num_train_epochs=10).training.model_dump(exclude={"objective"})
        given = {
            "output_dir": str(tmp_path / name),
            "threads": processes,
            "data": {"path": str(data), "held_out_fraction": 0.0},
            "policy": {"model": str(folder / "llama"), "device": "cpu"},
            "training": training,
        }
        sft(validate_as(SftConfig, given), observe if processes == 2 else lambda kind, facts: None)
    models = [tree_hash(tmp_path / name / "model") for name in ("one", "two")]
    for model in models:
        del model["training.json"], model["raftune_files.json"]  # which say how many there were
    assert models[0] == models[1]
    assert told[-1] == (20, 20)


def test_a_tied_output_layer_is_trained_and_written_once_also_in_shards(folder: Path, tmp_path: Path) -> None:
    """Without dropout, whose masks would differ."""
    options = {"model_init_kwargs": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}}
    ways: dict[str, Any] = {"one": {}, "two": {"processes": 2, "parallel": "fsdp"}}
    for name, training in ways.items():
        given = config(folder, "gpt2", optimizer_state="carried", **training)
        given = given.model_copy(update={"policy": given.policy.model_copy(update=options)})
        trained(given, tmp_path / name, folder / "18.parquet")
    one, two = tmp_path / "one" / "out", tmp_path / "two" / "out"
    assert "lm_head.weight" not in load_file(two / "model.safetensors")
    assert distance(one, two) < 1e-5
    moments = [load_file(out / "optimizer.safetensors") for out in (one, two)]
    assert moments[0].keys() == moments[1].keys()
    assert all(torch.allclose(moments[0][name], moments[1][name], atol=1e-5) for name in moments[0])


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_denoiser_is_trained_by_two_processes_as_by_one(tmp_path: Path, parallel: str) -> None:
    model = pipelines.save_tiny("sd", tmp_path / "sd")
    rows = images.write_rows(tmp_path / "rows.parquet", images.some_rows(count=11))
    given = images.parts(model, gradient_accumulation_steps=2, ema_decay=0.9)
    sections = {"policy": given.policy, "sampling": given.sampling}
    for name, training in (("one", {}), ("two", {"processes": 2, "parallel": parallel})):
        full = validate(
            {
                "data": {"prompts": "not read"},
                **{key: section.model_dump() for key, section in sections.items()},
                "training": given.training.model_dump() | training,
                "engine": {"threads": 2},
            }
        )
        trained(full, tmp_path / name, rows)
    one, two = tmp_path / "one" / "out", tmp_path / "two" / "out"
    if parallel == "ddp":
        assert tree_hash(one) == tree_hash(two)
    else:
        assert distance(one, two) < 1e-5


# -- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_in_one_process_stops_both_and_publishes_nothing(
    folder: Path, tmp_path: Path
) -> None:
    given = config(folder, objective="NotANumber", processes=2)
    with pytest.raises(NotFinite, match=r"The gradient of step 4 must be finite; got nan\. Nothing was published"):
        trained(given, tmp_path, folder / "21.parquet")
    assert not (tmp_path / "out").exists()


def test_a_killed_process_is_named_and_the_training_goes_on_from_its_checkpoint(
    folder: Path, tmp_path: Path, whole: Any
) -> None:
    given = config(folder, objective="Killed", processes=2)
    with pytest.raises(EngineError, match=r"process 1 was ended by signal 9 \(SIGKILL\). Run the same command again"):
        trained(given, tmp_path, folder / "21.parquet")
    assert not (tmp_path / "out").exists()
    report, notes = trained(given, tmp_path, folder / "21.parquet")
    assert notes == ("training was taken up after step 3 of 6",)
    assert tree_hash(tmp_path / "out") == tree_hash(whole["ddp"][0])
    assert report == whole["ddp"][1]


def test_a_stop_is_met_by_all_processes_at_one_step_and_shards_are_taken_up_exactly(
    folder: Path, tmp_path: Path, whole: Any
) -> None:
    given = config(folder, processes=2, parallel="fsdp", num_train_epochs=200, save_steps=None)

    def stop(done: int, of: int) -> None:
        if done >= 2:
            interruption.ask_to_stop()

    try:
        with pytest.raises(KeyboardInterrupt):
            trained(given, tmp_path, folder / "21.parquet", stop)
    finally:
        interruption.forget()
    (checkpoint,) = (tmp_path / "train").glob("checkpoint-*")
    files = {path.name for path in checkpoint.iterdir()}
    assert {"MANIFEST.json", "weights-0.safetensors", "weights-1.safetensors", "optimizer-1.pt"} < files
    assert files.isdisjoint({"weights.safetensors", "optimizer.pt"})
    # Another schedule is another training. One that was interrupted before its result was recorded is taken up.
    given = config(folder, processes=2, parallel="fsdp")
    trained(given, tmp_path, folder / "21.parquet")
    (tmp_path / "out").rename(tmp_path / "first")
    report, notes = trained(given, tmp_path, folder / "21.parquet")
    assert "training was taken up after step 5 of 6" in notes
    assert tree_hash(tmp_path / "out") == tree_hash(tmp_path / "first") == tree_hash(whole["fsdp"][0])
    assert report == whole["fsdp"][1]
    # One process cannot take up what two have begun, and says so.
    _, notes = trained(config(folder), tmp_path, folder / "21.parquet")
    assert "checkpoint-5 is of other processes and was not used" in notes
    assert tree_hash(tmp_path / "out") == tree_hash(whole["one"][0])


def test_where_memory_runs_out_in_one_process_all_start_again_in_smaller_batches(folder: Path, tmp_path: Path) -> None:
    report, _ = trained(config(folder, objective="TooLarge", processes=2), tmp_path, folder / "21.parquet")
    assert report.steps == 6
    assert (report.details["micro_batch"], report.details["gradient_accumulation_steps"]) == (2, 2)
    assert report.details["out_of_memory_at"] == [4]


def children_of(process: psutil.Process, words: str) -> list[psutil.Process]:
    return [child for child in process.children(recursive=True) if words in " ".join(child.cmdline())]


def test_no_process_outlives_the_one_that_started_it(folder: Path, tmp_path: Path) -> None:
    code = f"""
        from pathlib import Path
        from tests.runs.test_processes import config, trained
        folder, root = Path({str(folder)!r}), Path({str(tmp_path)!r})
        trained(config(folder, processes=2, num_train_epochs=100000), root, folder / "21.parquet")
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(REPOSITORY), *sys.path)))}
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], env=environment)
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("train/checkpoint-*/MANIFEST.json")):
            assert parent.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        everyone = psutil.Process(parent.pid).children(recursive=True)
        assert len(children_of(psutil.Process(parent.pid), "raftune.runtime.rank")) >= 2
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert psutil.wait_procs(everyone, timeout=20)[1] == []


# -- a user's launcher -----------------------------------------------------------------------------------------------


def launch(*command: str) -> subprocess.CompletedProcess[str]:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--no-python")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(REPOSITORY), *sys.path)))}
    return subprocess.run([*launcher, *command], env=environment, capture_output=True, text=True, timeout=200)


def test_under_torchrun_the_same_command_trains_on_its_processes(folder: Path, tmp_path: Path) -> None:
    """As with `training.processes: 2`, bit for bit."""
    file = tmp_path / "run.yaml"
    content: dict[str, Any] = config(folder, save_steps=None).model_dump(mode="json", exclude_unset=True)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"say {word}"}) + "\n" for word in "abcdefgh"))
    content |= {"data": {"prompts": str(prompts)}, "num_rounds": 1, "prompts_per_round": 8, "report": False}
    content |= {"sampling": {"num_generations": 2, "max_completion_length": 6}, "evaluation": {"num_prompts": 0}}
    content |= {
        "rewards": {"reward_funcs": [{"spec": "length", "options": {"target": 20}}]},
        "selection": {"all_equal": "keep"},
    }
    file.write_text(yaml.safe_dump(content))
    raftune = (sys.executable, "-m", "raftune", "train", str(file), "--output-dir")
    done = launch(*raftune, str(tmp_path / "launched"), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rounds"] == 1  # one of them speaks
    started = subprocess.run(
        [*raftune, str(tmp_path / "started"), "--training.processes", "2"], capture_output=True, timeout=200
    )
    assert started.returncode == 0, started.stderr
    models = [tmp_path / name / "round-0001" / "model" for name in ("launched", "started")]
    assert tree_hash(models[0]) == tree_hash(models[1])
    # Processes that were given different commands.
    shell = f"exec {' '.join(raftune)} {tmp_path / 'other'} --training.learning_rate 0.00$((1 + RANK))"
    refused = launch("sh", "-c", shell)
    assert refused.returncode != 0
    words = "training.learning_rate is 0.001 for process 0 and 0.002 for process 1. Give the same command everywhere."
    assert " ".join(refused.stderr.split()).count(words) == 1
    assert not (tmp_path / "other").exists()
