"""The page says what a run was made of: every field against its default, every hash, every time."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from raftune.config.policy import CausalLMPolicy
from raftune.report import collect
from raftune.report.provenance import configuration, field_row, fields_of
from raftune.runtime.run import run
from raftune.store.run import RunFolder
from tests.runs import tiny


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finished") / "run"
    run(tiny.config(root, seed=7, selection={"rule": "top_m", "m": 2}), tiny.objects())
    return root


@pytest.fixture(scope="module")
def html(root: Path) -> str:
    return configuration(collect(root))


def row(html: str, name: str) -> str:
    found = re.search(rf"<tr[^>]*><th[^>]*><code>{re.escape(name)}</code></th>.*?</tr>", html)
    assert found is not None, name
    return found[0]


def test_a_changed_field_is_shown_beside_its_default(html: str) -> None:
    assert re.fullmatch(r'<tr class="changed">.*<td>top_m</td><td>best_of_k</td></tr>', row(html, "selection.rule"))
    assert re.fullmatch(r'<tr class="changed">.*<td>7</td><td>0</td></tr>', row(html, "seed"))
    assert row(html, "sampling.temperature").startswith("<tr><th")


def test_a_field_without_a_default_is_listed_as_required() -> None:
    rows = {name: field_row(name, info, value) for name, info, value in fields_of(CausalLMPolicy(model="gpt2"))}
    assert (rows["model"]["value"], rows["model"]["default"]) == ("gpt2", "required")
    assert rows["dtype"]["default"] != "required"


def test_every_field_says_what_it_does_and_none_says_where_it_lay(html: str, root: Path) -> None:
    assert 'title="Seed of all randomness."' in row(html, "seed")
    assert str(root) not in html


def test_the_configuration_is_shown_as_it_was_written(html: str) -> None:
    assert "rule: top_m\n  m: 2" in html


def test_every_stage_has_its_key_and_its_time(html: str, root: Path) -> None:
    folder = RunFolder(root)
    for round_, name in folder.places():
        commit = folder.commit(round_, name)
        if commit is not None:
            assert f"{round_} · {name}" in html
            assert f'<code title="{commit.key}">{commit.key[:12]}</code>' in html
    seconds = next(event["seconds"] for event in folder.events if event["event"] == "stage_end")
    assert "evaluation generate" in html
    assert isinstance(seconds, float)


def test_the_start_and_the_prompts_are_known_by_their_hashes(html: str, root: Path) -> None:
    for stage, name in (("model", "policy.json"), ("data", "train.parquet")):
        commit = RunFolder(root).commit(0, stage)
        assert commit is not None
        assert commit.files[name].sha256 in html
