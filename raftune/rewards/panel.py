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
from types import TracebackType
from typing import Any, cast

import pyarrow as pa

from raftune.data.images import LazyImages
from raftune.errors import ConfigError
from raftune.protocols import Reward
from raftune.records import INVALID, Prompt, RewardPart, Score, ScoreStatus
from raftune.rewards.batch import RESERVED, RewardBatch, RewardLog
from raftune.rewards.combining import Bounds, Combine, RewardShare, combined
from raftune.rewards.fingerprint import digest
from raftune.rewards.media import kinds, unfit
from raftune.rewards.outcome import RewardOutcome
from raftune.rewards.process.executors import EventLoopThread, call, finish, place, undisturbed
from raftune.store import partial


@dataclass(frozen=True)
class LoggedExtras:
    """What rewards logged during the last `score`: means of `log_metric`; `log_extra` columns, a value a sample."""

    metrics: dict[str, float] = field(default_factory=dict)
    columns: dict[str, list[Any]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)  # how many numbers each mean was taken of


class RewardSet:
    """Calls every reward on fixed batches and combines the parts: the same samples in the same order score the same.

    `thresholds` (at least, at most) and `weights` say what each reward counts, `combine` how that adds up.
    Rewards in processes of their own run beside the others; callables of this process run one after another, then all
    async ones together, each call for at most its timeout (seconds). Calls that end in an error or a time-out are
    repeated up to `retries` times.
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
        self._check(len(rewards))
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
        """The fingerprint of the panel as if it combined the parts in this way."""
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
        with partial.current("scores").work() as part:
            if (path := part.find()) is not None:
                calls = [outcomes_from(call) for call in json.loads(path.read_bytes())]
            for chunk in chunks[len(calls) :]:
                calls.append(self._call(batch.take(chunk)))
                part.step(lambda path: write_calls(calls, path), done=(chunk[-1] + 1, len(batch), "samples"))
        self.extras = gather_extras(calls, [len(chunk) for chunk in chunks])
        parts = [
            {name: call[name].parts[i] for name in self.names}
            for call, chunk in zip(calls, chunks, strict=True)
            for i in range(len(chunk))
        ]
        how = combine or self.combine
        if groups is None:
            groups = (
                [] if how == "sum" else [json.dumps(prompt, sort_keys=True, default=str) for prompt in batch.prompts]
            )
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
        for seat in self._places.values():
            seat.close()
        self._loop.close()

    def __enter__(self) -> RewardSet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, count: int) -> None:
        if len(self.weights) != count:
            raise ConfigError(
                f"reward_weights must hold one number for each reward; got {len(self.weights)} for {count} rewards"
            )
        if bad := [weight for weight in self.weights if not math.isfinite(weight)]:
            raise ConfigError(f"reward_weights must be finite; got {bad[0]}")
        if twice := sorted({name for name in self.names if self.names.count(name) > 1}):
            raise ConfigError(
                f"rewards must bear different names; got {twice[0]!r} twice. Each names a column: rename one."
            )

    def _call(self, batch: RewardBatch) -> dict[str, RewardOutcome]:
        """The outcome of each reward on one batch, after the retries."""
        outcomes = self._once(batch, self.names)
        for _ in range(self._retries):
            failed = [name for name in self.names if outcomes[name].failed]
            if not failed:
                break
            outcomes |= self._once(batch, failed)
        return outcomes

    def _once(self, batch: RewardBatch, names: Sequence[str]) -> dict[str, RewardOutcome]:
        started = {name: self._start(name, batch) for name in self._at("process", names=names)}
        done = {
            name: call(self._places[name], batch, self._timeouts[name])
            for name in self._at("here", "thread", names=names)
        }
        with undisturbed():
            started |= {name: self._start(name, batch) for name in self._at("loop", names=names)}
            waited = {
                name: finish(self._places[name], batch, self._timeouts[name], *begun) for name, begun in started.items()
            }
        return done | waited

    def _at(self, *places: str, names: Sequence[str]) -> list[str]:
        return [name for name in names if self._places[name].place in places]

    def _start(self, name: str, batch: RewardBatch) -> tuple[Future[RewardOutcome], float]:
        future = self._places[name].start(batch)
        return future, time.monotonic() + self._timeouts[name]


def write_calls(calls: Sequence[Mapping[str, RewardOutcome]], path: Path) -> None:
    """Writes the outcomes of some calls, from which an interrupted scoring goes on."""
    plain = [
        {
            name: {
                "parts": [[part.value, part.status.value, part.detail] for part in outcome.parts],
                "log": [outcome.log.metrics, outcome.log.columns],
                "returned": outcome.returned,
            }
            for name, outcome in call.items()
        }
        for call in calls
    ]
    try:
        path.write_text(json.dumps(plain), encoding="utf-8")
    except (TypeError, ValueError) as error:  # `log_extra` takes anything: what JSON does not hold is asked for again
        raise OSError(f"not kept: {error}") from error


def outcomes_from(call: Mapping[str, Any]) -> dict[str, RewardOutcome]:
    """The outcomes of a call, as `write_calls` wrote them."""
    found = {}
    for name, plain in call.items():
        log = RewardLog()
        log.metrics, log.columns = plain["log"]
        parts = [RewardPart(value, ScoreStatus(status), detail) for value, status, detail in plain["parts"]]
        found[name] = RewardOutcome(parts, log, plain["returned"])
    return found


def gather_extras(calls: Sequence[Mapping[str, RewardOutcome]], sizes: Sequence[int]) -> LoggedExtras:
    """Means of the metrics over all calls; columns with None where a call logged nothing, or not one value a sample."""
    metrics: dict[str, list[float]] = {}
    names = sorted({name for call in calls for outcome in call.values() for name in outcome.log.columns})
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for outcomes, size in zip(calls, sizes, strict=True):
        logged = {name: values for outcome in outcomes.values() for name, values in outcome.log.columns.items()}
        for name in names:
            values = logged.get(name, [])
            columns[name].extend(values if len(values) == size else [None] * size)
        for outcome in outcomes.values():
            for name, numbers in outcome.log.metrics.items():
                metrics.setdefault(name, []).extend(numbers)
    means = {name: sum(numbers) / len(numbers) for name, numbers in sorted(metrics.items()) if numbers}
    return LoggedExtras(means, columns, {name: len(metrics[name]) for name in means})


def misfits(panel: RewardSet, media: str, family: str, field: str = "rewards.reward_funcs") -> Iterator[str]:
    """A sentence for each reward of the panel that cannot read what a policy of this medium and family makes.

    A plain function says nothing of what it reads, so nothing is said of it.
    """
    made, other = kinds(media)
    for name in unfit(panel.media, media):
        yield (
            f"{field}: {name} scores {other}, and policy.family: {family} makes {made}. Name a reward for {made}, "
            "or a policy of the other kind."
        )


class SampleScorer:
    """A reward set for stored samples."""

    def __init__(self, panel: RewardSet, combine: Combine | None = None) -> None:
        """`combine` is another way to combine the parts than the panel's own."""
        self.panel, self.names, self.combine = panel, panel.names, combine or panel.combine
        self.extras = LoggedExtras()

    @property
    def fingerprint(self) -> str:
        """Changes with the code, options and weights of any reward; worked out when first asked for."""
        return self.panel.fingerprint_by(self.combine)

    def score_samples(
        self, prompts: list[Prompt], samples: pa.Table, earlier: Mapping[int, Score] | None = None
    ) -> list[Score]:
        """Scores of the samples, row for row; prompts[i] is what row i answers.

        No reward is asked about a sample that its policy calls invalid: it has that status, and the reason as detail.
        Nor about one with an `earlier` score, by its row: its parts are combined with those of the others.
        """
        invalid = INVALID in samples.column_names and samples.column(INVALID).null_count < samples.num_rows
        if not invalid and not earlier:
            scores = self._asked(prompts, samples)
            self.extras = self.panel.extras
            return scores
        why = samples.column(INVALID).to_pylist() if invalid else [None] * samples.num_rows
        known = {row: score for row, score in (earlier or {}).items() if why[row] is None}
        rows = [row for row, reason in enumerate(why) if reason is None and row not in known]
        asked = self._asked([prompts[row] for row in rows], samples.take(pa.array(rows, pa.int64()))) if rows else []
        extras = self.panel.extras if rows else LoggedExtras()
        columns = {
            name: [dict(zip(rows, values, strict=True)).get(row) for row in range(len(why))]
            for name, values in extras.columns.items()
        }
        self.extras = replace(extras, columns=columns)
        found = dict(zip(rows, asked, strict=True))
        if known:
            found = self._together(found | known, prompts)
        return [found.get(row) or invalid_score(self.names, str(reason)) for row, reason in enumerate(why)]

    def _together(self, scores: Mapping[int, Score], prompts: list[Prompt]) -> dict[int, Score]:
        """The scores with their parts combined anew: a rank is one among all samples of a prompt."""
        rows = sorted(scores)
        parts = [scores[row].parts for row in rows]
        found = combined(parts, self.panel.shares, self.combine, [prompts[row].id for row in rows])
        return {row: replace(score, detail=scores[row].detail) for row, score in zip(rows, found, strict=True)}

    def _asked(self, prompts: list[Prompt], samples: pa.Table) -> list[Score]:
        groups = [prompt.id for prompt in prompts]
        return self.panel.score(batch_of(prompts, samples), groups=groups, combine=self.combine)

    def notes(self) -> tuple[str, ...]:
        """What a user should know about how the rewards read the samples, each once."""
        return self.panel.notes()

    def close(self) -> None:
        self.panel.close()


def invalid_score(names: Sequence[str], why: str) -> Score:
    """The score of a sample that no reward was asked about."""
    return Score(None, ScoreStatus.INVALID, dict.fromkeys(names, RewardPart(None, ScoreStatus.NOT_APPLICABLE)), why)


def batch_of(prompts: list[Prompt], samples: pa.Table) -> RewardBatch:
    """Prompts and completions in TRL's shapes, each column of the data set as one value a sample."""
    answers = samples.column("completion")
    if pa.types.is_binary(answers.type) or pa.types.is_large_binary(answers.type):
        completions = cast("list[Any]", LazyImages(answers, samples.column("sample_id")))
    else:
        completions = [as_asked(prompt, answer) for prompt, answer in zip(prompts, answers.to_pylist(), strict=True)]
    names = [name for name in (prompts[0].columns if prompts else ()) if name not in RESERVED]
    columns = {name: [prompt.columns[name] for prompt in prompts] for name in names}
    ids = samples.column("completion_ids").to_pylist() if "completion_ids" in samples.column_names else None
    return RewardBatch([prompt.content for prompt in prompts], completions, columns, ids)


def as_asked(prompt: Prompt, answer: Any) -> Any:
    """A completion mirrors its prompt: text for text, a list of one assistant message for messages."""
    return [{"role": "assistant", "content": answer}] if isinstance(prompt.content, list) else answer
