"""A line stays for each round; where nobody can watch a bar move, there is none."""

from __future__ import annotations

import io
import re
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from raftune.results.summary import rows_of, seconds_by_round, seconds_by_stage
from raftune.runtime import progress
from raftune.runtime.progress import Progress, RoundTable, StagePace
from raftune.runtime.run import run
from raftune.sanitize import duration
from tests.runs import tiny

OVERLAP = "4 of 4 held-out prompts are also trained on: what is measured on them flatters the policy"


def watched(root: Path, console: Console, **changes: Any) -> tuple[str, Progress]:
    with Progress(console) as progress:
        run(tiny.config(root, **changes), tiny.objects(), observe=progress)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue(), progress


def table(text: str) -> list[str]:
    """The lines after the first two: the labels of these runs are few, and they are trained on and judged by."""
    lines = text.splitlines()
    few = [line for line in lines[:1] if line.startswith("4 prompts are held out; the best round is chosen by 4")]
    warning, *lines = lines[len(few) :]
    assert warning == OVERLAP
    return [line for line in lines if not line.startswith("round 2: ")]  # of five answers four are often the same


def paper() -> Console:
    return Console(file=io.StringIO(), width=200, highlight=False)


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Console:
    monkeypatch.delenv("CI", raising=False)
    return Console(file=io.StringIO(), width=200, force_terminal=True, highlight=False, _environ={"TERM": "xterm"})


def test_off_a_terminal_there_is_one_plain_line_a_round(tmp_path: Path) -> None:
    text, progress = watched(tmp_path / "run", paper())
    lines = [line.split() for line in table(text)]
    assert [line[0] for line in lines] == ["round", "start", "1", "2"]
    assert "\x1b" not in text
    assert progress.worked
    assert progress.outcome["rounds"] == 2


def test_the_lines_say_what_is_on_disk(tmp_path: Path) -> None:
    text, _ = watched(tmp_path / "run", paper())
    for line, row in zip(table(text)[1:], rows_of(tmp_path / "run"), strict=True):
        assert f"{row['reward']:.3f}" in line
        assert f"{row['best_of_k']:.3f}" in line
    assert " 8/32 " in text


def test_columns_are_aligned_with_their_titles(tmp_path: Path) -> None:
    text, _ = watched(tmp_path / "run", paper())
    assert len({len(line) for line in table(text)}) == 1


def test_a_narrow_terminal_gets_fewer_columns_and_no_line_is_wrapped() -> None:
    row = {"round": 1, "reward": 0.5, "reward_low": 0.4, "reward_high": 0.6, "reward_n": 8, "k": 4, "best_of_k": 0.7}
    row |= {"kl": 0.25, "length": 12.5, "distinct_2": 0.875, "msttr": 0.8, "kept": 4, "samples": 16, "seconds": 71.0}
    wide = RoundTable().add(row)
    assert len(wide) == 2 and max(line.cell_len for line in wide) > 60
    narrow = RoundTable(width=60)
    said, titles, first = (str(line) for line in narrow.add(row))
    assert len(titles) == len(first) <= 60
    assert titles.split() == ["round", "reward", "(n=8)", "KL", "kept", "time"]
    assert said.startswith("too narrow for: best of 4, length, distinct-2, MSTTR")
    assert [column.key for column in narrow.columns] == ["round", "reward", "kl", "kept", "seconds"]
    assert str(RoundTable(width=10).add(row)[-1]).split() == ["1", "0.500", "±", "0.100"], (
        "the round and its reward stay, whatever the width"
    )


def test_held_out_prompts_that_are_trained_on_are_warned_of_once(tmp_path: Path) -> None:
    first, _ = watched(tmp_path / "run", paper(), num_rounds=1)
    again, _ = watched(tmp_path / "run", paper())
    assert first.splitlines().count(OVERLAP) == 1
    assert OVERLAP not in again


def test_a_run_that_learns_nothing_has_no_column_for_what_it_kept(tmp_path: Path) -> None:
    text, _ = watched(tmp_path / "run", paper(), num_rounds=0)
    assert table(text)[0].split()[-2:] == ["KL", "time"]


def test_a_finished_run_is_shown_and_nothing_was_worked_on(tmp_path: Path) -> None:
    watched(tmp_path / "run", paper())
    text, progress = watched(tmp_path / "run", paper())
    assert len(text.splitlines()) == 4
    assert not progress.worked


def test_what_changed_and_what_was_set_aside_is_reported(tmp_path: Path) -> None:
    watched(tmp_path / "run", paper())
    text, _ = watched(tmp_path / "run", paper(), num_rounds=3)
    assert "num_rounds: 2 → 3" in text


def test_on_a_terminal_a_bar_tells_the_stage_and_what_samples_are_worth(tmp_path: Path, screen: Console) -> None:
    text, _ = watched(tmp_path / "run", screen)
    assert "round 2/2 · scoring" in text
    assert "best of each" in text


def test_a_ci_job_gets_plain_lines_even_on_a_terminal(
    tmp_path: Path, screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", "true")
    text, _ = watched(tmp_path / "run", screen)
    assert "·" not in text


def test_a_run_that_fails_leaves_the_terminal_as_it_was(tmp_path: Path, screen: Console) -> None:
    def broken(**_: Any) -> list[float]:
        raise ValueError("no luck")

    with pytest.raises(Exception, match="could not be scored"), Progress(screen) as progress:
        run(tiny.config(tmp_path / "run"), tiny.objects(broken), observe=progress)
    assert isinstance(screen.file, io.StringIO)
    text = screen.file.getvalue()
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") > -1  # the cursor was hidden, and is shown again


def test_the_time_left_is_what_the_stages_took_before() -> None:
    pace = StagePace()
    pace.begin_round(1, 3)
    pace.spent[1]["generate"] = 20.0
    assert pace.left() == ""
    pace.spent[1]["train"] = 10.0
    pace.begin_round(2, 3)
    pace.spent[2]["generate"] = 30.0
    assert pace.left() == "about 40 s left"  # the tune of round 2, then draw and tune of round 3 as round 1 took them


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (42.4, "42 s"), (59.6, "1 min 00 s"), (190, "3 min 10 s"), (7500, "2 h 05 min")],
)
def test_durations_are_in_the_chunk_that_a_person_would_use(seconds: float, words: str) -> None:
    assert duration(seconds) == words


# -- a long stage, off a terminal --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_off_a_terminal_a_stage_that_takes_long_is_named_and_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SOON", 0.2)
    monkeypatch.setattr(progress, "QUIET", 0.5)
    calls: list[int] = []

    def slow(prompts: list[int], completions: list[int], **_: Any) -> list[float]:
        calls.append(len(completions))
        time.sleep(1.3 if len(calls) in (2, 3) else 0.0)  # the units of round 1
        return [float(answer) for answer in completions]

    console = paper()
    with Progress(console) as watching:
        evaluation = {"num_prompts": 4, "num_generations": 2}
        run(
            tiny.config(tmp_path / "run", num_rounds=1, evaluation=evaluation),
            tiny.objects(slow),
            observe=watching,
        )
    assert isinstance(console.file, io.StringIO)
    lines = [line for line in console.file.getvalue().splitlines() if "scoring" in line and "held-out" not in line]
    assert lines[0] == "round 1/1 · scoring"
    assert any(re.search(r"scoring: .*1 of 2 units.* so far, about .* left", line) for line in lines), lines


def test_the_time_of_a_round_counts_what_earlier_sessions_spent_on_it() -> None:
    def event(kind: str, round_: int, stage: str, seconds: float | None = None) -> dict[str, Any]:
        return {"event": kind, "round": round_, "stage": stage, **({} if seconds is None else {"seconds": seconds})}

    events = [
        event("stage_begin", 1, "generate"),
        event("chunk", 1, "generate", 5.0),  # then a SIGKILL
        event("stage_begin", 1, "generate"),
        event("chunk", 1, "generate", 7.0),
        event("stage_stop", 1, "generate", 9.0),  # Ctrl-C
        event("stage_begin", 1, "generate"),
        event("chunk", 1, "generate", 3.0),
        event("stage_end", 1, "generate", 4.0),
        event("stage_end", 2, "generate", 1.0),
    ]
    assert seconds_by_round(events) == {1: 5.0 + 9.0 + 4.0, 2: 1.0}
    assert seconds_by_stage(events) == {1: {"generate": 18.0}, 2: {"generate": 1.0}}


@pytest.mark.slow
def test_a_resumed_round_is_shown_with_the_time_of_the_session_that_was_interrupted(tmp_path: Path) -> None:
    def stop(kind: str, facts: dict[str, Any]) -> None:
        if kind == "chunk" and facts["stage"] == "generate":
            time.sleep(1.2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny.config(tmp_path / "run", num_rounds=1), tiny.objects(), observe=stop)
    console = paper()
    with Progress(console) as watching:
        run(tiny.config(tmp_path / "run", num_rounds=1), tiny.objects(), observe=watching)
    [seconds] = [row["seconds"] for row in rows_of(tmp_path / "run") if row["round"] == 1]
    assert seconds >= 1.2
    assert isinstance(console.file, io.StringIO)
    assert float(console.file.getvalue().splitlines()[-1].split()[-2]) >= 1.2
