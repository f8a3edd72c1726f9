"""Code in pickled weights, tokenizers and checkpoints never runs: each is read as plain tensors, or refused by name."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification

from raftune.cli import main
from raftune.config.load import validate_as
from raftune.config.sft import SftConfig
from raftune.policies.causal_lm.loading import fingerprint
from raftune.runtime.assembly import PythonObjects
from raftune.runtime.run import run
from raftune.sft import sft
from raftune.store import partial
from raftune.store.commit import FileEntry, Manifest
from raftune.training import checkpoints
from raftune.training.quiet import quiet
from tests.builders import save_backbone, save_tiny
from tests.unit.reward_models.feedback_files import config_for, marked, train, write

pytestmark = pytest.mark.slow

RAN = "the-pickle-ran"


class MaliciousPickle:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder / RAN),)


def malicious_file(path: Path, folder: Path, *, zipped: bool = True) -> Path:
    """Writes the pickle as torch does, or bare."""
    if zipped:
        torch.save({"lm_head.weight": MaliciousPickle(folder)}, path)
    else:
        path.write_bytes(pickle.dumps({"lm_head.weight": MaliciousPickle(folder)}))
    return path


def pickled(folder: Path, place: Path, *, zipped: bool = True) -> Path:
    """The model folder with the pickle in place of its weights."""
    for path in folder.glob("*.safetensors"):
        path.unlink()
    malicious_file(folder / "pytorch_model.bin", place, zipped=zipped)
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder; whatever a test did, no pickle ran in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"prompt": f"say {c}"}) + "\n" for c in "abcdef"))
    yield tmp_path
    assert not (tmp_path / RAN).exists()


def refused(capsys: pytest.CaptureFixture[str], command: list[str], *words: str) -> None:
    code = main(command)
    said = capsys.readouterr()
    assert code in (1, 2), (command, said)
    assert "a bug" not in said.err and "Traceback" not in said.err, (command, said.err)
    for word in words:
        assert word in said.err, (command, said.err)


def test_the_pickle_of_these_tests_does_run_where_it_is_trusted(tmp_path: Path) -> None:
    torch.load(malicious_file(tmp_path / "x.bin", tmp_path), weights_only=False)
    assert (tmp_path / RAN).is_dir()


def config(**changes: Any) -> dict[str, Any]:
    return {
        "num_rounds": 1,
        "prompts_per_round": 2,
        "data": {"prompts": "train.jsonl"},
        "policy": {"model": "model", "device": "cpu"},
        "selection": {"all_equal": "keep"},
        "sampling": {"num_generations": 2, "max_completion_length": 4},
        "rewards": {"reward_funcs": [{"spec": "length", "options": {"target": 3, "unit": "characters"}}]},
        "training": {"max_steps": 1},
        "evaluation": {"num_prompts": 2, "num_generations": 1},
        "engine": {"threads": 1},
        "report": False,
        **changes,
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_a_policy_of_pickled_weights_with_code_is_refused_by_every_command(
    place: Path, capsys: pytest.CaptureFixture[str], zipped: bool
) -> None:
    pickled(save_tiny(place / "model"), place, zipped=zipped)
    write(place / "sft.jsonl", [{"prompt": f"ask {i}", "completion": "cab"} for i in range(4)])
    Path("run.yaml").write_text(yaml.safe_dump(config()))
    named = ("pickled", "run code")
    refused(capsys, ["train", "run.yaml", "--output-dir", "run"], *named)
    refused(capsys, ["plan", "run.yaml", "--output-dir", "plan"], *named)
    refused(capsys, ["sft", "sft.jsonl", "--policy.model", "model", "--output-dir", "sft"], *named)
    refused(capsys, ["evaluate", "model", "--prompts", "train.jsonl", "--output-dir", "measured"])


@pytest.mark.parametrize("kind", ["bare", "beside an index", "adapter"])
def test_an_adapter_or_shards_of_pickles_with_code_are_refused(
    place: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    model = save_tiny(place / "model")
    Path("run.yaml").write_text(yaml.safe_dump(config(policy={"model": "given", "device": "cpu"})))
    given = place / "given"
    if kind == "adapter":
        given.mkdir()
        adapter = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(model), "r": 2}
        (given / "adapter_config.json").write_text(json.dumps({**adapter, "target_modules": ["q_proj"]}))
        malicious_file(given / "adapter_model.bin", place)
    else:
        shutil.copytree(model, given)
        (given / "model.safetensors").unlink()
        malicious_file(given / "pytorch_model-00001-of-00001.bin", place)
        if kind == "beside an index":
            index = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model-00001-of-00001.bin"}}
            (given / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    refused(capsys, ["train", "run.yaml", "--output-dir", "run"])


def test_a_reward_model_of_pickled_weights_with_code_is_refused_by_every_command(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(place / "model")
    judge = save_backbone(place / "judge", "llama")
    with quiet():
        AutoModelForSequenceClassification.from_pretrained(judge, num_labels=1).save_pretrained(judge)
    pickled(judge, place)
    Path("run.yaml").write_text(yaml.safe_dump(config(rewards={"reward_funcs": ["./judge"], "device": "cpu"})))
    write(place / "marked.jsonl", marked(8))
    named = ("pickled", "run code")
    refused(capsys, ["reward", "score", "judge", "marked.jsonl", "--device", "cpu"], *named)
    refused(capsys, ["train", "run.yaml", "--output-dir", "run"], *named)
    refused(capsys, ["plan", "run.yaml", "--output-dir", "plan"], *named)
    refused(capsys, ["reward", "train", "marked.jsonl", "--model", "judge", "--output-dir", "rm"], *named)


def test_plain_pickled_weights_are_read(place: Path) -> None:
    """Many models have no other file: tensors alone run no code."""
    model = save_tiny(place / "model")
    from safetensors.torch import load_file

    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    Path("run.yaml").write_text(yaml.safe_dump(config()))
    assert main(["train", "run.yaml", "--output-dir", "run"]) == 0


# -- a run in other hands ----------------------------------------------------------------------------------------------


READERS: dict[str, list[str]] = {
    "resume": ["resume", "run", "--num-rounds", "2"],
    "redo": ["resume", "run", "--from", "1/evaluate"],
    "verify": ["verify", "run"],
    "export model": ["export", "run", "--format", "model", "--round", "1", "--out", "out"],
    "export sft": ["export", "run", "--format", "sft", "--out", "out.jsonl"],
    "evaluate": ["evaluate", "run@1", "--output-dir", "out"],
    "evaluate start": ["evaluate", "run@0", "--output-dir", "out"],
    "report": ["report", "run"],
    "compare": ["compare", "run", "other"],
    "rescore": ["rescore", "run", "--rewards.reward_funcs", "length", "--rewards.timeout", "9"],
    "select": ["select", "run", "--selection.rule", "top_m", "--selection.m", "1"],
    "samples": ["samples", "run"],
    "alarms": ["alarms", "run"],
    "runs": ["runs"],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    save_tiny(folder / "model")
    prompts = {"train": lambda: table("abcdef"), "held_out": lambda: table("gh")}
    policy = {"model": str(folder / "model"), "device": "cpu"}
    run(config(output_dir=str(folder / "run"), data={"prompts": "objects"}, policy=policy), PythonObjects(**prompts))
    return folder


def table(letters: str) -> Any:
    import pyarrow as pa

    return pa.table({"prompt": [f"say {c}" for c in letters]})


def plant_beside(root: Path, place: Path) -> None:
    """Pickles beside the weights of each round."""
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "weights.pkl"):
        malicious_file(root / "round-0001/model" / name, place)


def plant_instead(root: Path, place: Path) -> None:
    """A pickle in place of the trained weights, under a COMMIT that lists it."""
    rewrite_manifest(pickled(root / "round-0001/model", place), root)


def plant_start(root: Path, place: Path) -> None:
    """A pickle as the start model, under a reference and a COMMIT that agree with it."""
    start = root / "round-0000/model"
    base = pickled(save_tiny(place / "smuggled"), place)
    reference = {"name": str(base), "revision": None, "fingerprint": fingerprint(base)}
    (start / "reference.json").write_text(json.dumps(reference))
    rewrite_manifest(start, root)
    rewrite_manifest(pickled(root / "round-0001/model", place), root)


def plant_unfinished(root: Path, place: Path) -> None:
    """Pickles where an interrupted stage keeps what it has done."""
    for path in [path for path in root.rglob("*") if path.is_dir()]:
        malicious_file(path / "_part-chunk-00000-generate-0-0", place)
        malicious_file(path / "optimizer.pt", place)


def rewrite_manifest(folder: Path, root: Path) -> None:
    commit = Manifest.load(folder)
    assert commit is not None
    names = [path.name for path in folder.iterdir() if path.is_file() and path.name != "_COMMIT.json"]
    replace(commit, files={name: FileEntry.of(folder / name) for name in names}).save(folder, root / "tmp")


@pytest.mark.parametrize("smuggle", [plant_beside, plant_instead, plant_start, plant_unfinished])
def test_no_command_runs_a_pickle_in_a_run(
    place: Path, whole: Path, capsys: pytest.CaptureFixture[str], smuggle: Callable[[Path, Path], None]
) -> None:
    shutil.copytree(whole / "run", "other")
    ended = {}
    for name, command in READERS.items():
        for path in ("run", "out", "smuggled"):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(whole / "run", "run")
        smuggle(Path("run"), place)
        ended[name] = main(command)
        said = capsys.readouterr().err
        assert not Path(RAN).exists(), name
        assert "a bug" not in said and "Traceback" not in said, (name, said)
    if smuggle is not plant_unfinished:
        assert {ended[name] for name in ("resume", "verify", "evaluate")} <= {1, 2}, ended


# -- checkpoints -------------------------------------------------------------------------------------------------------


def poison(work: Path, place: Path, names: tuple[str, ...]) -> None:
    """Puts the pickle into the newest checkpoint, sealed again where it was sealed."""
    newest = max(work.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for name in names:
        malicious_file(newest / name, place)
    if (newest / checkpoints.MANIFEST).is_file():
        checkpoints.seal(newest, json.loads((newest / checkpoints.MANIFEST).read_text())["identity"])


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_fit_goes_on_from_no_checkpoint_that_holds_code(
    place: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(partial, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(partial, "SHARE", 1e9)
    rows = write(place / "rows.jsonl", [{"prompt": f"ask {i % 3}", "completion": f"cab {i}"} for i in range(12)])
    given = {
        "threads": 1,
        "data": {"path": str(rows)},
        "policy": {"model": str(save_tiny(place / "model")), "device": "cpu"},
        "training": {"per_device_train_batch_size": 2, "max_steps": 4, "save_steps": 1},
    }

    def learned(root: str, stop: bool = False) -> bytes:
        def observe(kind: str, facts: dict[str, Any]) -> None:
            if stop and any((place / root).rglob("checkpoint-2/MANIFEST.json")):
                raise KeyboardInterrupt

        folder = sft(validate_as(SftConfig, {"output_dir": str(place / root), **given}), observe).root
        return (folder / "model/model.safetensors").read_bytes()

    with pytest.raises(KeyboardInterrupt):
        learned("poisoned", stop=True)
    [work] = {path.parent for path in (place / "poisoned").rglob("checkpoint-*")}
    poison(work, place, (name,))
    assert learned("poisoned") == learned("clean")


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_reward_model_goes_on_from_no_checkpoint_that_holds_code(place: Path, name: str) -> None:
    data, model = write(place / "marked.jsonl", marked(16)), save_tiny(place / "model")

    def trained(root: str, stop: bool = False) -> bytes:
        def observe(kind: str, facts: dict[str, Any]) -> None:
            if stop and any((place / root).rglob("checkpoint-2/MANIFEST.json")):
                raise KeyboardInterrupt

        made = train(config_for(data, model, place / root, max_steps=4, allow_chance=True, save_steps=1), observe)
        return (made.root / "model/model.safetensors").read_bytes()

    with pytest.raises(KeyboardInterrupt):
        trained("poisoned", stop=True)
    [work] = {path.parent for path in (place / "poisoned").rglob("checkpoint-*")}
    poison(work, place, (name,))
    assert trained("poisoned") == trained("clean")
