"""Unfinished work is saved about once a minute, at no more than a twentieth of the time, and at once before a stop."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from raftune.store import interruption, partial
from raftune.store.partial import AT_A_STOP, SavePace, current, unfinished_work


class Clock:
    """A clock that stands still until it is told to go on."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(partial, "time", found)
    return found


@pytest.fixture(autouse=True)
def calm() -> Iterator[None]:
    yield
    interruption.forget()


def test_what_is_small_is_saved_once_a_minute(clock: Clock) -> None:
    pace = SavePace()
    saved = []
    for second in range(1, 601):
        clock.now = 1000.0 + second
        if pace.due(lambda: 1000):
            pace.took(0.01, 1000)
            saved.append(second)
    assert saved == list(range(60, 601, 60))


@pytest.mark.parametrize("rate", [20e6, 100e6, 2e9])
def test_saving_takes_no_more_than_a_twentieth_of_the_time(clock: Clock, rate: float) -> None:
    """Of ten gigabytes, on disks from slow to fast; the first save goes by a guess of 200 MB a second."""
    pace, nbytes, spent, first = SavePace(), int(10e9), 0.0, None
    for _ in range(200_000):
        clock.now += 1.0
        if pace.due(lambda: nbytes):
            clock.now += nbytes / rate
            pace.took(nbytes / rate, nbytes)
            first = first or nbytes / rate
            spent += nbytes / rate
    assert first is not None and 0 < spent - first <= partial.SHARE * 200_000


def test_a_stop_saves_at_once_what_takes_no_longer_than_one_waits(clock: Clock) -> None:
    pace = SavePace()
    assert not pace.due(lambda: 1000)
    interruption.ask_to_stop()
    assert pace.due(lambda: 1000)
    assert not pace.due(lambda: int(2 * AT_A_STOP * pace.rate))
    clock.now += 31
    assert "the last 31 s of work are lost" in pace.promise(lambda: int(2 * AT_A_STOP * pace.rate))


def test_outside_of_a_chunk_nothing_is_saved_and_a_stop_takes_effect() -> None:
    part = current("anything")
    assert part.find() is None
    part.step(lambda path: pytest.fail("there is no place for it"))
    interruption.ask_to_stop()
    with pytest.raises(KeyboardInterrupt):
        part.step(lambda path: pytest.fail("there is no place for it"))


def test_a_full_disk_keeps_no_unfinished_work_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial, "SAVE_EVERY", 0.0)

    def full(path: Path) -> None:
        path.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with unfinished_work(tmp_path / "generate", tmp_path / "tmp", "00003", "key", {}):
        current("text").step(lambda path: path.write_text("first") and None)
        current("text").step(full)
        found = current("text").find()
        assert found is not None and found.read_text() == "first"
    assert not list((tmp_path / "generate").iterdir()) and not list((tmp_path / "tmp").iterdir())
