"""A run that is killed at any file event, and run again, ends with the same bytes as one that was never interrupted."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from tests.runs.kill import harness

Report = dict[str, Any]
# The harness runs in processes of its own, two at a time, all started at the first test.
TRIALS = {
    "plain": "plain",
    "everything": "everything",
    "reported": "reported --every 9",
    "dropping": "dropping --every 5",
    "latents": "latents",
    "redo": "redo --every 7",
    "redo-retried": "redo-retried --every 8",
    "redo-evaluation": "redo-evaluation --every 9",
    "in-place": "plain --most 60 --broken in-place",
    "names": "plain --most 90 --broken names",
    "order": "plain --every 2 --most 60 --broken order",
}


@pytest.fixture(scope="module")
def report_of() -> Iterator[Callable[[str], Report]]:
    with ThreadPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
        futures: dict[str, Future[Report]] = {name: pool.submit(harness, text) for name, text in TRIALS.items()}
        yield lambda name: futures[name].result()
        for future in futures.values():
            future.cancel()


@pytest.mark.parametrize("scenario", ["plain", "everything"])
def test_a_kill_at_any_file_event_leaves_no_trace(report_of: Callable[[str], Report], scenario: str) -> None:
    report = report_of(scenario)
    assert report["faults"] == []
    assert report["trials"] == len(report["events"]) > 250


def test_every_stage_was_among_what_was_killed(report_of: Callable[[str], Report]) -> None:
    plain, everything = report_of("plain")["events"], report_of("everything")["events"]
    for stage in (
        "plan",
        "draw",
        "score",
        "select",
        "rows",
        "model",
        "evaluate/draw",
        "evaluate/reference",
        "evaluate",
    ):
        assert f"os.mkdir round-0002/{stage}" in plain
    for stage in ("teach", "logp", "logp-start"):
        assert f"os.mkdir round-0002/{stage}" in everything


def test_a_kill_while_the_page_is_written_leaves_no_trace(report_of: Callable[[str], Report]) -> None:
    assert report_of("reported")["faults"] == []


def test_a_kill_while_models_are_dropped_leaves_no_trace(report_of: Callable[[str], Report]) -> None:
    report = report_of("dropping")
    assert report["faults"] == []
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


@pytest.mark.parametrize(
    ("way", "sign"), [("in-place", "is not valid JSON"), ("names", "cannot be read"), ("order", "is missing")]
)
def test_the_harness_sees_a_store_that_breaks_its_promise(
    report_of: Callable[[str], Report], way: str, sign: str
) -> None:
    faults = report_of(way)["faults"]
    assert any(sign in fault for fault in faults), faults
