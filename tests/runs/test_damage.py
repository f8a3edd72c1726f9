"""What lies on disk is what was committed: a changed, cut or missing file is found before it is used, and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from raftune.errors import ConfigChanged, RunDamaged, RunTooNew, StoreError
from raftune.report import write_report
from raftune.results.export import export
from raftune.results.model_card import publish_model
from raftune.results.summary import best_round
from raftune.runtime.assembly import Runtime
from raftune.runtime.evaluation_target import parse_target
from raftune.runtime.run import resume, run, verify
from raftune.store.commit import with_hash
from raftune.store.files import json_bytes
from raftune.store.job import StageJob, journal_of
from raftune.store.run import RunFolder
from tests.runs import tiny
from tests.runs.kill import difference, tree


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every stage that there is; the damage is done to copies of it."""
    root = tmp_path_factory.mktemp("finished") / "run"
    run(tiny.config(root, **tiny.EVERYTHING), tiny.objects())
    return root


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def committed_files(root: Path) -> list[str]:
    """Every file that a COMMIT lists."""
    folder = RunFolder(root)
    return [
        (folder.folder(round_, name) / file).relative_to(root).as_posix()
        for round_, name in folder.places()
        if (commit := folder.commit(round_, name)) is not None
        for file in commit.files
    ]


def flip(path: Path) -> None:
    """One bit in the middle is the other one."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("file", "stage"),
    [
        ("round-0000/model/policy.json", "0/start"),
        ("round-0000/evaluate/generate/chunk-00000.parquet", "0/evaluation-generate"),
        ("round-0001/generate/chunk-00001.parquet", "1/generate"),
        ("round-0001/model/policy.json", "1/train"),
        ("round-0002/rows/rows.parquet", "2/gather"),
    ],
)
def test_what_is_reported_to_redo_fixes_the_run(copy: Path, finished: Path, file: str, stage: str) -> None:
    flip(copy / file)
    with pytest.raises(RunDamaged, match=f"redo its stage and what follows with `--from {stage}`"):
        run(tiny.config(copy, **tiny.EVERYTHING), tiny.objects())
    run(tiny.config(copy, **tiny.EVERYTHING), tiny.objects(), redo=stage)
    assert verify(copy) == [] and not difference(tree(finished), tree(copy))


@pytest.mark.slow
@pytest.mark.parametrize(("harm", "every"), [(flip, 1), (cut, 4), (Path.unlink, 4)], ids=["flipped", "cut", "deleted"])
def test_every_file_that_is_damaged_is_found_and_named_before_anything_is_run(
    finished: Path, tmp_path: Path, harm: Callable[[Path], None], every: int
) -> None:
    names = committed_files(finished)
    kinds = {name.split("/", 1)[1].split("/")[0] for name in names}
    assert kinds >= {"data", "model", "plan", "generate", "teach", "score", "logp", "select", "rows", "evaluate"}
    root = Path(shutil.copytree(finished, tmp_path / "run"))
    for name in names[::every]:
        whole = (root / name).read_bytes()
        harm(root / name)
        (fault,) = verify(root)
        assert name in fault
        with pytest.raises(RunDamaged, match=name.replace(".", r"\.")):
            resume(root, tiny.objects())
        (root / name).write_bytes(whole)
    assert verify(root) == []


def test_a_manifest_that_was_edited_is_named(copy: Path) -> None:
    path = copy / "round-0001/generate/_COMMIT.json"
    path.write_text(path.read_text().replace('"rows": 20', '"rows": 21', 1))
    assert verify(copy)[0].startswith(f"{path} has changed since it was committed")
    with pytest.raises(RunDamaged, match=r"round-0001/generate/_COMMIT\.json has changed.*--from 1/generate"):
        resume(copy, tiny.objects())


def test_a_manifest_whose_key_is_not_that_of_its_fields_is_named(copy: Path) -> None:
    path = copy / "round-0002/guard/_COMMIT.json"
    content = json.loads(path.read_text())
    del content["sha256"]
    content["key"] = content["key"][::-1]
    path.write_bytes(json_bytes(with_hash(content)))
    assert verify(copy) == [f"{path} has a key that is not that of its fields and inputs"]


def test_a_replaced_manifest_is_detected_by_the_stages_made_from_it(copy: Path) -> None:
    path = copy / "round-0001/generate/_COMMIT.json"
    content = json.loads(path.read_text())
    content["files"]["chunk-00000.parquet"]["rows"] += 1
    del content["sha256"]
    path.write_bytes(json_bytes(with_hash(content)))
    faults = verify(copy)
    assert all("was made from another 1/generate than the one on disk" in fault for fault in faults)
    assert {fault.split(" ")[0].rsplit("/", 1)[1] for fault in faults} == {
        "teach",
        "score",
        "logp",
        "logp-start",
        "select",
        "rows",
        "guard",
    }


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"layout": 3}', '{"layout": "1"}'])
def test_an_unreadable_manifest_is_named_by_verify_and_by_resume(copy: Path, content: str) -> None:
    path = copy / "round-0001/score/_COMMIT.json"
    path.write_text(content)
    assert str(path) in verify(copy)[0]
    with pytest.raises(RunDamaged, match=r"round-0001/score/_COMMIT\.json"):
        resume(copy, tiny.objects())


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("round-0001/generate/chunk-00001.parquet", "1/generate"),
        ("round-0001/score/_COMMIT.json", "1/score"),
        ("round-0002/model/policy.json", "2/train"),
        ("round-0001/evaluate/generate/chunk-00000.parquet", "1/evaluation-generate"),
        ("round-0001/evaluate/metrics.json", "1/evaluate"),
        ("round-0000/data/train.parquet", "data"),
    ],
)
def test_redoing_the_stage_repairs_what_was_damaged(finished: Path, copy: Path, name: str, stage: str) -> None:
    cut(copy / name)
    resume(copy, tiny.objects(), redo=stage)
    assert verify(copy) == []
    assert difference(tree(finished), tree(copy)) == ""


def test_redoing_a_later_stage_than_the_damaged_one_is_refused(copy: Path) -> None:
    flip(copy / "round-0001/generate/chunk-00000.parquet")
    before = tree(copy)
    with pytest.raises(RunDamaged, match=r"round-0001/generate/chunk-00000\.parquet"):
        resume(copy, tiny.objects(), redo="1/select")
    assert tree(copy) == before


def test_a_run_of_a_later_layout_is_refused_by_name_of_the_fix(copy: Path) -> None:
    path = copy / "round-0001/select/_COMMIT.json"
    path.write_text(path.read_text().replace('"layout": 3', '"layout": 4'))
    for act in (verify, lambda root: resume(root, tiny.objects())):
        with pytest.raises(RunTooNew, match=r"has layout 4; this version reads up to 3\. Upgrade raftune"):
            act(copy)


def test_a_configuration_that_is_not_json_is_refused_on_resume_and_fixed_by_the_configuration_itself(
    finished: Path, copy: Path
) -> None:
    (copy / "config.resolved.json").write_text('{"name": ')
    with pytest.raises(RunDamaged, match=r"config\.resolved\.json is not valid JSON"):
        resume(copy, tiny.objects())
    run(tiny.config(copy, **tiny.EVERYTHING), tiny.objects())
    assert difference(tree(finished), tree(copy)) == ""


def test_a_folder_without_a_configuration_is_no_run(tmp_path: Path) -> None:
    for act in (verify, lambda root: resume(root, tiny.objects())):
        with pytest.raises(StoreError, match=r"holds no run: config\.resolved\.json is missing"):
            act(tmp_path)


def test_work_whose_configuration_was_lost_is_still_held_against_the_new_one(copy: Path) -> None:
    (copy / "config.resolved.json").unlink()
    with pytest.raises(ConfigChanged, match="seed: 0 → 1"):
        run(tiny.config(copy, **tiny.EVERYTHING, seed=1), tiny.objects())


def test_an_interrupted_chunk_that_was_damaged_in_any_byte_is_run_again(finished: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"

    def leave(kind: str, facts: dict[str, Any]) -> None:
        if kind == "chunk" and facts["stage"] == "generate" and facts["chunk"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny.config(root, **tiny.EVERYTHING), tiny.objects(), observe=leave)
    path = root / "round-0001/generate/chunk-00000.parquet"
    job = job_of(root, "generate")
    whole = path.read_bytes()
    assert set(journal_of(job)) == {0, 1}
    for at in range(0, len(whole), 7):
        content = bytearray(whole)
        content[at] ^= 1 << (at % 8)
        path.write_bytes(content)
        assert set(journal_of(job)) == {1}
    resume(root, tiny.objects())
    assert difference(tree(finished), tree(root)) == ""


@pytest.mark.parametrize("line", ["", "{", "[]", "null", '{"key": "other"}', '{"chunk": 0, "file": "../../data"}'])
def test_a_damaged_journal_entry_costs_its_chunk_and_no_more(finished: Path, copy: Path, line: str) -> None:
    shutil.rmtree(copy / "round-0002")
    (copy / "round-0001/select/_COMMIT.json").unlink()
    (copy / "round-0001/score/_COMMIT.json").unlink()
    (copy / "round-0001/score/_journal.jsonl").write_text(f"{line}\n")
    assert journal_of(job_of(copy, "score")) == {}


def job_of(root: Path, stage: str) -> StageJob:
    assembly = Runtime(RunFolder(root), tiny.config(root, **tiny.EVERYTHING), tiny.objects())
    try:
        return assembly.job(assembly.stage(1, stage), 1)
    finally:
        assembly.close()


def test_a_line_of_events_that_a_kill_cut_short_is_passed_over(copy: Path) -> None:
    events = copy / "events.jsonl"
    count = len(list(RunFolder(copy).events))
    with events.open("a") as file:
        file.write('{"time": 1, "eve')
    folder = RunFolder(copy)
    folder.events.add("note", text="next")
    assert len(list(folder.events)) == count + 1
    assert json.loads(events.read_text().splitlines()[-1])["text"] == "next"


def replace(path: Path, old: str, new: str) -> str:
    """Edits a text file; returns what it was."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    return text


def test_a_configuration_that_was_edited_on_disk_is_refused_with_the_difference(copy: Path) -> None:
    path = copy / "config.resolved.json"
    replace(path, '"beta": 0.3', '"beta": 9.3')
    assert "selection.beta is 9.3 here and 0.3 in config.yaml" in verify(copy)[0]
    with pytest.raises(RunDamaged, match=r"config\.resolved\.json has changed.*selection\.beta is 9\.3 here"):
        resume(copy, tiny.objects())
    run(tiny.config(copy, **tiny.EVERYTHING), tiny.objects())  # the right values write it anew
    assert verify(copy) == []


def test_a_config_yaml_that_was_edited_is_neither_passed_over_nor_written_over(copy: Path) -> None:
    path = copy / "config.yaml"
    before = yaml.safe_load(replace(path, "beta: 0.3", "beta: 9.3"))
    assert verify(copy) == [f"{path} has changed since it was written (its SHA-256 differs)"]
    with pytest.raises(RunDamaged, match=r"selection\.beta is 9\.3 there and was 0\.3"):
        resume(copy, tiny.objects())
    assert "beta: 9.3" in path.read_text()
    path.unlink()
    resume(copy, tiny.objects())
    assert yaml.safe_load(path.read_text()) == before
    assert verify(copy) == []


@pytest.mark.parametrize("name", ["environment.json", "config.yaml", "events.jsonl", "best.json"])
def test_a_file_at_the_top_that_was_damaged_or_deleted_is_found(copy: Path, name: str) -> None:
    whole = (copy / name).read_bytes()
    flip(copy / name)
    if name == "events.jsonl":
        (copy / name).write_bytes(whole.replace(b'"event"', b'"evemt"', 1))
    (fault,) = verify(copy)
    assert name in fault
    (copy / name).unlink()
    (fault,) = verify(copy)
    assert fault.startswith(f"{copy / name} is missing")


def test_a_best_round_that_contradicts_the_metrics_is_found_and_never_exported(copy: Path, tmp_path: Path) -> None:
    path = copy / "best.json"
    content = json.loads(path.read_text())
    other = 2 if content["round"] == 1 else 1
    path.write_bytes(json_bytes(content | {"round": other}))
    for act in (lambda: publish_model(copy, tmp_path / "out"), lambda: parse_target(str(copy))):
        with pytest.raises(RunDamaged, match=r"best\.json has changed since it was written"):
            act()
    del content["sha256"]
    path.write_bytes(json_bytes(with_hash(content | {"round": other})))
    (fault,) = verify(copy)
    assert f"names round {other} of 2; by the rounds' own numbers it is {content['round']}" in fault


@pytest.mark.parametrize("name", ["chunk-00009.parquet", "chunk-00001-copy.parquet"])
def test_a_surplus_chunk_file_is_named_and_read_by_nobody(copy: Path, tmp_path: Path, name: str) -> None:
    folder = copy / "round-0001/generate"
    shutil.copy(folder / "chunk-00001.parquet", folder / name)
    assert verify(copy) == [f"{folder / name} was not committed: move it out of the folder"]
    with pytest.raises(RunDamaged, match=f"round-0001/generate/{name} was not committed"):
        resume(copy, tiny.objects())
    export(copy, "sft", tmp_path / "out.jsonl")
    write_report(copy, tmp_path / "page.html")
    assert f"{name} was not committed" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("stage", ["evaluate", "guard", "model", "generate"])
@pytest.mark.parametrize("what", ["its COMMIT", "the folder"])
def test_a_stage_of_a_finished_round_without_its_manifest_is_found(copy: Path, stage: str, what: str) -> None:
    folder = copy / "round-0001" / stage
    (folder / "_COMMIT.json").unlink()
    if what == "the folder":
        shutil.rmtree(folder)
    assert any(f"round-0001/{stage}" in fault or f"1/{stage}" in fault for fault in verify(copy))


def test_a_journal_entry_whose_chunk_was_damaged_is_found_by_verify(copy: Path) -> None:
    shutil.rmtree(copy / "round-0002")
    folder = copy / "round-0001/guard"
    entry = {"chunk": 0, "file": "chunk-00000.parquet", "sha256": "0" * 64}
    (folder / "_journal.jsonl").write_text(json.dumps(entry) + "\n")
    assert any("round-0001/guard/_journal.jsonl line 1" in fault for fault in verify(copy))


@pytest.mark.parametrize("way", ["copy", "link"])
def test_a_stage_in_the_wrong_round_is_named(copy: Path, way: str) -> None:
    """A copy of the last round as one more passed as whole: what it was made from lies where it says."""
    last, beyond = copy / f"round-{RunFolder(copy).rounds()[-1]:04d}", copy / "round-0009"
    if way == "copy":
        shutil.copytree(last, beyond)
    else:
        beyond.symlink_to(last)
    assert any("round-0009" in fault and "is of round" in fault for fault in verify(copy))


def test_manifests_of_two_stages_that_were_swapped_are_named(copy: Path) -> None:
    one, other = (copy / f"round-0001/{name}/_COMMIT.json" for name in ("plan", "evaluate/score"))
    contents = one.read_bytes(), other.read_bytes()
    other.write_bytes(contents[0])
    one.write_bytes(contents[1])
    with pytest.raises(RunDamaged, match=r"plan/_COMMIT\.json is of another stage: evaluation score"):
        RunFolder(copy).commit(1, "plan")


def test_a_folder_named_like_a_round_but_for_its_zeros_is_none(copy: Path) -> None:
    before = RunFolder(copy).rounds()
    shutil.copytree(copy / "round-0001", copy / "round-00001")
    assert RunFolder(copy).rounds() == before
    assert verify(copy) == []


def test_a_file_at_the_top_that_holds_another_one_s_content_is_named(copy: Path) -> None:
    """It is valid JSON, and lacks the hash of itself that every such file carries."""
    (copy / "best.json").write_bytes((copy / "round-0001/evaluate/metrics.json").read_bytes())
    with pytest.raises(RunDamaged, match=r"best\.json has changed"):
        best_round(copy)
    with_hash_of_its_own = (copy / "round-0001/guard/_COMMIT.json").read_bytes()
    (copy / "best.json").write_bytes(with_hash_of_its_own)
    with pytest.raises(RunDamaged, match=r"best\.json has changed"):
        best_round(copy)
    (copy / "config.resolved.json").write_bytes(with_hash_of_its_own)
    with pytest.raises(RunDamaged, match=r"config\.resolved\.json has changed"):
        RunFolder(copy).read_config()
    (copy / "config.resolved.json").write_text('{"name": "x"}')
    with pytest.raises(RunDamaged, match=r"config\.resolved\.json has changed"):
        RunFolder(copy).read_config()
