"""The page of a run: complete, kept up to date, and of use when parts of the run are gone."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raftune.cli import main
from raftune.report import collect, render, write_report
from raftune.report import samples as shown_samples
from raftune.results import samples as ledger
from raftune.runtime.run import run
from raftune.selection import Reason
from raftune.store.commit import NAME as COMMIT
from raftune.store.commit import with_hash
from raftune.store.files import json_bytes, sha256_of
from raftune.store.parquet import read_table
from raftune.store.run import RunFolder
from tests.markup import Seen
from tests.runs import tiny
from tests.runs.injection_family import NAMES, injection_run
from tests.runs.kill import tree

Document = dict[str, Any]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every stage that there is; the damage is done to copies of it."""
    root = tmp_path_factory.mktemp("finished") / "run"
    run(tiny.config(root, **tiny.EVERYTHING), tiny.objects())
    return root


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def quiet(copy: Path) -> Path:
    """A copy whose guards saw nothing, so that alarms can be put into it."""
    for round_ in (1, 2):
        replace(copy, f"round-{round_:04d}/guard/alarms.json", "[]\n")
    return copy


def document_of(root: Path) -> Document:
    """The document as it stands in the run's page."""
    found: Document = json.loads(Seen((root / "report.html").read_text(encoding="utf-8")).texts["script"][0])
    return found


def replace(root: Path, name: str, content: str) -> None:
    """Puts another content into a committed file, as if it had been committed."""
    path = root / name
    path.write_text(content, encoding="utf-8")
    commit = json.loads((path.parent / COMMIT).read_text())
    commit["files"][path.name] |= {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    del commit["sha256"]
    (path.parent / COMMIT).write_bytes(json_bytes(with_hash(commit)))


# -- what it holds ----------------------------------------------------------------------------------------------------


def test_every_candidate_is_there_with_its_score_its_verdict_and_its_reason(finished: Path) -> None:
    document = collect(finished).document
    shown = {s["id"]: (item, s) for item in document["prompts"]["items"] for s in item["samples"]}
    samples = [s for r in (1, 2) for chunk in ledger.training_chunks(RunFolder(finished), r) for s in chunk]
    assert {s["source"] for s in samples} == {"policy", "column:human", "teacher"}
    assert shown.keys() == {s["sample_id"] for s in samples}
    for sample in samples:
        item, found = shown[sample["sample_id"]]
        assert item["prompt"] == sample["prompt"]
        for name in ("k", "source", "completion", "status", "rank", "weight", "reason", "detail"):
            assert found[name] == sample[name], name
        assert found["score"] == pytest.approx(sample["score"], abs=1e-6)
        assert found["parts"] == {"value": found["score"]}
        assert (found["seed"] is None) == (sample["source"] == "column:human")
    assert document["prompts"]["shown"] == document["prompts"]["of"] == 16


def test_the_margin_is_how_far_the_best_is_above_the_mean(finished: Path) -> None:
    for item in collect(finished).document["prompts"]["items"]:
        scores = [sample["score"] for sample in item["samples"]]
        assert item["margin"] == pytest.approx(max(scores) - sum(scores) / len(scores), abs=1e-5)


def test_a_sample_is_compared_with_the_same_prompt_and_seed_in_every_round(finished: Path) -> None:
    compare = collect(finished).document["compare"]
    assert (compare["shown"], compare["of"]) == (8, 8)
    for item in compare["items"]:
        assert list(item["answers"]) == ["0", "1", "2"]
        for round_, answer in item["answers"].items():
            assert answer["id"] == f"{int(round_):04d}e/{item['prompt_id']}/{item['k']:03d}"
        assert isinstance(item["seed"], str)


def test_what_it_learned_from_is_exactly_the_rows_of_the_training(finished: Path) -> None:
    shown = collect(finished).document["learned"]
    for round_ in (1, 2):
        table = read_table(finished / f"round-{round_:04d}/rows/rows.parquet").to_pylist()
        rows = [item for item in shown["items"] if item["round"] == round_]
        names = ("sample_id", "origin", "source", "prompt", "completion", "weight")
        keyed = [{tuple(row[name] for name in names) for row in found} for found in (rows, table)]
        assert keyed[0] == keyed[1]
        assert {row["reason"] for row in rows} <= {Reason.BEST.words, Reason.KEPT_EQUAL.words}
    assert {item["origin"] for item in shown["items"] if item["round"] == 2} == {"round-0001", "round-0002"}


def test_the_document_keeps_its_contract(finished: Path) -> None:
    document = collect(finished).document
    lists = {"prompts", "compare", "learned"}
    assert set(document) == lists | {"version", "run", "rewards", "judges", "alarms", "missing", "by_round", "guarded"}
    assert all(set(document[name]) == {"shown", "of", "chosen_by", "items"} for name in lists)
    assert document["run"] | {"best": None} == {
        "name": "run",
        "status": "finished",
        "evaluation": False,
        "status_words": "finished: all 2 rounds are done",
        "rounds": [0, 1, 2],
        "best": None,
        "best_by": "reward",
        "media": "category",
    }
    assert (document["rewards"], document["judges"], document["missing"]) == (["value"], [], [])


def test_what_does_not_fit_is_counted_and_reported_in_words(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MOST_PROMPTS", "MOST_ROWS", "MOST_ANSWERS"):
        monkeypatch.setattr(shown_samples, name, 6)
    document = collect(finished).document
    assert [(document[n]["shown"], document[n]["of"]) for n in ("prompts", "compare", "learned")] == [
        (6, 16),
        (2, 8),
        (6, 24),
    ]
    assert all("by hash" in document[name]["chosen_by"] for name in ("prompts", "compare", "learned"))
    assert [item["round"] for item in document["prompts"]["items"]] == [1, 1, 1, 2, 2, 2]
    assert document == collect(finished).document  # the same choice every time


def test_a_budget_of_bytes_is_kept(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = len(json.dumps(collect(finished).document["prompts"]["items"]))
    monkeypatch.setattr(shown_samples, "PROMPT_BYTES", whole // 2)
    found = collect(finished).document["prompts"]
    assert 0 < found["shown"] < found["of"]
    assert len(json.dumps(found["items"])) < whole * 0.6


def test_what_an_alarm_names_is_always_there(quiet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = collect(quiet).document
    named = [whole["prompts"]["items"][i]["samples"][-1]["id"] for i in (4, 13)]
    named.append(whole["compare"]["items"][5]["answers"]["2"]["id"])
    for name in ("MOST_PROMPTS", "MOST_ROWS", "MOST_ANSWERS"):
        monkeypatch.setattr(shown_samples, name, 3)
    alarm = {"alarm": "length_drifts", "round": 2, "title": "Length", "evidence": "look at this", "numbers": {}}
    alarms = [alarm | {"samples": [{"sample_id": name, "why": "long"} for name in named]}]
    replace(quiet, "round-0002/guard/alarms.json", json.dumps(alarms))
    document = collect(quiet).document
    assert document["alarms"] == alarms
    shown = {s["id"] for item in document["prompts"]["items"] for s in item["samples"]}
    shown |= {answer["id"] for item in document["compare"]["items"] for answer in item["answers"].values()}
    assert set(named) <= shown
    assert '<a href="#alarms">1 alarm</a>' in write_report(quiet).read_text(encoding="utf-8")


# -- when it is written -----------------------------------------------------------------------------------------------


def test_it_is_written_anew_after_every_round_and_at_the_end(tmp_path: Path) -> None:
    root = tmp_path / "run"
    seen: list[tuple[str, list[int]]] = []

    def observe(kind: str, facts: dict[str, Any]) -> None:
        if kind == "end" or (kind == "stage_begin" and facts["stage"] == "train"):  # written while a round generates
            found = document_of(root)["run"]
            seen.append((found["status"], found["rounds"]))

    run(tiny.config(root, report=True), tiny.objects(), observe=observe)
    assert seen == [("running", [0]), ("running", [0, 1]), ("finished", [0, 1, 2])]


def test_the_next_round_generates_while_a_page_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, generating = tmp_path / "run", threading.Event()
    written: list[str] = []

    def slow(*args: Any, **options: Any) -> Path:
        assert generating.wait(60)
        path = write_report(*args, **options)
        written.append(document_of(root)["run"]["status"])
        return path

    def observe(kind: str, facts: dict[str, Any]) -> None:
        if kind == "stage_begin" and facts["stage"] == "generate":
            assert written == []
            generating.set()

    monkeypatch.setattr("raftune.report.write_report", slow)
    run(tiny.config(root, report=True, num_rounds=1), tiny.objects(), observe=observe)
    assert written == ["running", "finished"]


def test_a_run_that_fails_leaves_the_page_of_its_last_round(tmp_path: Path) -> None:
    def failing(prompts: list[int], completions: list[int], **columns: Any) -> list[float]:
        if (tmp_path / "run/round-0002").is_dir():
            raise RuntimeError("out of luck")
        return [float(answer) for answer in completions]

    with pytest.raises(Exception, match="out of luck"):
        run(tiny.config(tmp_path / "run", report=True), tiny.objects(failing))
    write_report(tmp_path / "run")
    found = document_of(tmp_path / "run")
    assert found["run"]["status"] == "interrupted"
    assert found["run"]["rounds"] == [0, 1]
    assert found["missing"] == []


def test_without_it_a_run_has_the_same_bytes(tmp_path: Path) -> None:
    for name in ("with", "without"):
        run(tiny.config(tmp_path / name, report=name == "with"), tiny.objects())
    found = [tree(tmp_path / name) for name in ("with", "without")]
    assert all(one.pop("config.resolved.json") and one.pop("config.yaml") for one in found)
    assert found[0] == found[1]
    assert not (tmp_path / "without/report.html").exists()


def test_a_page_that_cannot_be_written_stops_no_run_and_is_reported_once(tmp_path: Path) -> None:
    root = tmp_path / "run"

    def observe(kind: str, facts: dict[str, Any]) -> None:
        if kind == "begin":
            (root / "report.html").mkdir()

    with pytest.warns(UserWarning, match="the run goes on without it: StoreError: the report must be a file") as said:
        outcome = run(tiny.config(root, report=True), tiny.objects(), observe=observe)
    assert outcome.rounds == 2
    assert len(said) == 1


def test_a_finished_run_gets_its_page_back(finished: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(finished, tmp_path / "run"))
    run(tiny.config(root, report=True, **tiny.EVERYTHING), tiny.objects())
    assert document_of(root)["run"]["status"] == "finished"


def test_a_running_run_can_be_read_and_is_reported_as_running(copy: Path) -> None:
    with RunFolder(copy).lock():
        assert collect(copy).document["run"]["status_words"] == "at work when this was written: 2 of 2 rounds done"


def test_a_round_that_is_half_done_is_not_missing(copy: Path) -> None:
    for name in ("select", "rows", "model", "evaluate", "guard"):
        shutil.rmtree(copy / "round-0002" / name)
    (copy / "round-0002/score" / COMMIT).unlink()
    (copy / "best.json").unlink()
    events = (copy / "events.jsonl").read_text().splitlines()
    (copy / "events.jsonl").write_text("\n".join(line for line in events if '"end"' not in line) + '\n{"torn')
    document = collect(copy).document
    assert document["missing"] == []
    assert document["run"]["status"] == "interrupted"
    assert document["run"]["rounds"] == [0, 1]
    last = [item for item in document["prompts"]["items"] if item["round"] == 2]
    assert {sample["rank"] for item in last for sample in item["samples"]} == {None}


# -- what is damaged --------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def noise(path: Path) -> None:
    path.write_bytes(b"\xff\x00[" * (path.stat().st_size // 3) + b" " * (path.stat().st_size % 3))


def other(path: Path) -> None:
    path.write_text('[1, {"a": null}, "x"]' if path.suffix == ".json" else "")


FILES = (
    *("plan/prompts.parquet", "generate/chunk-00000.parquet", "teach/chunk-00001.parquet", "score/chunk-00000.parquet"),
    *("select/verdicts.parquet", "select/summary.json", "rows/rows.parquet", "evaluate/metrics.json"),
    *("evaluate/generate/chunk-00000.parquet", "evaluate/score/chunk-00000.parquet", "guard/metrics.json"),
    *("guard/alarms.json", *(f"{stage}/{COMMIT}" for stage in ("generate", "select", "model", "evaluate", "guard"))),
)


@pytest.mark.slow
@pytest.mark.parametrize("harm", [Path.unlink, cut, noise, other, flip])
def test_what_is_damaged_is_named_by_round_and_stage_and_the_rest_is_shown(
    finished: Path, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    whole = collect(finished).document
    root = tmp_path / "run"
    shutil.copytree(finished, root)
    for name in FILES:
        harm(root / "round-0001" / name)
        found = collect(root)
        render(found)  # notes what it misses, too
        document = found.document
        named = any(line.startswith(f"round 1, {name.rsplit('/', 1)[0]}: ") for line in document["missing"])
        assert named or (harm is flip and document == whole), (name, document["missing"])  # a bit that nobody reads
        assert {item["round"] for item in document["prompts"]["items"]} == {1, 2}
        assert document["run"]["rounds"][-1] == 2
        assert str(root) not in json.dumps(document["missing"])
        shutil.copyfile(finished / "round-0001" / name, root / "round-0001" / name)


@pytest.mark.parametrize(
    "name", ["config.resolved.json", "config.yaml", "best.json", "environment.json", "events.jsonl"]
)
@pytest.mark.parametrize("harm", [Path.unlink, noise, other])
def test_a_run_whose_own_files_are_lost_is_still_shown(copy: Path, name: str, harm: Callable[[Path], None]) -> None:
    harm(copy / name)
    document = document_of(write_report(copy).parent)
    assert document["prompts"]["shown"] == 16
    assert document["run"]["rounds"] == [0, 1, 2]
    if harm is Path.unlink or name.endswith(("resolved.json", "best.json", "environment.json")):
        assert any(line.startswith("the run: ") and name in line for line in document["missing"])


def test_a_lost_chunk_costs_its_prompts_alone(copy: Path) -> None:
    (copy / "round-0002/generate/chunk-00001.parquet").unlink()
    document = collect(copy).document
    assert document["missing"] == ["round 2, generate: chunk-00001.parquet is missing"]
    assert len([item for item in document["prompts"]["items"] if item["round"] == 2]) == 4


def test_without_the_scores_the_verdicts_still_tell_them(copy: Path) -> None:
    shutil.rmtree(copy / "round-0002/score")
    document = collect(copy).document
    samples = [s for item in document["prompts"]["items"] if item["round"] == 2 for s in item["samples"]]
    assert all(s["score"] is not None and s["reason"] and s["status"] is None for s in samples)
    assert document["missing"] == ["round 2, score: its COMMIT is missing; the files in its folder are shown"]


def test_a_run_without_evaluations_is_no_damaged_run(tmp_path: Path) -> None:
    run(tiny.config(tmp_path / "run", report=True, evaluation={"num_prompts": 0}), tiny.objects())
    document = document_of(tmp_path / "run")
    assert document["missing"] == []
    assert document["compare"] == {"shown": 0, "of": 0, "chosen_by": shown_samples.ANSWERS_BY, "items": []}


def test_weights_that_were_dropped_on_purpose_are_not_missing(tmp_path: Path) -> None:
    run(tiny.config(tmp_path / "run", report=True, num_rounds=3, keep_models="last"), tiny.objects())
    assert (tmp_path / "run/round-0001/model/DROPPED.json").is_file()
    assert document_of(tmp_path / "run")["missing"] == []


# -- hostile runs, and the command ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_of_injections_has_the_elements_of_any_other(tmp_path: Path) -> None:
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    hostile = injection_run(tmp_path / "a")
    plain = injection_run(tmp_path / "b", policy={"options": {"sentences": words}})
    (plain / "config.yaml").write_text("name: plain\n")
    shown, other_ = (Seen(write_report(root).read_text(encoding="utf-8")) for root in (hostile, plain))
    assert set(shown.tags) == set(other_.tags)
    for tag in ("script", "style", "meta", "link", "a", "h1", "h2"):
        assert shown.tags.count(tag) == other_.tags.count(tag)
    assert {a[:2] for a in shown.attributes} == {a[:2] for a in other_.attributes}
    assert not {name for _, name, _ in shown.attributes if name.startswith("on") or name == "style"}
    samples = [s for item in document_of(hostile)["prompts"]["items"] for s in item["samples"]]
    assert {"__proto__", "constructor"} <= set(samples[0]["parts"]) <= {*NAMES, *samples[0]["parts"]}


def test_the_command_writes_the_page_and_prints_where(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(copy)]) == 0
    assert capsys.readouterr().out == f"{copy / 'report.html'}\n"
    assert main(["report", str(copy), "--out", str(copy / "deep/page.html")]) == 0
    assert (copy / "deep/page.html").read_bytes() == (copy / "report.html").read_bytes()
    assert [path.name for path in (copy / "deep").iterdir()] == ["page.html"]
    assert main(["report", str(copy), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == collect(copy).document


def test_a_folder_that_holds_no_run_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 1
    assert "holds no run: config.resolved.json is missing" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    assert main(["report", str(tmp_path / "nowhere")]) == 1


def test_the_page_of_a_run_that_was_interrupted_no_longer_says_that_it_is_at_work(tmp_path: Path) -> None:
    def stop(kind: str, facts: dict[str, Any]) -> None:
        if kind == "stage_begin" and facts["round"] == 2 and facts["stage"] == "score":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny.config(tmp_path / "run", report=True), tiny.objects(), observe=stop)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "interrupted: 1 of 2 rounds done; raftune resume goes on with it" in page
    assert "at work when this was written" not in page
