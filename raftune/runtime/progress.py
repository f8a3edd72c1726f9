"""Progress of a run: bars, and one line for each round."""

from __future__ import annotations

import importlib.util
import math
import os
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.text import Text

from raftune.results.summary import (
    SummaryColumn,
    cell,
    columns_for,
    overlap_warning,
    row_of,
    seconds_by_round,
    selection_words,
)
from raftune.sanitize import counted, duration, one_line
from raftune.store import pulse
from raftune.store.commit import folder_of
from raftune.store.layout import chunk_file
from raftune.store.run import RunFolder

VERBS = {
    "data": "reading the prompts",
    "start": "checking the start model",
    "prompts": "asking the model whether it reads the prompts",
    "teacher": "checking the teacher",
    "parity": "checking how the model generates",
    "plan": "planning",
    "generate": "generating",
    "teach": "asking the teacher",
    "score": "scoring",
    "logp": "log-probabilities",
    "logp-start": "log-probabilities of the start",
    "select": "selecting",
    "gather": "gathering",
    "train": "training",
    "evaluate": "measuring",
    "evaluation plan": "planning the evaluation",
    "evaluation generate": "generating held-out completions",
    "evaluation score": "scoring held-out completions",
    "evaluation judge": "held-out rewards",
    "evaluation logp": "log-probabilities, held out",
    "evaluation logp-start": "log-probabilities of the start, held out",
    "evaluation reference": "log-probabilities of reference completions",
    "guard": "checking for alarms",
}
SOON = 3.0  # seconds of a stage after which a line names it, where there is no bar
MATTERS = ("round", "reward", "held_out", "kl", "kept", "seconds")  # columns that a narrow terminal keeps longest
QUIET = 30.0  # seconds without a line after which one says how far the stage is


class _Display:
    """One moving line on a terminal (not of a CI job) or in a notebook with widgets; plain lines elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        if self.console.is_jupyter:
            self._moves = importlib.util.find_spec("ipywidgets") is not None
        else:
            self._moves = self.console.is_terminal and not self.console.is_dumb_terminal and not os.environ.get("CI")
        self._task: TaskID | None = None
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[worth]}", markup=False),
            TextColumn("{task.fields[left]}", style="dim", markup=False),
            console=self.console,
            transient=True,
            disable=not self._moves,
        )

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._moves:  # otherwise rich would print an empty line
            self._bars.stop()

    def _set_task(self, title: str | None) -> None:
        """Replaces the moving line; None removes it."""
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._task = None if title is None else self._bars.add_task(title, total=None, worth="", left="")

    def _update(self, **fields: Any) -> None:
        if self._task is not None:
            self._bars.update(self._task, **fields)

    def _print(self, line: str | Text, style: str = "dim") -> None:
        self.console.print(Text(line, style=style) if isinstance(line, str) else line, soft_wrap=True)


class StepProgress(_Display):
    """`with StepProgress() as steps: steps.begin("training"); steps.advance(3, 100)`."""

    def begin(self, title: str) -> None:
        """Starts the next step."""
        self._title = title
        self._began = self._printed = time.monotonic()
        if not self._moves:
            self._print(title)
        self._set_task(title)

    def advance(self, done: int, of: int) -> None:
        """Shows how much of the step is done."""
        now = time.monotonic()
        remaining = f"about {duration((now - self._began) * (of - done) / max(done, 1))} left"
        self._update(completed=done, total=of, left=remaining)
        if not self._moves and now - self._printed > QUIET:
            self._printed = now
            self._print(f"{self._title}: {done:,} of {of:,}, {remaining}")

    def note(self, words: str) -> None:
        """Prints a line that stays."""
        self._print(words)


class Progress(_Display):
    """An observer of a run: `with Progress() as observe: raftune.run(config, observe=observe)`.

    On a terminal and in a notebook a bar shows the stage, the rewards so far and the time left; elsewhere (a file, a CI
    job) there is one plain line a round, one for each stage that takes long, and one every half minute with the stage's
    progress. `worked` tells afterwards whether anything had to be done.
    """

    def __init__(self, console: Console | None = None, held_out: tuple[str, ...] = ()) -> None:
        super().__init__(console)
        self.worked = False
        self.outcome: dict[str, Any] = {}
        self._table = RoundTable(held_out, self.console.width if self.console.is_terminal else None)
        self._pace = StagePace()
        self._tally = SampleTally()
        self._run = RunFolder(".")
        self._of = 0
        self._notes: set[str] = set()
        self._stage: StageProgress | None = None
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._watcher.start()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._watcher.join()
        super().__exit__()

    def _watch(self) -> None:
        """In a thread: shows the progress inside a stage that reports no chunk for long."""
        while not self._over.wait(0.5):
            if (stage := self._stage) is None:
                continue
            now = time.monotonic()
            if self._moves:
                if pulse.now() is not None:
                    self._update(worth=stage.so_far(), left=stage.left(now))
            elif stage.printed is None:
                if now - stage.began >= SOON:
                    stage.printed = now
                    self._print(stage.title)
            elif now - stage.printed >= QUIET:
                stage.printed = now
                parts = [stage.so_far(), f"{duration(now - stage.began)} so far", stage.left(now)]
                self._print(f"{stage.title}: {', '.join(filter(None, parts))}")

    def __call__(self, kind: str, facts: dict[str, Any]) -> None:
        if handler := getattr(self, f"_on_{kind}", None):
            handler(**facts)
            self._update(worth=self._tally.words(), left=self._pace.left())

    def _on_begin(self, root: str, set_aside: list[str], changed: dict[str, Any], **_: Any) -> None:
        self._run = RunFolder(root)
        self._pace.before = seconds_by_round(self._run.events)
        if set_aside:
            self._print(f"set aside, to superseded/: {', '.join(set_aside[:6])}{' …' if len(set_aside) > 6 else ''}")
        for name, (old, new) in sorted(changed.items()):
            self._print(f"{name}: {old} → {new}")

    def _on_round_begin(self, round: int, of: int, **_: Any) -> None:
        self._of = of
        self._pace.begin_round(round, of)

    def _on_stage_begin(self, round: int, stage: str, **_: Any) -> None:
        label, verb = f"round {round}/{self._of}" if round else "start", VERBS.get(stage, stage)
        if not self.worked and (round, stage) != (0, "data"):  # not the first stage of a run
            self._print(f"taken up at {label}, {verb}")
        self.worked = True
        if stage in ("generate", "evaluation generate"):
            self._tally = SampleTally()
        self._stage = StageProgress(f"{label} · {verb}")
        self._set_task(self._stage.title)

    def _on_chunks(self, stage: str, total: int, found: int, **_: Any) -> None:
        if self._stage is not None:
            self._stage.chunks = (found, total)
        if found:
            self._print(f"{VERBS.get(stage, stage)}: {found} of {total} chunks were there already")
        self._update(total=total, completed=found)

    def _on_chunk(self, round: int, stage: str, chunk: int, notes: list[str], **_: Any) -> None:
        self._print_notes(notes)
        if self._stage is not None:
            self._stage.chunks = (self._stage.chunks[0] + 1, self._stage.chunks[1])
            pulse.clear()
        if self._moves and self._task is not None:
            folder = self._run.folder(round, folder_of(stage))
            self._tally.add(folder / chunk_file(chunk), stage)
            self._bars.advance(self._task)

    def _on_stage_end(self, round: int, stage: str, seconds: float, notes: Sequence[str] = (), **_: Any) -> None:
        self._print_notes(notes)
        self._stage = None
        self._pace.spent[round][stage] = seconds
        if stage == "data" and (warning := overlap_warning(self._run.root)):
            self._print(warning, "yellow")

    def _on_round_end(
        self,
        round: int,
        metrics: dict[str, Any],
        summary: dict[str, Any],
        alarms: Sequence[dict[str, Any]] = (),
        **_: Any,
    ) -> None:
        seconds = self._pace.seconds_of(round)
        for line in self._table.add(row_of(round, metrics, summary, seconds), learns=self._of > 0):
            self._print(line)
        if seconds is not None:
            for words in selection_words(summary):
                self._print(f"round {round}: {words}")
            if (empty := len(summary.get("empty_prompts", ()))) > summary.get("nothing_to_rank", 0):
                prompts = counted(empty, "prompt")
                self._print(f"round {round}: {prompts} without kept samples (select/summary.json says why)")
        for alarm in alarms:
            words = one_line(f"{alarm['title'][:1].lower()}{alarm['title'][1:]}: {alarm['evidence']}")
            self._print(f"round {round}, look: {words}", "yellow")

    def _on_end(self, **facts: Any) -> None:
        self.outcome = facts
        self._set_task(None)

    def _print_notes(self, notes: Sequence[str]) -> None:
        for note in dict.fromkeys(notes):
            if note not in self._notes:
                self._notes.add(note)
                self._print(note)


@dataclass
class StageProgress:
    """The current stage: its title, its chunks (done, of), when it started and when a line was last printed for it."""

    title: str
    chunks: tuple[int, int] = (0, 0)
    began: float = field(default_factory=time.monotonic)
    printed: float | None = None
    start: float | None = None  # the share that was done at the first call of `left`

    def so_far(self) -> str:
        """Counts of chunks done, and of what the current chunk reports."""
        work, (done, of) = pulse.now(), self.chunks
        parts = [f"{done} of {of} units"] if of > 1 else []
        parts += [f"{work.done:,} of {work.of:,} {work.things}"] if work is not None else []
        return ", ".join(parts)

    def left(self, now: float) -> str:
        """The time left at the rate so far; empty before it can be estimated."""
        work, (done, of) = pulse.now(), self.chunks
        share = work.done / work.of if work is not None and work.of else 0.0
        if of:
            share = (done + share) / of
        if self.start is None:
            self.start = share
        gained = share - self.start
        return f"about {duration((now - self.began) * (1 - share) / gained)} left" if gained > 0.01 else ""


@dataclass
class RoundTable:
    """The table by round, a line at a time: the columns are those of the first round that has numbers.

    On a terminal of `width` characters the least important columns are left out, until a line fits.
    """

    held_out: tuple[str, ...] = ()
    width: int | None = None
    columns: list[SummaryColumn] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)

    def add(self, row: dict[str, Any], learns: bool = True) -> list[Text]:
        """The row's line, the first time after a line of titles. `learns`: whether there will be kept samples."""
        lines = []
        if not self.columns:
            promised: dict[str, Any] = {"kept": 0, "samples": 0} if learns else {}
            self.columns = columns_for([row | promised | {"seconds": 0.0}], self.held_out)
            self.widths = [max(len(c.title), 6, len(cell(c, row)) + 2 * (c.key == "reward")) for c in self.columns]
            left_out: list[str] = []
            while self.width and sum(self.widths) + 2 * (len(self.widths) - 1) > self.width:
                spare = [i for i, column in enumerate(self.columns) if column.key not in MATTERS]
                spare = spare or [*range(2, len(self.columns))]
                if not spare:
                    break
                left_out.insert(0, self.columns.pop(spare[-1]).title)
                del self.widths[spare[-1]]
            if left_out:
                lines.append(Text(f"too narrow for: {', '.join(left_out)} (report.html has them)", style="dim"))
            lines.append(Text(self._joined([column.title for column in self.columns]), style="bold"))
        lines.append(Text(self._joined([cell(column, row) for column in self.columns])))
        return lines

    def _joined(self, cells: list[str]) -> str:
        return "  ".join(text.rjust(width) for text, width in zip(cells, self.widths, strict=True))


class SampleTally:
    """Running means of the current round: reward, best of each prompt, length."""

    def __init__(self) -> None:
        self.scores: dict[str, list[float]] = defaultdict(list)
        self.tokens = self.samples = 0

    def add(self, path: Path, stage: str) -> None:
        """Reads a chunk file that was just committed."""
        import pyarrow.compute as pc

        from raftune.store.parquet import column_names, read_table

        if stage.endswith("generate") and "completion_ids" in column_names(path):
            lengths = pc.list_value_length(read_table(path, ["completion_ids"]).column("completion_ids"))
            self.tokens += pc.sum(lengths).as_py() or 0
            self.samples += len(lengths)
        elif stage.endswith("score"):
            table = read_table(path, ["prompt_id", "score"])
            for name, score in zip(*(table.column(name).to_pylist() for name in table.column_names), strict=True):
                if score is not None and math.isfinite(score):
                    self.scores[name].append(score)

    def words(self) -> str:
        parts = []
        if self.scores:
            scores = [score for group in self.scores.values() for score in group]
            best = [max(group) for group in self.scores.values()]
            parts.append(f"reward {sum(scores) / len(scores):.3f} · best of each {sum(best) / len(best):.3f}")
        if self.samples:
            parts.append(f"length {self.tokens / self.samples:.0f}")
        return " · ".join(parts)


class StagePace:
    """How long stages take (`spent`, by round and stage), and the time left that follows from it."""

    def __init__(self) -> None:
        self.round = self.of = 0
        self.spent: dict[int, dict[str, float]] = defaultdict(dict)
        self.before: dict[int, float] = {}  # seconds that earlier sessions spent on the rounds

    def begin_round(self, round_: int, of: int) -> None:
        self.round, self.of = round_, of

    def seconds_of(self, round_: int) -> float | None:
        """Seconds spent on the round, by earlier sessions too; None where this one had nothing to do."""
        return self.before.get(round_, 0.0) + sum(self.spent[round_].values()) if round_ in self.spent else None

    def left(self) -> str:
        """The time left if stages take as long as in earlier rounds; empty before there is one."""
        times: dict[str, list[float]] = defaultdict(list)
        for number in range(1, self.round):
            for name, seconds in self.spent.get(number, {}).items():
                times[name].append(seconds)
        if not times:
            return ""
        mean = {name: sum(seconds) / len(seconds) for name, seconds in times.items()}
        done = self.spent.get(self.round, {})
        seconds_left = sum(mean.values()) * (self.of - self.round)
        return f"about {duration(seconds_left + sum(mean[name] for name in mean if name not in done))} left"
