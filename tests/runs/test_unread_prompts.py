"""Prompts that a model cannot read are refused before anything is generated, by their row; what is cut is said once."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from raftune.config import RunConfig, validate
from raftune.errors import DataError
from raftune.records import Prompt
from raftune.runtime.progress import Progress
from raftune.runtime.run import run
from tests.pipelines import save_tiny
from tests.runs.image_family import SketchFamily

READ = 12  # letters that the family below reads
LONG = "a red disc on a blue ground"


class Reading(SketchFamily):
    """Sketches of texts, of which it reads the first twelve letters."""

    def unread(self, prompt: Prompt) -> str | None:
        if not isinstance(prompt.content, str):
            raise DataError(f"a sketch is of a text; got {prompt.content!r}. Write one.")
        return prompt.content[READ:] or None


def saved(path: Path, prompts: list[Any]) -> str:
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return str(path)


def config(root: Path, prompts: str, **changes: Any) -> RunConfig:
    base: dict[str, Any] = {
        "output_dir": str(root),
        "num_rounds": 2,
        "report": False,
        "data": {"prompts": prompts},
        "policy": {"family": "tests.runs.test_unread_prompts:Reading", "options": {"size": 16}},
        "sampling": {"num_generations": 2},
        "rewards": {"reward_funcs": ["tests.runs.image_family:saturation"]},
        "evaluation": {"num_prompts": 0},
        "engine": {"threads": 1},
    }
    return validate(base | changes)


def sample_files(root: Path) -> list[Path]:
    return sorted(root.rglob("chunk-*.parquet"))


def printed_by(settings: RunConfig, redo: str | None = None) -> str:
    console = Console(file=io.StringIO(), width=300, highlight=False)
    with Progress(console) as progress:
        run(settings, observe=progress, redo=redo)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_prompt_that_cannot_be_read_is_refused_with_its_row_before_generation(tmp_path: Path) -> None:
    data = saved(tmp_path / "prompts.jsonl", [1, 2, 3, 4, 5])
    with pytest.raises(DataError, match=r"5 of 5 prompts cannot be used \(row 1 of data\.prompts, row 2 .* and 2 more"):
        run(config(tmp_path / "run", data))
    assert not sample_files(tmp_path / "run")


def test_held_out_prompts_and_those_to_learn_from_are_distinguished(tmp_path: Path) -> None:
    data, held_out = saved(tmp_path / "a.jsonl", ["a disc", "a ring"]), saved(tmp_path / "b.jsonl", [7, 8])
    settings = config(tmp_path / "run", data, evaluation={"prompts": held_out, "num_prompts": 2})
    with pytest.raises(DataError, match=r"2 of 4 .*row 1 of evaluation\.prompts, row 2 .* of a text; got 7"):
        run(settings)
    assert not sample_files(tmp_path / "run")


@pytest.mark.slow
def test_the_fixed_data_go_on_as_the_message_says(tmp_path: Path) -> None:
    data = saved(tmp_path / "prompts.jsonl", [1, 2])
    with pytest.raises(DataError, match=r"Then add `--from data`"):
        run(config(tmp_path / "run", data))
    saved(tmp_path / "prompts.jsonl", ["a disc", "a ring"])
    assert run(config(tmp_path / "run", data), redo="data").rounds == 2


@pytest.mark.slow
def test_a_row_is_named_though_its_data_set_has_gone_since(tmp_path: Path) -> None:
    data = saved(tmp_path / "prompts.jsonl", [1, 2])
    with pytest.raises(DataError, match="row 1 of data"):
        run(config(tmp_path / "run", data))
    Path(data).unlink()
    with pytest.raises(DataError, match=r"2 of 2 prompts cannot be used \(prompt \w+-0, prompt \w+-0\): a sketch"):
        run(config(tmp_path / "run", data))


def test_prompts_that_are_cut_are_counted_once_in_a_run_with_what_is_not_seen(tmp_path: Path) -> None:
    data = saved(tmp_path / "prompts.jsonl", ["a disc", LONG, "a ring", f"{LONG} again"] * 3)
    said = printed_by(config(tmp_path / "run", data))
    assert said.count("longer than what the model reads") == 1
    assert (
        "6 of 12 prompts are longer than what the model reads; what follows is not seen: 'n a blue ground' of" in said
    )
    unread = json.loads((tmp_path / "run/round-0000/prompts/unread.json").read_text())
    assert len(unread) == 6 and set(unread.values()) == {LONG[READ:], f"{LONG} again"[READ:]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "prompts", "message"),
    [
        ("sd", [3, 5], r"2 of 2 prompts .*row 1 of data\.prompts.*must be texts; got 3"),
        ("dit", ["a disc", "7"], r"must be class labels, .* from 0 to 999; got 'a disc'"),
        ("dit", [3, 1000, 5, -1], r"2 of 4 prompts .*row 2 of data\.prompts, row 4 of data\.prompts\).*got 1000"),
    ],
)
def test_pipelines_say_what_they_are_asked_for(tmp_path: Path, kind: Any, prompts: list[Any], message: str) -> None:
    policy = {"family": "diffusion", "model": str(save_tiny(kind, tmp_path / "model")), "device": "cpu"}
    size = {} if kind == "dit" else {"height": 16, "width": 16}
    sampling = {"num_generations": 2, "diffusion": {"num_inference_steps": 1, "guidance_scale": 1.0, **size}}
    data = saved(tmp_path / "prompts.jsonl", prompts)
    with pytest.raises(DataError, match=message):
        run(config(tmp_path / "run", data, policy=policy, sampling=sampling))
    assert not sample_files(tmp_path / "run")


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["a disc", "a ring", 5, 6], r"the column 'prompt' must hold values of one kind; row 3 holds 5, unlike those"),
        ([1, 2, 3, "a disc"], r"row 4 holds 'a disc'"),
        ([1, 2**70], r"row 2 holds 1180591620717411303424"),
        (["a disc", None], r"the prompt in row 2 must be text, messages or a class label; got nothing"),
        (["a disc", " "], r"the prompt in row 2 must not be empty"),
    ],
)
def test_a_row_that_holds_no_prompt_is_named(tmp_path: Path, prompts: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        run(config(tmp_path / "run", saved(tmp_path / "prompts.jsonl", prompts)))
