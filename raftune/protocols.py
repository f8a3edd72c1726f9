"""Every interface of the house, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raftune.records import Prompt, Sample

FloatN = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Unit:
    """A fixed slice of prompts x K: what is drawn and scored at once, always in the same batches.

    seeds[i][k] is the seed of the k-th draw of prompts[i]; `version` names the policy that draws; `scope` begins the
    sample ids and tells a training round from an evaluation; `batch_size` is the number of samples alive at once.
    """

    index: int
    scope: str
    version: str
    prompts: tuple[Prompt, ...]
    seeds: tuple[tuple[int, ...], ...]
    batch_size: int

    def sample_id(self, prompt: Prompt, k: int) -> str:
        return f"{self.scope}/{prompt.id}/{k:03d}"


@dataclass(frozen=True, slots=True)
class TuneReport:
    """What a tuning did, without times: the same for an interrupted and an uninterrupted one.

    losses[i] is the mean loss of optimizer step i (nats per token, or the unit that the named loss has).
    """

    rows: int
    steps: int
    losses: tuple[float, ...]
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Receipt:
    """A unit that was committed: its file, its rows, and the file's sha256."""

    unit: int
    file: str
    rows: int
    sha256: str
    seconds: float = 0.0
    notes: tuple[str, ...] = ()


class Policy(Protocol):
    """The generative model being aligned. A family is a kind of policy."""

    media: str  # text | messages | image | category
    payload: pa.Schema  # the family's own columns of a draw shard, `completion` first: opaque to loop and stages

    def draw(self, unit: Unit) -> list[Sample]:
        """All samples of the unit, prompt by prompt, k ascending. Raises OutOfMemory, ModelError."""
        ...

    def adopt(self, prompt: Prompt, answer: Any, source: str) -> Mapping[str, Any]:
        """The payload (with `completion`) of somebody else's answer, encoded as if this policy had drawn it."""
        ...

    def tune(self, rows: Path, work: Path, out: Path) -> TuneReport:
        """Fits the policy to the rows (Parquet: prompt, weight, payload) and writes the new model into `out`.

        Checkpoints lie under `work`; the newest one that verifies is continued from.
        """
        ...

    def notes(self) -> tuple[str, ...]:
        """What a user should know about how this policy drew (a fallback taken, prompts cut), each once."""
        ...


@runtime_checkable
class Likelihood(Protocol):
    """A policy that can say how probable an answer is; without it beta > 0 is refused when planning."""

    def log_probs(self, prompts: Sequence[Prompt], samples: pa.Table, batch_size: int) -> FloatN:
        """(N,) nats, untempered, summed over the completion's tokens, EOS included."""
        ...


class Reward(Protocol):
    """What gives a number to a completion: TRL's contract, called by keyword."""

    name: str
    media: frozenset[str]
    fingerprint: str  # changes when the reward's code, options or weights change: enters the score stage's key

    def __call__(self, *, prompts: list[Any], completions: list[Any], **columns: list[Any]) -> list[float | None]: ...


class Stage(Protocol):
    """One step of a round: what it reads, which fields shape it, and what it writes."""

    name: str
    reads: tuple[str, ...]  # stages whose COMMIT enters this one's key; "tune@-1": the previous round's; "@0": the start's
    fields: tuple[str, ...]  # dotted config fields that enter the key
    per_unit: bool  # run by the engine unit by unit, or once in the loop's process

    def run(self, inputs: Mapping[str, Path], out: Path) -> None: ...


class Engine(Protocol):
    """Where units run: this process, local workers, or a cluster."""

    def run(self, stage: Stage, units: Iterable[Unit]) -> Iterator[Receipt]: ...


class Metric(Protocol):
    """A pure function of committed samples."""

    needs: frozenset[str]  # scores, text, image, log_probs

    def __call__(self, samples: pa.Table) -> dict[str, Any]: ...
