"""Several weighted rewards, combined into one score with named parts."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
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
from raftune.rewards.process.executors import EventLoopThread, call, executor_for, finish, undisturbed
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
        shares = zip(self.names, self.weights, bounds, strict=True)
        self.shares = {name: RewardShare(weight, *limits) for name, weight, limits in shares}
        self.combine: Combine = combine
        seconds = [timeouts] * len(rewards) if isinstance(timeouts, int | float) else timeouts
        self._timeouts = dict(zip(self.names, seconds, strict=True))
        self._batch_size, self._retries = batch_size, retries
        self._loop = EventLoopThread()
        self.rewards = dict(zip(self.names, rewards, strict=True))
        self._executors = {name: executor_for(reward, self._loop) for name, reward in self.rewards.items()}
        self.extras = LoggedExtras()
        self._notes = list(notes)

    @property
    def fingerprint(self) -> str:
        """Over names, what each reward counts, how that is combined, and every reward's code, options and model."""
        shares = self.shares.values()
        usual = self.combine == "sum" and not any(share.has_threshold for share in shares)
        beyond = [] if usual else [self.combine, [[share.at_least, share.at_most] for share in shares]]
        codes = [reward.fingerprint for reward in self.rewards.values()]
        return digest("panel", list(zip(self.names, self.weights, codes, strict=True)), *beyond)

    def by_sum(self) -> RewardSet:
        """The same rewards, with the parts added up: a rank compares only the samples of one prompt, and no rounds."""
        if self.combine == "sum":
            return self
        summed = copy.copy(self)
        summed.combine = "sum"
        return summed

    def score(self, batch: RewardBatch, *, groups: Sequence[Any] | None = None) -> list[Score]:
        """One score a sample. A failing reward raises nothing here: see Status. `extras` then holds what was logged.

        groups[i] names the prompt of sample i, among whose samples it is ranked; without them, equal prompts are one.
        Raises RewardError where a reward model's weights cannot be read.
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
        if groups is None and self.combine == "rank":
            groups = [json.dumps(prompt, sort_keys=True, default=str) for prompt in batch.prompts]
        return combined(parts, self.shares, self.combine, groups or ())

    def score_samples(
        self, prompts: list[Prompt], samples: pa.Table, earlier: Mapping[int, Score] | None = None
    ) -> list[Score]:
        """Scores of stored samples, row for row; prompts[i] is the prompt of row i.

        A sample that its policy calls invalid gets that status and the reason as detail. The parts of an `earlier`
        score, by its row, are combined with those of the others. Rewards are called for neither.
        """
        groups = [prompt.id for prompt in prompts]
        has_invalid = INVALID in samples.column_names
        reasons = samples.column(INVALID).to_pylist() if has_invalid else [None] * samples.num_rows
        earlier = {row: score for row, score in (earlier or {}).items() if reasons[row] is None}
        rows = [row for row, reason in enumerate(reasons) if reason is None and row not in earlier]
        by_row: dict[int, Score] = {}
        self.extras = LoggedExtras()
        if rows:
            part = samples if len(rows) == samples.num_rows else samples.take(pa.array(rows, pa.int64()))
            scores = self.score(batch_of([prompts[row] for row in rows], part), groups=[groups[row] for row in rows])
            by_row = dict(zip(rows, scores, strict=True))
            columns = {}
            for name, values in self.extras.columns.items():
                value_of = dict(zip(rows, values, strict=True))
                columns[name] = [value_of.get(row) for row in range(len(reasons))]
            self.extras = replace(self.extras, columns=columns)
        if earlier:  # a rank is one among all samples of a prompt
            by_row |= earlier
            rows = sorted(by_row)
            parts = [by_row[row].parts for row in rows]
            scores = combined(parts, self.shares, self.combine, [groups[row] for row in rows])
            pairs = zip(rows, scores, strict=True)
            by_row = {row: replace(score, detail=by_row[row].detail) for row, score in pairs}
        not_applicable = RewardPart(None, ScoreStatus.NOT_APPLICABLE)
        return [
            by_row.get(row) or Score(None, ScoreStatus.INVALID, dict.fromkeys(self.names, not_applicable), str(reason))
            for row, reason in enumerate(reasons)
        ]

    @property
    def has_weights(self) -> bool:
        """Whether any reward is a model, which wants the memory that a policy holds."""
        return any(reward.has_weights for reward in self.rewards.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that reward models hold now."""
        return sum(reward.nbytes for reward in self.rewards.values())

    def release(self) -> None:
        """Frees the weights of reward models, until they are needed again."""
        for reward in self.rewards.values():
            reward.release()

    def notes(self) -> tuple[str, ...]:
        """What a user should know about how the rewards read the samples (prompts cut), each told once."""
        notes = [*self._notes, *(note for reward in self.rewards.values() for note in reward.notes())]
        self._notes.clear()
        return tuple(notes)

    def close(self) -> None:
        """Ends the processes and threads of the rewards."""
        for executor in self._executors.values():
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
            started = self._start(names, "process", batch)
            for name in names:
                if self._executors[name].place in ("here", "thread"):
                    outcomes[name] = call(self._executors[name], batch, self._timeouts[name])
            with undisturbed():
                started |= self._start(names, "loop", batch)
                for name, (future, deadline) in started.items():
                    outcomes[name] = finish(self._executors[name], batch, self._timeouts[name], future, deadline)
            names = [name for name in self.names if outcomes[name].failed]
            if not names:
                break
        return outcomes

    def _start(
        self, names: Sequence[str], place: str, batch: RewardBatch
    ) -> dict[str, tuple[Future[RewardOutcome], float]]:
        """The calls of the rewards there, started, with their deadlines."""
        names = [name for name in names if self._executors[name].place == place]
        return {name: (self._executors[name].start(batch), time.monotonic() + self._timeouts[name]) for name in names}


def incompatible_rewards(
    rewards: RewardSet, media: str, family: str, field: str = "rewards.reward_funcs"
) -> Iterator[str]:
    """A sentence for each reward of the set that cannot read what a policy of this medium and family makes."""
    for name, scored, medium in incompatible(rewards.rewards, media):
        yield (
            f"{field}: {name} scores {scored}, and policy.family: {family} makes {medium}. Name a reward for {medium}, "
            "or a policy of the other kind."
        )


def lacking(rewards: RewardSet, columns: Collection[str], prompts: str, field: str) -> Iterator[str]:
    """A sentence for each reward of the set that needs a column which these prompts lack, and so can score nothing."""
    columns = sorted({*columns} - RESERVED - {"prompt_id"})
    for name, reward in rewards.rewards.items():
        if missing := sorted(reward.needs.difference(columns)):
            yield (
                f"{field}: {name} needs {missing[0]!r}, which is no column of {prompts}; there are: "
                f"{', '.join(columns) or 'none beside the prompt'}. Add the column, or rename one with "
                "data.columns; a parameter with a default needs none."
            )


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
