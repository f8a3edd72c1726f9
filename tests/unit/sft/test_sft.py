"""Claims about supervised fine-tuning: what is learned from, that it is learned, and that a kill changes nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from raftune.cli import main
from raftune.config.load import validate_as
from raftune.config.sft import SftConfig
from raftune.errors import ConfigChanged, ConfigError, DataError, ModelError, StoreError
from raftune.policies.causal_lm import CausalLM
from raftune.sft import SftOutcome, sft
from raftune.sft.work import as_run
from raftune.store import interruption, partial
from raftune.training.quiet import quiet
from tests.builders import EOS, Killed, save_tiny, tiny_tokenizer, tree_hash
from tests.hh import write_hh

ANSWERS = [{"prompt": f"ask {i % 12} ", "chosen": f"the cab {i % 3}", "rejected": "a bath"} for i in range(40)]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "llama", chat=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "prefs.jsonl", ANSWERS)


def config(root: Path, model: Path | str, source: Path | str, **changes: Any) -> SftConfig:
    training = {"learning_rate": 1e-2, "per_device_train_batch_size": 4, "save_steps": 2, **changes.pop("training", {})}
    policy = {"model": str(model), "device": "cpu", **changes.pop("policy", {})}
    data_ = {"path": str(source), "held_out_fraction": 0.2, **changes.pop("data", {})}
    whole = {"output_dir": str(root), "threads": 1, "data": data_, "policy": policy, "training": training, **changes}
    return validate_as(SftConfig, whole)


def rows_of(root: Path, name: str = "rows.parquet") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(root / name).to_pylist()
    return rows


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: Path, data: Path) -> SftOutcome:
    """A fine-tuning that nobody interrupted."""
    return sft(config(tmp_path_factory.mktemp("sft") / "whole", model, data))


def test_the_preferred_completions_are_learned_and_held_out_perplexity_falls(whole: SftOutcome) -> None:
    learned = rows_of(whole.root)
    assert {row["completion"] for row in learned} == {"the cab 0", "the cab 1", "the cab 2"}
    assert whole.worked
    assert whole.report["perplexity"]["after"] < 0.8 * whole.report["perplexity"]["before"]
    assert whole.report["training"]["steps"] == -(-len(learned) // 4)


def test_a_prompt_is_learned_from_or_held_out_and_never_both(whole: SftOutcome) -> None:
    learned, held_out = (
        {row["prompt"] for row in rows_of(whole.root, n)} for n in ("rows.parquet", "held_out.parquet")
    )
    assert len(learned) == 10 and len(held_out) == 2  # a fifth of twelve different prompts
    assert not learned & held_out
    assert len(rows_of(whole.root)) + len(rows_of(whole.root, "held_out.parquet")) == len(ANSWERS)


def test_which_prompts_are_held_out_does_not_depend_on_the_order_of_rows(
    tmp_path: Path, model: Path, whole: SftOutcome
) -> None:
    again = sft(config(tmp_path / "sft", model, write(tmp_path / "other.jsonl", ANSWERS[::-1])))
    assert {r["prompt"] for r in rows_of(again.root, "held_out.parquet")} == {
        r["prompt"] for r in rows_of(whole.root, "held_out.parquet")
    }


def test_the_rows_are_the_ids_that_the_tokenizer_gives_with_eos_at_the_end(whole: SftOutcome) -> None:
    for row in rows_of(whole.root):
        assert row["completion_ids"] == [*tiny_tokenizer()(row["completion"])["input_ids"], EOS]
        assert (row["finish"], row["weight"], row["source"]) == ("eos", 1.0, "human")


def test_its_prompts_are_written_once_each_for_the_rounds_that_come_after(whole: SftOutcome) -> None:
    for name, source in (("prompts.jsonl", "rows.parquet"), ("held_out.jsonl", "held_out.parquet")):
        lines = [json.loads(line) for line in (whole.root / name).read_text(encoding="utf-8").splitlines()]
        prompts = [line.pop("prompt") for line in lines]
        assert len(set(prompts)) == len(prompts) and set(prompts) == {
            row["prompt"] for row in rows_of(whole.root, source)
        }
        first = {row["prompt"]: row["completion"] for row in reversed(rows_of(whole.root, source))}
        assert lines == [{} if name == "prompts.jsonl" else {"reference": first[prompt]} for prompt in prompts]


def test_measuring_that_was_interrupted_goes_on_with_the_completions_that_are_left(
    tmp_path: Path, model: Path, data: Path, whole: SftOutcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(partial, "SHARE", 1e9)
    batches: list[int] = []
    measuring: list[bool] = []

    def check() -> None:
        if measuring:
            batches.append(1)
            if len(batches) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(interruption, "raise_if_asked", check)

    def observe(kind: str, facts: dict[str, Any]) -> None:
        if facts.get("name") == "report.json":
            measuring.append(True)

    with pytest.raises(KeyboardInterrupt):
        sft(config(tmp_path / "sft", model, data), observe)
    batches.append(0)
    found = sft(config(tmp_path / "sft", model, data), observe)
    assert found.report["perplexity"] == whole.report["perplexity"]
    assert len(batches) == 2 + 2 * 2 - 1, "of the two batches before the fit, one was there"
    assert not (found.root / "train").exists()


def test_the_perplexity_is_that_of_transformers_own_loss(whole: SftOutcome) -> None:
    assert_perplexity_is_that_of(AutoModelForCausalLM.from_pretrained(whole.root / "model"), whole)


def test_an_adapter_on_tied_embeddings_has_the_perplexity_that_plain_peft_gives_it(tmp_path: Path, data: Path) -> None:
    adapter = {"policy": {"adapter": {"r": 4, "target_modules": ["q_proj", "lm_head"]}}}
    done = sft(config(tmp_path / "sft", save_tiny(tmp_path / "tied", "qwen2"), data, **adapter))
    with quiet():  # peft warns of tied layers
        plain = AutoPeftModelForCausalLM.from_pretrained(done.root / "model")
    assert_perplexity_is_that_of(plain, done)
    assert not (done.root / "model" / "parity.json").exists()  # it holds tokens of the rows


def assert_perplexity_is_that_of(model: Any, whole: SftOutcome) -> None:
    held_out = rows_of(whole.root, "held_out.parquet")
    nats = tokens = 0.0
    for row in held_out:
        prompt = tiny_tokenizer()(row["prompt"])["input_ids"]
        ids = torch.tensor([[*prompt, *row["completion_ids"]]])
        labels = torch.tensor([[*[-100] * len(prompt), *row["completion_ids"]]])
        with torch.no_grad():
            nats += model(input_ids=ids, labels=labels).loss.item() * len(row["completion_ids"])
        tokens += len(row["completion_ids"])
    measured = whole.report["perplexity"]
    assert measured["tokens"] == tokens and measured["answers"] == len(held_out)
    assert measured["after"] == pytest.approx(float(torch.tensor(nats / tokens).exp()), rel=1e-5)


def test_the_model_is_a_plain_folder_that_a_run_takes_as_its_policy(whole: SftOutcome, tmp_path: Path) -> None:
    folder = whole.root / "model"
    assert AutoTokenizer.from_pretrained(folder)("the cab")["input_ids"] == tiny_tokenizer()("the cab")["input_ids"]
    run = as_run(config(tmp_path / "none", folder, "unused.jsonl"))
    (tmp_path / "start").mkdir()
    facts = CausalLM.start(run, tmp_path / "start")
    assert facts["architecture"] == "LlamaForCausalLM"


@pytest.mark.slow
def test_an_adapter_is_a_plain_folder_of_peft_with_its_base_named_in_full(
    tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = {"policy": {"adapter": {"r": 4}}}
    done = sft(config(tmp_path / "sft", model, data, **adapter))
    moved = (tmp_path / "sft" / "model").rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    tuned, base = AutoPeftModelForCausalLM.from_pretrained(moved), AutoModelForCausalLM.from_pretrained(model)
    ids = torch.tensor([tiny_tokenizer()("ask 1 the cab")["input_ids"]])
    with torch.no_grad():
        assert not torch.allclose(tuned(ids).logits, base(ids).logits, atol=1e-3)
    assert len(AutoTokenizer.from_pretrained(moved)) == len(tiny_tokenizer())
    assert done.report["perplexity"]["after"] < done.report["perplexity"]["before"]
    again = sft(config(tmp_path / "twice", moved, data, **adapter))  # on an adapter: merged first, under start/
    assert again.report["perplexity"]["before"] == pytest.approx(done.report["perplexity"]["after"], rel=1e-4)
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "twice" / "model")


def test_a_second_call_finds_everything_done_and_changes_no_byte(whole: SftOutcome, model: Path, data: Path) -> None:
    before = tree_hash(whole.root)
    again = sft(config(whole.root, model, data))
    assert not again.worked and again.report == whole.report
    assert tree_hash(whole.root) == before


@pytest.mark.slow
def test_stopped_at_any_event_the_same_call_ends_in_the_same_bytes(
    tmp_path: Path, model: Path, data: Path, whole: SftOutcome
) -> None:
    events: list[tuple[str, Any]] = []
    sft(config(tmp_path / "count", model, data), lambda kind, facts: events.append((kind, facts)))
    assert Counter(kind for kind, _ in events) == {"step": 5, "data": 1, "encoded": 2, "trained": 9}
    for stop in range(len(events)):
        if events[stop][0] == "trained" and events[stop][1]["done"] not in (1, 3, 9):
            continue
        root, seen = tmp_path / f"stop-{stop}", [0]

        def observe(kind: str, facts: Any, stop: int = stop, seen: list[int] = seen) -> None:
            seen[0] += 1
            if seen[0] == stop + 1:
                raise Killed

        with pytest.raises(Killed):
            sft(config(root, model, data), observe)
        assert sft(config(root, model, data)).report == whole.report, events[stop]
        assert tree_hash(root) == tree_hash(whole.root), events[stop]


@pytest.mark.slow
def test_killed_by_a_signal_the_same_command_ends_in_the_same_bytes(
    tmp_path: Path, model: Path, data: Path, whole: SftOutcome
) -> None:
    root = tmp_path / "killed"
    words = [str(data), "--policy.model", str(model), "--output-dir", str(root), "--threads", "1"]
    words += ["--policy.device", "cpu", "--data.held_out_fraction", "0.2", "--training.learning_rate", "1e-2"]
    words += ["--training.per_device_train_batch_size", "4", "--training.save_steps", "2"]
    with subprocess.Popen([sys.executable, "-m", "raftune", "sft", *words], stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while not (root / "train").exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not (root / "report.json").exists()
    assert main(["sft", *words]) == 0
    assert tree_hash(root) == tree_hash(whole.root)


@pytest.mark.slow
def test_every_row_of_an_awkward_file_is_learned_held_out_or_named(tmp_path: Path) -> None:
    written = write_hh(tmp_path / "hh.jsonl.gz")
    done = sft(config(tmp_path / "sft", "starter", written.path, training={"max_steps": 1}))
    data = done.report["data"]
    skipped = [json.loads(line) for line in (done.root / "skipped.jsonl").read_text(encoding="utf-8").splitlines()]
    assert data["rows"] == written.rows
    assert data["learned"] + data["held_out"] + len(skipped) == written.rows
    by_reason = {r: tuple(s["row"] for s in skipped if s["reason"] == r) for r in {s["reason"] for s in skipped}}
    assert by_reason == {**written.skipped, "prompt too long": written.long_prompts}
    assert data["skipped"] == {reason: len(rows) for reason, rows in by_reason.items()}
    cut = [
        row
        for name in ("rows.parquet", "held_out.parquet")
        for row in rows_of(done.root, name)
        if row["finish"] == "length"
    ]
    assert sorted(int(row["sample_id"].removeprefix("data/")) for row in cut) == list(written.long_answers)
    assert data["cut"] == len(cut)


def test_a_completion_beyond_max_length_is_cut_without_eos_or_left_out_where_that_is_asked(
    tmp_path: Path, model: Path
) -> None:
    rows = [{"prompt": "ab", "completion": "ab" * 20}, {"prompt": "ab", "completion": "ab"}]
    data = write(tmp_path / "rows.jsonl", rows)
    done = sft(config(tmp_path / "cut", model, data, max_length=6))
    long, short = rows_of(done.root)
    assert (len(long["completion_ids"]), long["finish"], long["completion"]) == (5, "length", "ab" * 5)
    assert EOS not in long["completion_ids"] and short["completion_ids"][-1] == EOS
    assert (done.report["data"]["cut"], done.report["training"]["rows"]) == (1, 2)
    masked = sft(config(tmp_path / "masked", model, data, max_length=6, training={"mask_truncated_completions": True}))
    details = masked.report["training"]["details"]
    assert (masked.report["training"]["rows"], details["left_out_truncated"]) == (1, 1)


def test_messages_are_learned_behind_the_chat_template(tmp_path: Path, model: Path) -> None:
    user, answer = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "the cab"}
    parts = {"role": "user", "content": [{"type": "text", "text": "hi"}]}
    image = {"role": "user", "content": [{"type": "image"}]}
    rows = [{"messages": [m, answer]} for m in (user, parts, image)] + [{"prompt": "hi", "completion": "the cab"}]
    done = sft(config(tmp_path / "sft", model, write(tmp_path / "rows.jsonl", rows), data={"held_out_fraction": 0}))
    assert [(row["prompt"], row["completion"]) for row in rows_of(done.root)] == [([user], "the cab")] * 3
    assert done.report["data"]["skipped"] == {"unfit for this model": 1}
    assert "1 of 4 prompts are texts and became a user's message" in done.report["data"]["notes"][0]
    assert done.report["perplexity"] is None


def test_messages_without_a_chat_template_are_refused_with_the_way_out(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a"}]
    plain = save_tiny(tmp_path / "plain")
    with pytest.raises(DataError, match=r"none is left. The model refuses 2; row 1: .* needs a tokenizer with a chat"):
        sft(config(tmp_path / "sft", plain, write(tmp_path / "rows.jsonl", [{"messages": turns}] * 2)))


def test_another_configuration_or_other_data_is_refused_with_the_difference(
    whole: SftOutcome, model: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigChanged, match=r"training.learning_rate: 0.01 there, 0.02 now"):
        sft(config(whole.root, model, data, training={"learning_rate": 0.02}))
    mine = write(tmp_path / "mine.jsonl", ANSWERS)
    sft(config(tmp_path / "sft", model, mine, training={"max_steps": 1}))
    write(mine, ANSWERS[1:])
    with pytest.raises(ConfigChanged, match=r"mine.jsonl has changed since .* was started"):
        sft(config(tmp_path / "sft", model, mine, training={"max_steps": 1}))


def test_a_call_that_came_to_nothing_does_not_bind_the_next(tmp_path: Path, model: Path, data: Path) -> None:
    root = tmp_path / "sft"
    with pytest.raises(DataError, match=r"data.path must name a file that exists"):
        sft(config(root, model, "./gone.jsonl"))
    with pytest.raises(ModelError, match=r"policy.model must be a folder or a hub name"):
        sft(config(root, "./gone", data))
    assert sft(config(root, model, data, training={"max_steps": 1})).worked


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path, model: Path, data: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(StoreError, match=r"must be empty or hold an earlier `raftune sft`; .* holds thesis.tex"):
        sft(config(tmp_path, model, data))
    other = tmp_path / "run"
    other.mkdir()
    (other / "config.yaml").write_text("name: run\n")
    with pytest.raises(StoreError, match=r"config.yaml is not one's"):
        sft(config(other, model, data))
    assert [path.name for path in other.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    "field",
    [{"replay_rounds": 1}, {"start_from": "start"}, {"optimizer_state": "carried"}, {"reference": {"path": "x"}}],
)
def test_what_speaks_of_rounds_is_refused(tmp_path: Path, field: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"training.{next(iter(field))} speaks of rounds, and sft has none"):
        config(tmp_path, "m", "d", training=field)


def test_the_command_says_what_was_learned_and_what_to_do_next(
    whole: SftOutcome, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["sft", str(whole.root / "config.yaml"), "--output-dir", str(whole.root)]
    assert main(given) == 0
    said = capsys.readouterr().out
    for words in ("Already finished; nothing to do", "perplexity", f"--policy.model {whole.root / 'model'}"):
        assert words in said
    assert main([*given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["perplexity"] == whole.report["perplexity"] and found["worked"] is False


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "sft needs data, a model and a directory; got none"),
        (
            ["a.jsonl", "b.jsonl", "--output-dir", "x", "--policy.model", "m"],
            "sft takes one data set; got a.jsonl, b.jsonl",
        ),
        (["a.jsonl"], "output_dir must be given"),
        (["a.jsonl", "--training.learning_rat", "1"], "did you mean --training.learning_rate?"),
    ],
)
def test_a_call_that_lacks_something_says_what(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sft", *words]) == 2
    assert complaint in capsys.readouterr().err
