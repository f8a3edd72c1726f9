"""Latents of images that were not kept can be let go: what is gone is said, and how it comes back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from raftune.cli import main
from raftune.errors import ConfigError, StoreError
from raftune.runtime.run import run, verify
from tests.runs import tiny
from tests.runs.image_family import config, darkness, objects
from tests.runs.kill import tree

NONE = {"evaluation": {"num_prompts": 0}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("latents")
    run(config(base / "all", **NONE), objects())
    run(config(base / "selected", keep_latents="selected", **NONE), objects())
    return base


def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished / "selected", tmp_path / "run"))


def resumed(root: Path, redo: str | None = None, **changes: Any) -> Any:
    settings: dict[str, Any] = {"keep_latents": "selected", **NONE, **changes}
    return run(config(root, **settings), objects(), redo=redo)


def test_only_latents_go_and_those_that_were_kept_stay_where_training_reads_them(finished: Path) -> None:
    for round_ in ("round-0001", "round-0002"):
        for chunk in ("chunk-00000.parquet", "chunk-00001.parquet"):
            before, after = (
                pq.read_table(finished / which / round_ / "generate" / chunk) for which in ("all", "selected")
            )
            assert after.column("latents").null_count == after.num_rows > before.column("latents").null_count
            assert after.drop_columns("latents").equals(before.drop_columns("latents"))
            assert after.schema.equals(before.schema, check_metadata=True)
        rows = pq.read_table(finished / "selected" / round_ / "rows/rows.parquet")
        assert rows.num_rows and rows.column("latents").null_count == 0


def test_nothing_else_of_the_run_is_changed_by_it(finished: Path) -> None:
    every, selected = tree(finished / "all"), tree(finished / "selected")
    differ = {name for name in every | selected if every.get(name) != selected.get(name)}
    files = {"DROPPED.json", "chunk-00000.parquet", "chunk-00001.parquet"}
    rounds = {f"round-000{number}/generate/{name}" for number in (1, 2) for name in files}
    assert differ == {*rounds, "config.resolved.json", "config.yaml"}


def test_it_is_smaller(finished: Path) -> None:
    sizes = [
        sum(p.stat().st_size for p in (finished / which).rglob("generate/*.parquet")) for which in ("all", "selected")
    ]
    assert sizes[1] < sizes[0]


def test_verify_finds_all_whole_and_says_what_is_not_there(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(finished / "selected") == []
    assert main(["verify", str(finished / "selected")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "not here on purpose: the latents of what was generated and not kept of round 1, 2" in said
    assert "--from ROUND/generate` generates the same again" in said


def test_damage_after_it_is_seen(finished: Path, tmp_path: Path) -> None:
    root = copied(finished, tmp_path)
    path = root / "round-0001/generate/chunk-00000.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert any("chunk-00000.parquet has changed" in fault for fault in verify(root))
    (root / "round-0002/generate/DROPPED.json").write_text("{")
    assert any("does not say what was dropped" in fault for fault in verify(root))


def test_the_full_file_is_as_good_as_the_one_without(finished: Path, tmp_path: Path) -> None:
    """A copy of the run in which a file was restored from a backup made before."""
    root = copied(finished, tmp_path)
    shutil.copy(
        finished / "all/round-0001/generate/chunk-00000.parquet", root / "round-0001/generate/chunk-00000.parquet"
    )
    assert verify(root) == []
    resumed(root)
    assert tree(root) == tree(finished / "selected")


def test_a_finished_run_removes_latents_when_asked_later(finished: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(finished / "all", tmp_path / "run"))
    resumed(root)
    assert tree(root) == tree(finished / "selected")


def test_a_run_goes_on_after_it_with_replay(finished: Path, tmp_path: Path) -> None:
    replay = {"training": {"replay_rounds": 1}, "num_rounds": 3}
    run(config(tmp_path / "whole", **replay, **NONE), objects())
    run(config(tmp_path / "less", **replay, **NONE, keep_latents="selected"), objects())
    model = "round-0003/model/policy.json"
    assert (tmp_path / "whole" / model).read_bytes() == (tmp_path / "less" / model).read_bytes()


def test_training_can_be_redone_from_the_rows(finished: Path, tmp_path: Path) -> None:
    root = copied(finished, tmp_path)
    resumed(root, redo="2/train")
    assert tree(root) == tree(finished / "selected")


def test_another_selection_is_refused_with_the_way_to_do_it(finished: Path, tmp_path: Path) -> None:
    root, other = copied(finished, tmp_path), {"selection": {"rule": "top_m", "m": 2}}
    with pytest.raises(StoreError, match=r"latents were dropped \(keep_latents\).*--from 2/select,2/generate"):
        resumed(root, redo="2/select", **other)
    with pytest.raises(StoreError, match=r"gather of round 1 cannot be redone.*--from select,1/generate"):
        resumed(root, redo="select", **other)
    resumed(root, redo="select,1/generate", **other)
    run(config(tmp_path / "new", **NONE, **other, keep_latents="selected"), objects())
    assert tree(root) == tree(tmp_path / "new")


def test_a_what_if_reads_what_is_left_and_names_generate_in_what_to_do(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = copied(finished, tmp_path)
    assert main(["select", str(root), "--selection.rule", "top_m", "--selection.m", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rounds"] == [1, 2]
    assert "--from select,generate" in found["redo"] or "redo='select,generate'" in found["redo"]


def test_a_family_without_latents_has_no_latents_to_remove(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"keep_latents: selected means nothing to policy\.family: tabular"):
        run(tiny.config(tmp_path / "run", keep_latents="selected"), tiny.objects())


def test_another_reward_changes_what_is_kept_after_a_redraw(finished: Path, tmp_path: Path) -> None:
    root = copied(finished, tmp_path)
    run(config(root, keep_latents="selected", **NONE), objects(darkness), redo="score,generate")
    run(config(tmp_path / "new", keep_latents="selected", **NONE), objects(darkness))
    assert tree(root) == tree(tmp_path / "new")
