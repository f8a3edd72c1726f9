"""Several weighted rewards, combined into one score with named parts."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import pyarrow as pa

from raftune.data.images import LazyImages
from raftune.errors import ConfigError
from raftune.protocols import Reward
from raftune.records import INVALID, Prompt, RewardPart, Score, ScoreStatus
from raftune.rewards.batch import RESERVED, RewardBatch, incompatible
from raftune.rewards.combining import Bounds, Combine, RewardShare, combined
from raftune.rewards.fingerprint import digest
from raftune.rewards.outcome import RewardOutcome
from raftune.rewards.process.executors import EventLoopThread, call, finish, place, undisturbed
from raftune.store import partial


@dataclass(frozen=True)
class LoggedExtras:
    """What rewards logged during the last `score`: means of `log_metric`; `log_extra` columns, a value a sample."""

    metrics: dict[str, float] = field(default_factory=dict)
    columns: dict[str, list[Any]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)  # how many numbers each mean was taken of

    @classmethod
    def of(cls, calls: Sequence[Mapping[str, RewardOutcome]]) -> LoggedExtras:
        """The means over all calls; None in a column if a call logged nothing, or not one value a sample."""
        metrics: dict[str, list[float]] = {}
        names = sorted({name for call in calls for outcome in call.values() for name in outcome.log.columns})
        columns: dict[str, list[Any]] = {name: [] for name in names}
        for outcomes in calls:
            logged: dict[str, list[Any]] = {}
            size = 0
            for outcome in outcomes.values():
                logged |= outcome.log.columns
                size = len(outcome.parts)
                for name, numbers in outcome.log.metrics.items():
                    metrics.setdefault(name, []).extend(numbers)
            for name in names:
                values = logged.get(name, [])
                columns[name].extend(values if len(values) == size else [None] * size)
        means = {name: sum(numbers) / len(numbers) for name, numbers in sorted(metrics.items()) if numbers}
        return cls(means, columns, {name: len(metrics[name]) for name in means})


class RewardSet:
    """Calls every reward on fixed batches and combines the parts: the same samples in the same order score the same.

    `thresholds` (at least, at most) and `weights` say what each reward counts, `combine` how that adds up. A call takes
    at most its timeout (seconds), and is repeated up to `retries` times after an error or a time-out.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        *,
        names: Sequence[str] | None = None,
        weights: Sequence[float] | None = None,
        thresholds: Sequence[Bounds] | None = None,
        combine: Combine = "sum",
        timeouts: Sequence[float] | float = 120.0,
        batch_size: int = 64,
        retries: int = 0,
        notes: Sequence[str] = (),
    ) -> None:
        self.names = tuple(names or (reward.name for reward in rewards))
        self.weights = tuple(weights if weights is not None else (1.0 for _ in rewards))
        if len(self.weights) != len(rewards):
            raise ConfigError(
                f"reward_weights must hold one number for each reward; got {len(self.weights)} for "
                f"{len(rewards)} rewards"
            )
        if bad := [weight for weight in self.weights if not math.isfinite(weight)]:
            raise ConfigError(f"reward_weights must be finite; got {bad[0]}")
        if twice := sorted({name for name in self.names if self.names.count(name) > 1}):
            raise ConfigError(
                f"rewards must bear different names; got {twice[0]!r} twice. Each names a column: rename one."
            )
        bounds = thresholds if thresholds is not None else [(None, None)] * len(rewards)
        several = zip(self.names, self.weights, bounds, strict=True)
        self.shares = {name: RewardShare(weight, *between) for name, weight, between in several}
        self.combine: Combine = combine
        seconds = [timeouts] * len(rewards) if isinstance(timeouts, int | float) else timeouts
        self._timeouts = dict(zip(self.names, seconds, strict=True))
        self._batch_size, self._retries = batch_size, retries
        self._loop = EventLoopThread()
        self._places = {name: place(reward, self._loop) for name, reward in zip(self.names, rewards, strict=True)}
        self.media = {name: frozenset(reward.media) for name, reward in zip(self.names, rewards, strict=True)}
        self._rewards = tuple(rewards)
        self.extras = LoggedExtras()
        self._notes = tuple(notes)

    @property
    def fingerprint(self) -> str:
        """Over names, what each reward counts, how that is combined, and every reward's code, options and model."""
        return self.fingerprint_by(self.combine)

    def fingerprint_by(self, combine: Combine) -> str:
        """The fingerprint of the set as if it combined the parts in this way."""
        shares = self.shares.values()
        usual = combine == "sum" and not any(share.has_threshold for share in shares)
        beyond = [] if usual else [combine, [[share.at_least, share.at_most] for share in shares]]
        return digest("panel", list(zip(self.names, self.weights, self._codes, strict=True)), *beyond)

    @cached_property
    def _codes(self) -> list[str]:
        return [reward.fingerprint for reward in self._rewards]  # hashing a model's files takes its time

    def score(
        self, batch: RewardBatch, *, groups: Sequence[Any] | None = None, combine: Combine | None = None
    ) -> list[Score]:
        """One score a sample. A failing reward raises nothing here: see Status. `extras` then holds what was logged.

        groups[i] names the prompt of sample i, among whose samples it is ranked; without them, equal prompts are one.
        `combine` is another way than the panel's own. Raises RewardError where a reward model's weights cannot be read.
        """
        chunks = [range(i, min(i + self._batch_size, len(batch))) for i in range(0, len(batch), self._batch_size)]
        calls: list[dict[str, RewardOutcome]] = []

        def write(path: Path) -> None:
            plain = [{name: outcome.as_dict() for name, outcome in call.items()} for call in calls]
            path.write_text(json.dumps(plain), encoding="utf-8")

        with partial.current("scores").work() as part:
            if (path := part.find()) is not None:
                for plain in json.loads(path.read_bytes()):
                    calls.append({name: RewardOutcome.from_dict(outcome) for name, outcome in plain.items()})
            for chunk in chunks[len(calls) :]:
                calls.append(self._call(batch.take(chunk)))
                part.step(write, done=(chunk[-1] + 1, len(batch), "samples"))
        self.extras = LoggedExtras.of(calls)
        parts = [
            {name: call[name].parts[i] for name in self.names}
            for call, chunk in zip(calls, chunks, strict=True)
            for i in range(len(chunk))
        ]
        how = combine or self.combine
        if groups is None and how == "rank":
            groups = [json.dumps(prompt, sort_keys=True, default=str) for prompt in batch.prompts]
        return combined(parts, self.shares, how, groups or ())

    @property
    def has_weights(self) -> bool:
        """Whether any reward is a model, which wants the memory that a policy holds."""
        return any(hasattr(reward, "release") for reward in self._rewards)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that reward models hold now."""
        return sum(getattr(reward, "nbytes", 0) for reward in self._rewards)

    def release(self) -> None:
        """Frees the weights of reward models, until they are needed again."""
        for reward in self._rewards:
            if hasattr(reward, "release"):
                reward.release()

    def notes(self) -> tuple[str, ...]:
        """What a user should know about how the rewards read the samples (prompts cut), each told once."""
        own, self._notes = self._notes, ()
        return (*own, *(note for reward in self._rewards if hasattr(reward, "notes") for note in reward.notes()))

    def close(self) -> None:
        """Ends the processes and threads of the rewards."""
        for executor in self._places.values():
            executor.close()
        self._loop.close()

    def __enter__(self) -> RewardSet:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _call(self, batch: RewardBatch) -> dict[str, RewardOutcome]:
        """Processes work beside the callables of this process; async rewards start when those are done."""
        outcomes: dict[str, RewardOutcome] = {}
        names: Sequence[str] = self.names
        for _ in range(self._retries + 1):
            waiting = self._start(names, "process", batch)
            for name in names:
                if self._places[name].place in ("here", "thread"):
                    outcomes[name] = call(self._places[name], batch, self._timeouts[name])
            with undisturbed():
                waiting |= self._start(names, "loop", batch)
                for name, (future, deadline) in waiting.items():
                    outcomes[name] = finish(self._places[name], batch, self._timeouts[name], future, deadline)
            names = [name for name in self.names if outcomes[name].failed]
            if not names:
                break
        return outcomes

    def _start(
        self, names: Sequence[str], where: str, batch: RewardBatch
    ) -> dict[str, tuple[Future[RewardOutcome], float]]:
        """The calls of the rewards there, started, with their deadlines."""
        names = [name for name in names if self._places[name].place == where]
        return {name: (self._places[name].start(batch), time.monotonic() + self._timeouts[name]) for name in names}


def misfits(panel: RewardSet, media: str, family: str, field: str = "rewards.reward_funcs") -> Iterator[str]:
    """A sentence for each reward of the set that cannot read what a policy of this medium and family makes."""
    for name, scored, made in incompatible(panel.media, media):
        yield (
            f"{field}: {name} scores {scored}, and policy.family: {family} makes {made}. Name a reward for {made}, "
            "or a policy of the other kind."
        )


class SampleScorer:
    """A reward set for stored samples."""

    def __init__(self, panel: RewardSet, combine: Combine | None = None) -> None:
        """`combine` is another way to combine the parts than the set's own."""
        self.panel, self.names, self.combine = panel, panel.names, combine or panel.combine
        self.extras = LoggedExtras()

    @property
    def fingerprint(self) -> str:
        """Changes with the code, options and weights of any reward; computed when first read."""
        return self.panel.fingerprint_by(self.combine)

    def score_samples(
        self, prompts: list[Prompt], samples: pa.Table, earlier: Mapping[int, Score] | None = None
    ) -> list[Score]:
        """Scores of the samples, row for row; prompts[i] is the prompt of row i.

        A sample that its policy calls invalid gets that status and the reason as detail. The parts of an `earlier`
        score, by its row, are combined with those of the others. Rewards are called for neither.
        """
        groups = [prompt.id for prompt in prompts]
        has_invalid = INVALID in samples.column_names
        reasons = samples.column(INVALID).to_pylist() if has_invalid else [None] * samples.num_rows
        known = {row: score for row, score in (earlier or {}).items() if reasons[row] is None}
        rows = [row for row, reason in enumerate(reasons) if reason is None and row not in known]
        by_row: dict[int, Score] = {}
        self.extras = LoggedExtras()
        if rows:
            part = samples if len(rows) == samples.num_rows else samples.take(pa.array(rows, pa.int64()))
            batch = batch_of([prompts[row] for row in rows], part)
            scores = self.panel.score(batch, groups=[groups[row] for row in rows], combine=self.combine)
            by_row = dict(zip(rows, scores, strict=True))
            columns = {}
            for name, values in self.panel.extras.columns.items():
                value_of = dict(zip(rows, values, strict=True))
                columns[name] = [value_of.get(row) for row in range(len(reasons))]
            self.extras = replace(self.panel.extras, columns=columns)
        if known:  # a rank is one among all samples of a prompt
            by_row |= known
            rows = sorted(by_row)
            parts = [by_row[row].parts for row in rows]
            scores = combined(parts, self.panel.shares, self.combine, [groups[row] for row in rows])
            pairs = zip(rows, scores, strict=True)
            by_row = {row: replace(score, detail=by_row[row].detail) for row, score in pairs}
        not_applicable = RewardPart(None, ScoreStatus.NOT_APPLICABLE)
        return [
            by_row.get(row) or Score(None, ScoreStatus.INVALID, dict.fromkeys(self.names, not_applicable), str(reason))
            for row, reason in enumerate(reasons)
        ]

    def notes(self) -> tuple[str, ...]:
        """What a user should know about how the rewards read the samples, each once."""
        return self.panel.notes()

    def close(self) -> None:
        self.panel.close()


def batch_of(prompts: list[Prompt], samples: pa.Table) -> RewardBatch:
    """Prompts and completions in TRL's shapes, each column of the data set as one value a sample.

    A completion mirrors its prompt: text for text, a list of one assistant message for messages.
    """
    column = samples.column("completion")
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        completions = cast("list[Any]", LazyImages(column, samples.column("sample_id")))
    else:
        completions = [
            [{"role": "assistant", "content": text}] if isinstance(prompt.content, list) else text
            for prompt, text in zip(prompts, column.to_pylist(), strict=True)
        ]
    names = [name for name in (prompts[0].columns if prompts else ()) if name not in RESERVED]
    columns = {name: [prompt.columns[name] for prompt in prompts] for name in names}
    ids = samples.column("completion_ids").to_pylist() if "completion_ids" in samples.column_names else None
    return RewardBatch([prompt.content for prompt in prompts], completions, columns, ids)
