"""A prompt that a language model cannot take is named by its row before anything is generated, or left out on
record.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from raftune.config import validate
from raftune.errors import ConfigError, DataError
from raftune.planning import forecast
from raftune.records import Prompt
from raftune.runtime.assembly import PythonObjects
from raftune.runtime.run import resume, run
from raftune.stages.prompt_check import check_prompts, unlike_starter
from tests.builders import save_tiny
from tests.runs import tiny
from tests.runs.test_causal_lm_runs import config, tree

LONG = "a b " * 80  # beyond the context of 128 tokens
SENT = [{"role": "user", "content": "x"}]
TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('no is no answer') }}{% endif %}"
    "{{ m.content }}</s>{% endfor %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("models") / "llama", "llama", chat=True)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "teacher", "gpt2", seed=3)


def settings(folder: Path, model: Path, prompts: list[Any], **changes: Any) -> dict[str, Any]:
    rows = [prompt if isinstance(prompt, dict) else {"prompt": prompt} for prompt in prompts]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = {"num_rounds": 2, "prompts_per_round": 2, "data": {"prompts": str(folder / "rows.jsonl")}}
    return config(folder / "run", model, **(base | {"evaluation": {"num_prompts": 0}} | changes))


LENGTH = {"reward_funcs": [{"spec": "length", "options": {"target": 5}}]}
OBJECTS = PythonObjects(rewards=[lambda completions, **columns: [-float(len(str(c))) for c in completions]])


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["a", "b", LONG, "c", LONG], r"2 of 5 prompts cannot be used \(row 3 of data\.prompts, row 5 .*128\)\."),
        ([SENT, SENT, [{"role": "user", "content": "no"}]], r"1 of 3 .*row 3 .*template refused .* no is no answer"),
        (["a", {"prompt": "b", "gold": LONG}], r"1 of 2 .*row 2 .*A completion must fit the model's context"),
    ],
)
def test_a_prompt_of_a_later_round_is_refused_before_generation(
    tmp_path: Path, model: Path, prompts: list[Any], message: str
) -> None:
    gold = any(isinstance(prompt, dict) for prompt in prompts)
    prompts = [
        prompt if not gold or isinstance(prompt, dict) else {"prompt": prompt, "gold": "x"} for prompt in prompts
    ]
    given = settings(tmp_path, model, prompts, sampling={"candidate_columns": ["gold"]} if gold else {})
    with pytest.raises(DataError, match=message) as caught:
        run(given, OBJECTS)
    assert "sampling.unusable_prompts: drop" in str(caught.value)
    assert not sorted((tmp_path / "run").rglob("chunk-*.parquet"))
    with pytest.raises(DataError, match=message):
        forecast(validate(given | {"rewards": LENGTH}))


def test_what_is_left_out_is_on_record_and_never_asked(tmp_path: Path, model: Path) -> None:
    given = settings(tmp_path, model, [LONG, "a", "b", LONG, "c"], num_rounds=3)
    with pytest.raises(DataError):
        run(given, OBJECTS)
    given["sampling"] = {**given["sampling"], "unusable_prompts": "drop"}
    notes: list[str] = []
    run(given, OBJECTS, observe=lambda kind, facts: notes.extend(facts.get("notes", [])))
    assert any("2 of 5 prompts cannot be used (row 1 of data.prompts, row 4" in note for note in notes)
    left_out = json.loads((tmp_path / "run/round-0000/prompts/left_out.json").read_text())
    assert [entry["row"] for entry in left_out.values()] == ["row 1 of data.prompts", "row 4 of data.prompts"]
    asked = [
        prompt
        for round_ in (1, 2, 3)
        for prompt in pq.read_table(tmp_path / f"run/round-000{round_}/plan/prompts.parquet")
        .column("prompt")
        .to_pylist()
    ]
    assert len(asked) == 6 and {*asked} == {"a", "b", "c"}
    whole = tree(tmp_path / "run")
    resume(tmp_path / "run", OBJECTS)
    assert tree(tmp_path / "run") == whole


def test_held_out_prompts_are_left_out_too_and_one_kind_must_remain(tmp_path: Path, model: Path) -> None:
    (tmp_path / "held.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("x", LONG)))
    drop = {"sampling": {"unusable_prompts": "drop"}}
    held_out = {"prompts": str(tmp_path / "held.jsonl"), "num_prompts": 2, "num_generations": 1}
    run(settings(tmp_path, model, ["a", "b"], **drop, evaluation=held_out, num_rounds=0), OBJECTS)
    planned = pq.read_table(tmp_path / "run/round-0000/evaluate/plan/prompts.parquet")
    assert planned.column("prompt").to_pylist() == ["x"]
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"2 of 2 prompts cannot be used .* None is left of the train prompts"):
        run(settings(tmp_path / "none", model, [LONG, LONG], **drop), OBJECTS)
    beside = {"rewards": LENGTH, "output_dir": str(tmp_path / "new")}
    plan = forecast(validate(settings(tmp_path, model, ["a", "b", LONG], **drop, **beside)))
    assert plan.prompts.train == 2 and any("left out: 1 of 3" in note for note in plan.notes)


def test_a_teacher_is_asked_too(tmp_path: Path, model: Path, longer: Path) -> None:
    given = settings(tmp_path, model, ["a", SENT], sampling={"teacher": {"model": str(longer), "num_generations": 1}})
    with pytest.raises(DataError, match=r"1 of 2 .*row 2 .*The teacher: A prompt given as messages needs a tokenizer"):
        run(given, OBJECTS)


def test_a_family_that_cannot_be_asked_refuses_to_leave_out(tmp_path: Path) -> None:
    given = tiny.config(tmp_path / "run", sampling={"unusable_prompts": "drop"})
    with pytest.raises(ConfigError, match=r"sampling\.unusable_prompts must be refuse for a family .* tabular"):
        run(given, tiny.objects())


def test_prompts_that_the_bundled_model_was_not_trained_on_are_counted() -> None:
    prompts = [Prompt("1", "User: hello\nAssistant:"), Prompt("2", "hello"), Prompt("3", SENT)]
    [note] = unlike_starter(check_prompts(prompts, []))
    assert note.startswith("2 of 3 prompts are not of the form") and "'hello'" in note
    assert unlike_starter(check_prompts(prompts[:1], [])) == ()
