"""A run that is killed at any file event, and run again, ends with the same bytes as one that was never interrupted."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from tests.runs.kill import harness

pytestmark = pytest.mark.slow

Report = dict[str, Any]
# Each in a process of its own.
TRIALS = {
    "plain": "plain",
    "everything": "everything",
    "reported": "reported --every 9",
    "dropping": "dropping",
    "latents": "latents",
    "redo": "redo --every 7",
    "redo-retried": "redo-retried --every 8",
    "redo-evaluation": "redo-evaluation --every 9",
    "rescored": "rescored --every 29",
    "rescored-retried": "rescored-retried --every 31",
    "in-place": "plain --broken in-place --until 'is not valid JSON'",
    "names": "everything --broken names --until 'cannot be read'",
    "order": "plain --broken order --until 'is missing'",
}


@pytest.fixture(scope="module")
def report_of() -> Callable[[str], Report]:
    return cache(lambda name: harness(TRIALS[name]))


@pytest.mark.parametrize("scenario", ["plain", "everything"])
def test_a_kill_at_any_file_event_leaves_no_trace(report_of: Callable[[str], Report], scenario: str) -> None:
    report = report_of(scenario)
    assert report["faults"] == []
    assert report["trials"] == len(report["events"]) > 150


def test_every_stage_was_among_what_was_killed(report_of: Callable[[str], Report]) -> None:
    plain, everything = report_of("plain")["events"], report_of("everything")["events"]
    judged = ("evaluate/generate", "evaluate/reference", "evaluate")
    for stage in ("plan", "generate", "score", "select", "rows", "model", *judged):
        assert f"os.mkdir round-0001/{stage}" in plain
    for stage in ("plan", "teach", "logp", "logp-start", "model"):
        assert f"os.mkdir round-0002/{stage}" in everything


@pytest.mark.parametrize("scenario", ["plain", "everything"])
def test_nothing_is_ever_written_at_the_place_where_it_is_read(
    report_of: Callable[[str], Report], scenario: str
) -> None:
    """But for the lines that are added to the record of times, and to the journal entries of a stage that is not
    committed.
    """
    opened = {event.removeprefix("open ") for event in report_of(scenario)["events"] if event.startswith("open ")}
    elsewhere = {name for name in opened if not name.startswith("tmp/")}
    assert {name for name in elsewhere if not name.endswith("/_journal.jsonl")} == {"LOCK", "events.jsonl"}


def test_a_kill_while_the_page_is_written_leaves_no_trace(report_of: Callable[[str], Report]) -> None:
    assert report_of("reported")["faults"] == []


def test_a_kill_while_models_are_dropped_leaves_no_trace(report_of: Callable[[str], Report]) -> None:
    report = report_of("dropping")
    assert report["faults"] == []
    assert report["trials"] == len(report["events"])
    assert "os.remove round-0001/model/policy.json" in report["events"]


def test_a_kill_while_latents_are_dropped_leaves_no_trace(report_of: Callable[[str], Report]) -> None:
    report = report_of("latents")
    assert report["faults"] == []
    assert report["trials"] == len(report["events"]) > 100


@pytest.mark.parametrize("scenario", ["redo", "redo-retried", "redo-evaluation"])
def test_a_kill_while_a_stage_is_redone_leaves_what_a_new_run_would_have(
    report_of: Callable[[str], Report], scenario: str
) -> None:
    report = report_of(scenario)
    assert report["faults"] == []
    assert report["trials"] > 30


@pytest.mark.parametrize("scenario", ["rescored", "rescored-retried"])
def test_a_kill_while_failed_samples_are_scored_again_leaves_all_other_scores_as_they_were(
    report_of: Callable[[str], Report], scenario: str
) -> None:
    report = report_of(scenario)
    assert report["faults"] == []
    assert report["trials"] > 10


@pytest.mark.parametrize("way", ["in-place", "names", "order"])
def test_the_harness_sees_a_store_that_breaks_its_promise(report_of: Callable[[str], Report], way: str) -> None:
    sign = TRIALS[way].split("'")[1]
    faults = report_of(way)["faults"]
    assert sign in faults[-1]
