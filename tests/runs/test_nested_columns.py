"""Nested columns through a whole run: templates, rewards here, hosted and behind http, records, exports and the page
see exactly what the file says.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import datasets
import httpx2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raftune.results.export import export
from raftune.results.samples import training_chunks
from raftune.runtime.assembly import PythonObjects
from raftune.runtime.run import run
from raftune.store.run import RunFolder
from raftune.trainer import RaftConfig, RaftTrainer
from tests.builders import save_tiny, tiny_model, tiny_tokenizer
from tests.runs.http_judge import judging

CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"z": 1}}}]}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if 'tool_calls' in m %}{{ m.tool_calls | tojson }}"
    "{% endif %}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ROWS: list[dict[str, Any]] = [
    {"prompt": [{"role": "user", "content": "a"}], "facts": {"city": "Paris"}, "odd": [1, {"b": None}]},
    {"prompt": [{"role": "user", "content": "b"}, CALL, {"role": "tool", "content": "7"}], "facts": {"code": 7}},
    {"prompt": [{"role": "user", "content": "c"}], "facts": {}, "odd": "text"},
]
HOSTED = """
    import json

    def hosted(prompts, completions, facts, odd, **columns):
        with open({path!r}, "a") as file:
            for row in zip(prompts, facts, odd):
                file.write(json.dumps(row) + "\\n")
        return [float(len(completion[0]["content"])) for completion in completions]
"""


def as_json(rows: Any) -> set[str]:
    return {json.dumps(row) for row in rows}


EXPECTED = as_json((row["prompt"], row["facts"], row.get("odd")) for row in ROWS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("models") / "llama", "llama", chat=True)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: Path) -> dict[str, Any]:
    """A finished run over a file of nested rows, and what each kind of reward was asked."""
    folder = tmp_path_factory.mktemp("nested")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "judge.py").write_text(textwrap.dedent(HOSTED).format(path=str(folder / "hosted.jsonl")))
    here: list[Any] = []

    def reward(prompts: Any, completions: Any, facts: Any, odd: Any, **columns: Any) -> list[float]:
        here.extend(zip(prompts, facts, odd, strict=True))
        return [float(len(completion[0]["content"])) for completion in completions]

    with judging() as address:
        specs = [f"{folder / 'judge.py'}:hosted", {"spec": "http", "options": {"url": f"{address}/words"}}]
        settings: dict[str, Any] = {
            "output_dir": str(folder / "run"),
            "num_rounds": 1,
            "prompts_per_round": 3,
            "data": {"prompts": str(folder / "rows.jsonl")},
            "policy": {"model": str(model)},
            "rewards": {"reward_funcs": specs},
            "sampling": {"num_generations": 2, "chunk_size": 2, "max_completion_length": 4},
            "training": {"per_device_train_batch_size": 2, "num_train_epochs": 1},
            "evaluation": {"num_prompts": 0},
            "engine": {"threads": 1},
        }
        run(settings, PythonObjects(rewards=[reward]))
        behind = httpx2.get(f"{address}/seen", trust_env=False).json()
    asked = [
        row for body in behind for row in zip(body["prompts"], *map(body["columns"].get, ("facts", "odd")), strict=True)
    ]
    hosted = [json.loads(line) for line in (folder / "hosted.jsonl").read_text().splitlines()]
    return {"root": folder / "run", "here": here, "hosted": hosted, "http": asked}


@pytest.mark.parametrize("place", ["here", "hosted", "http"])
def test_a_reward_is_asked_with_the_rows_of_the_file(whole: dict[str, Any], place: str) -> None:
    assert as_json(whole[place]) == EXPECTED


def test_the_records_and_what_is_learned_from_hold_the_messages_of_the_file(whole: dict[str, Any]) -> None:
    run_ = RunFolder(whole["root"])
    prompts = {json.dumps(row["prompt"]) for row in ROWS}
    samples = [sample for chunk in training_chunks(run_, 1) for sample in chunk]
    assert {json.dumps(sample["prompt"]) for sample in samples} == prompts
    rows = pq.read_table(run_.folder(1, "rows") / "rows.parquet").to_pylist()
    assert {json.dumps(row["prompt"]) for row in rows} == prompts


def test_a_reader_that_knows_nothing_of_us_finds_json_text(whole: dict[str, Any]) -> None:
    path = RunFolder(whole["root"]).folder(0, "data") / "train.parquet"
    assert json.loads(pq.read_table(path).column("facts").cast(pa.string())[0].as_py()) in [r["facts"] for r in ROWS]


def test_exports_hold_the_messages_of_the_file(whole: dict[str, Any], tmp_path: Path) -> None:
    prompts = {json.dumps(row["prompt"]) for row in ROWS}
    for name in ("a.jsonl", "a.parquet", "folder"):
        assert export(whole["root"], "sft", tmp_path / name) == 3
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert {json.dumps(line["prompt"]) for line in lines} == prompts
    loaded = datasets.load_from_disk(str(tmp_path / "folder"))
    assert {json.dumps(row["prompt"]) for row in loaded} == prompts
    loaded = datasets.Dataset.from_parquet(str(tmp_path / "a.parquet"), cache_dir=str(tmp_path))
    assert {json.dumps(row["prompt"]) for row in loaded} == prompts


def test_the_page_shows_them(whole: dict[str, Any]) -> None:
    assert "tool_calls" in (whole["root"] / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["rows", "json"])
def test_a_trainer_s_data_set_reaches_rewards_as_it_was_given(form: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = TEMPLATE
    given = ROWS if form == "rows" else datasets.Dataset.from_list(ROWS, on_mixed_types="use_json")
    seen: list[Any] = []

    def reward(prompts: Any, completions: Any, facts: Any, odd: Any, **columns: Any) -> list[float]:
        seen.extend(zip(prompts, facts, odd, strict=True))
        return [float(len(completion[0]["content"])) for completion in completions]

    args = RaftConfig(
        output_dir=str(tmp_path / "run"),
        num_rounds=1,
        prompts_per_round=3,
        num_generations=2,
        max_completion_length=4,
        report_to="none",
        run_config={"evaluation.num_prompts": 0, "engine.threads": 1, "report": False},
    )
    trainer = RaftTrainer(
        model=tiny_model("llama"), reward_funcs=reward, args=args, train_dataset=given, processing_class=tokenizer
    )
    trainer.train()
    assert as_json(seen) == EXPECTED
