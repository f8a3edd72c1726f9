"""Progress of a run: bars, and one line for each round."""

from __future__ import annotations

import importlib.util
import math
import os
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
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
    "evaluation generate": "generating held-out answers",
    "evaluation score": "scoring held-out answers",
    "evaluation judge": "held-out rewards",
    "evaluation logp": "log-probabilities, held out",
    "evaluation logp-start": "log-probabilities of the start, held out",
    "evaluation reference": "log-probabilities of reference answers",
    "guard": "checking for alarms",
}
BEGINNING = (0, "data")  # the first stage of a run
SOON = 3.0  # seconds of a stage after which a line names it, where there is no bar
MATTERS = ("round", "reward", "held_out", "kl", "kept", "seconds")  # columns that a narrow terminal keeps longest
QUIET = 30.0  # seconds without a line after which one says how far the stage is


class Progress:
    """An observer of a run: `with Progress() as observe: raftune.run(config, observe=observe)`.

    On a terminal and in a notebook a bar shows the stage, what the samples so far are worth and the time left;
    elsewhere (a file, a CI job) there is one plain line a round, one for each stage that takes long, and one every half
    minute that says how far it is. `worked` tells afterwards whether anything had to be done.
    """

    def __init__(self, console: Console | None = None, held_out: tuple[str, ...] = ()) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self.held_out = held_out
        self.worked = False
        self.outcome: dict[str, Any] = {}
        self._table = RoundTable(held_out, self.console.width if self.console.is_terminal else None)
        self._pace = StagePace()
        self._tally = SampleTally()
        self._bars = bars(self.console) if moves(self.console) else None
        self._task: TaskID | None = None
        self._root = Path()
        self._of = 0
        self._notes: set[str] = set()
        self._stage: StageProgress | None = None
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._watcher.join()
        if self._bars is not None:
            self._bars.stop()

    def _watch(self) -> None:
        """Says, on a thread of its own, how far a stage is that says nothing for long; a bar is moved."""
        while not self._over.wait(0.5):
            stage, now = self._stage, time.monotonic()
            if stage is None:
                continue
            if self._bars is not None:
                if pulse.now() is not None and self._task is not None:
                    self._bars.update(self._task, worth=stage.so_far(), left=stage.left(now))
            elif not stage.named and now - stage.began >= SOON:
                stage.named, stage.said = True, now
                self._say(stage.title)
            elif stage.named and now - stage.said >= QUIET:
                stage.said = now
                self._say(stage.words(now))

    def __call__(self, kind: str, facts: dict[str, Any]) -> None:
        if handler := getattr(self, f"_on_{kind}", None):
            handler(**facts)

    # -- what happens ------------------------------------------------------------------------------------------------

    def _on_begin(self, root: str, set_aside: list[str], changed: dict[str, Any], **_: Any) -> None:
        self._root = Path(root)
        self._pace.before = seconds_by_round(RunFolder(root).events)
        if set_aside:
            self._say(f"set aside, to superseded/: {', '.join(set_aside[:6])}{' …' if len(set_aside) > 6 else ''}")
        for name, (old, new) in sorted(changed.items()):
            self._say(f"{name}: {old} → {new}")

    def _on_round_begin(self, round: int, of: int, **_: Any) -> None:
        self._of = of
        self._pace.begin_round(round, of)

    def _on_stage_begin(self, round: int, stage: str, **_: Any) -> None:
        if not self.worked and (round, stage) != BEGINNING:
            self._say(f"taken up at {self._where(round)}, {VERBS.get(stage, stage)}")
        self.worked = True
        if stage in ("generate", "evaluation generate"):
            self._tally = SampleTally()
        self._stage = StageProgress(f"{self._where(round)} · {VERBS.get(stage, stage)}")
        if self._bars is None:
            return
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._task = self._bars.add_task(
            f"{self._where(round)} · {VERBS.get(stage, stage)}", total=None, worth=self._tally.words(), left=""
        )
        self._show()

    def _on_chunks(self, stage: str, total: int, found: int, **_: Any) -> None:
        if self._stage is not None:
            self._stage.chunks = (found, total)
        if found:
            self._say(f"{VERBS.get(stage, stage)}: {found} of {total} units were there already")
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, total=total, completed=found)

    def _on_chunk(self, round: int, stage: str, chunk: int, notes: list[str], **_: Any) -> None:
        self._note(notes)
        if self._stage is not None:
            self._stage.chunks = (self._stage.chunks[0] + 1, self._stage.chunks[1])
            pulse.clear()
        if self._bars is not None and self._task is not None:
            self._tally.add(self._root / f"round-{round:04d}", stage, chunk)
            self._bars.advance(self._task)
            self._show()

    def _on_stage_end(self, round: int, stage: str, seconds: float, notes: Sequence[str] = (), **_: Any) -> None:
        self._note(notes)
        self._stage = None
        self._pace.add(round, stage, seconds)
        if stage == "data" and (warning := overlap_warning(self._root)):
            self._print(Text(warning, style="yellow"))
        self._show()

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
        for words in selection_words(summary) if seconds is not None else ():
            self._say(f"round {round}: {words}")
        if len(summary.get("barren", ())) > summary.get("nothing_to_rank", 0) and seconds is not None:
            without_candidates = counted(len(summary["barren"]), "prompt")
            self._say(f"round {round}: {without_candidates} yielded nothing (select/summary.json says why)")
        for alarm in alarms:
            self._print(Text(f"round {round}, look: {alarm_words(alarm)}", style="yellow"))

    def _on_end(self, **facts: Any) -> None:
        self.outcome = facts
        if self._bars is not None and self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None

    # -- how it is shown -----------------------------------------------------------------------------------------------

    def _where(self, round_: int) -> str:
        return f"round {round_}/{self._of}" if round_ else "start"

    def _show(self) -> None:
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, worth=self._tally.words(), left=self._pace.left())

    def _note(self, notes: Sequence[str]) -> None:
        """Says what was not said yet."""
        for note in notes:
            if note not in self._notes:
                self._notes.add(note)
                self._say(note)

    def _say(self, words: str) -> None:
        self._print(Text(words, style="dim"))

    def _print(self, text: Text) -> None:
        console = self._bars.console if self._bars is not None else self.console
        console.print(text, soft_wrap=True)


@dataclass
class StageProgress:
    """A stage under way: its title, its chunks (done, of), when it began and when a line last spoke of it."""

    title: str
    chunks: tuple[int, int] = (0, 0)
    began: float = field(default_factory=time.monotonic)
    said: float = 0.0
    named: bool = False
    start: float | None = None  # the share that was done when the stage was first asked

    def share(self) -> float:
        """How much of the stage is done, 0 … 1."""
        word, (done, of) = pulse.now(), self.chunks
        inside = word.done / word.of if word is not None and word.of else 0.0
        return (done + inside) / of if of else inside

    def so_far(self) -> str:
        """What is done, counted: units, and what the one under way has come to."""
        word, (done, of) = pulse.now(), self.chunks
        parts = [f"{done} of {of} units"] if of > 1 else []
        parts += [f"{word.done:,} of {word.of:,} {word.things}"] if word is not None else []
        return ", ".join(parts)

    def left(self, now: float) -> str:
        """How long the rest will take at the rate so far; empty before that can be told."""
        share = self.share()
        if self.start is None:
            self.start = share
        done = share - self.start
        return f"about {duration((now - self.began) * (1 - share) / done)} left" if done > 0.01 else ""

    def words(self, now: float) -> str:
        parts = [self.so_far(), f"{duration(now - self.began)} so far", self.left(now)]
        return f"{self.title}: {', '.join(filter(None, parts))}"


@dataclass
class RoundTable:
    """The table by round, a line at a time: the columns are those of the first round that has numbers.

    On a terminal of `width` characters those are left out that matter least, until a line fits.
    """

    held_out: tuple[str, ...] = ()
    width: int | None = None
    columns: list[SummaryColumn] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)

    def add(self, row: dict[str, Any], learns: bool = True) -> list[Text]:
        """The row's line; before the first, the line of titles. A run that `learns` will have kept samples to show."""
        lines = []
        if not self.columns:
            promised: dict[str, Any] = {"kept": 0, "samples": 0} if learns else {}
            promised["seconds"] = 0.0
            self.columns = columns_for([row | promised], self.held_out)
            left_out = self._fit(row)
            self.widths = [self._width(column, row) for column in self.columns]
            if left_out:
                lines.append(Text(f"too narrow for: {', '.join(left_out)} (report.html has them)", style="dim"))
            lines.append(Text(self._joined([c.title for c in self.columns]), style="bold"))
        lines.append(Text(self._joined([cell(c, row) for c in self.columns])))
        return lines

    def _width(self, column: SummaryColumn, row: dict[str, Any]) -> int:
        return max(len(column.title), 6, len(cell(column, row)) + 2 * (column.key == "reward"))

    def _fit(self, row: dict[str, Any]) -> list[str]:
        """Leaves out what there is no room for; its titles."""
        before = self.columns
        while self.width and sum(self._width(c, row) + 2 for c in self.columns) - 2 > self.width:
            spare = [column for column in self.columns if column.key not in MATTERS] or self.columns[2:]
            if not spare:
                break
            self.columns = [column for column in self.columns if column is not spare[-1]]
        return [column.title for column in before if column not in self.columns]

    def _joined(self, cells: list[str]) -> str:
        return "  ".join(text.rjust(width) for text, width in zip(cells, self.widths, strict=True))


@dataclass
class SampleTally:
    """Running means of the current round: reward, best of each prompt, length."""

    scores: dict[str, list[float]] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=lambda: [0, 0])

    def add(self, folder: Path, stage: str, chunk: int) -> None:
        """Reads what the chunk has just committed."""
        path = folder / stage.replace("evaluation ", "evaluate/") / f"chunk-{chunk:05d}.parquet"
        if stage.endswith("generate"):
            self._add_lengths(path)
        elif stage.endswith("score"):
            self._add_scores(path)

    def _add_lengths(self, path: Path) -> None:
        import pyarrow.compute as pc

        from raftune.store.parquet import column_names, read_table

        if "completion_ids" in column_names(path):
            lengths = pc.list_value_length(read_table(path, ["completion_ids"]).column("completion_ids"))
            self.lengths[0] += pc.sum(lengths).as_py() or 0
            self.lengths[1] += len(lengths)

    def _add_scores(self, path: Path) -> None:
        from raftune.store.parquet import read_table

        table = read_table(path, ["prompt_id", "score"])
        for prompt, score in zip(table.column("prompt_id").to_pylist(), table.column("score").to_pylist(), strict=True):
            if score is not None and math.isfinite(score):
                self.scores.setdefault(prompt, []).append(score)

    def words(self) -> str:
        parts = []
        if self.scores:
            every = [score for group in self.scores.values() for score in group]
            best = [max(group) for group in self.scores.values()]
            parts.append(f"reward {sum(every) / len(every):.3f} · best of each {sum(best) / len(best):.3f}")
        if self.lengths[1]:
            parts.append(f"length {self.lengths[0] / self.lengths[1]:.0f}")
        return " · ".join(parts)


@dataclass
class StagePace:
    """How long stages take, and from that how long the rest of the run will."""

    of: int = 0
    round: int = 0
    began: float = field(default_factory=time.monotonic)
    spent: dict[int, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))
    before: dict[int, float] = field(default_factory=dict)  # seconds that earlier sessions spent on the rounds

    def begin_round(self, round_: int, of: int) -> None:
        self.round, self.of = round_, of

    def add(self, round_: int, stage: str, seconds: float) -> None:
        self.spent[round_][stage] = seconds

    def seconds_of(self, round_: int) -> float | None:
        """What was spent on the round, by earlier sessions too; None where this one found everything done."""
        return self.before.get(round_, 0.0) + sum(self.spent[round_].values()) if round_ in self.spent else None

    def left(self) -> str:
        """The time that the stages still to run will take, as they did in earlier rounds; empty before one is known."""
        whole = [stages for number, stages in self.spent.items() if 0 < number < self.round]
        if not whole:
            return ""
        names = {name for stages in whole for name in stages}
        mean = {name: average([stages[name] for stages in whole if name in stages]) for name in names}
        done = self.spent.get(self.round, {})
        seconds = sum(mean.values()) * (self.of - self.round) + sum(mean[name] for name in names - set(done))
        return f"about {duration(seconds)} left"


def alarm_words(alarm: Mapping[str, Any]) -> str:
    """An alarm on one line."""
    return one_line(f"{alarm['title'][:1].lower()}{alarm['title'][1:]}: {alarm['evidence']}")


def average(values: list[float]) -> float:
    return sum(values) / len(values)


def bars(console: Console) -> Bars:
    """The moving line: stage, bar, units, worth, time. It vanishes when the run ends."""
    return Bars(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[worth]}", markup=False),
        TextColumn("{task.fields[left]}", style="dim", markup=False),
        console=console,
        transient=True,
    )


def moves(console: Console) -> bool:
    """Whether a line that redraws itself can be shown: a terminal that is no CI job, or a notebook with widgets."""
    if console.is_jupyter:
        return importlib.util.find_spec("ipywidgets") is not None
    return console.is_terminal and not console.is_dumb_terminal and not os.environ.get("CI")


class StepProgress:
    """`with Steps() as steps: steps.begin("training"); steps.advance(3, 100)`."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self._bars = bars(self.console) if moves(self.console) else None
        self._task: TaskID | None = None
        self._title, self._began, self._said = "", 0.0, 0.0

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def begin(self, title: str) -> None:
        """The step that is done from now on."""
        self._title = title
        self._began = self._said = time.monotonic()
        if self._bars is None:
            self._print(title)
            return
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._task = self._bars.add_task(title, total=None, worth="", left="")

    def advance(self, done: int, of: int) -> None:
        """So much of the step is done."""
        now = time.monotonic()
        left = (now - self._began) * (of - done) / max(done, 1)
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, completed=done, total=of, left=f"about {duration(left)} left")
        elif now - self._said > QUIET:
            self._said = now
            self._print(f"{self._title}: {done:,} of {of:,}, about {duration(left)} left")

    def note(self, words: str) -> None:
        """A line that stays."""
        self._print(words)

    def _print(self, words: str) -> None:
        self.console.print(Text(words, style="dim"), soft_wrap=True)
