"""Protocols shared across packages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raftune.arrays import BoolArray, FloatArray, IntArray
from raftune.records import Prompt, Sample, Score

Callback = Callable[[str, dict[str, Any]], None]  # (event, its facts)
EVALUATION = "e"  # ends the scope of a chunk whose samples are only evaluated


@dataclass(frozen=True, slots=True)
class Chunk:
    """A fixed slice of prompts x K, generated and scored together, always in the same batches.

    `seeds[i][k]` is the seed of the k-th sample of prompts[i]; `version` names the policy; `scope` begins the sample
    ids and tells a training round from an evaluation; `batch_size` is the number of samples alive at once.
    """

    index: int
    scope: str
    version: str
    prompts: tuple[Prompt, ...]
    seeds: tuple[tuple[int, ...], ...]
    batch_size: int

    @property
    def learned(self) -> bool:
        """Whether the policy may be trained on its samples; those of an evaluation are only evaluated."""
        return not self.scope.endswith(EVALUATION)

    def sample_id(self, prompt: Prompt, k: int) -> str:
        """The id of the prompt's k-th sample: scope, prompt and k."""
        return f"{self.scope}/{prompt.id}/{k:03d}"


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What a training did, without times: the same for an interrupted and an uninterrupted one.

    losses[i] is the mean loss of optimizer step i (nats per token, or the unit of the loss that details name).
    """

    rows: int
    steps: int
    losses: tuple[float, ...]
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """A chunk on disk: its file, rows, SHA-256, size in bytes, the seconds it took, and notes for the user."""

    chunk: int
    file: str
    rows: int
    sha256: str
    bytes: int
    seconds: float = 0.0
    notes: tuple[str, ...] = ()


class Policy(Protocol):
    """The generative model being trained. A family is a kind of policy."""

    media: str  # text | messages | image | category
    payload: pa.Schema  # the family's columns of a sample, `completion` first: opaque to the loop

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that this instance holds now; 0 before they are read."""

    def generate(self, chunk: Chunk) -> list[Sample]:
        """All samples of the chunk, prompt by prompt, k ascending. Raises OutOfMemory, ModelError."""

    def encode_completion(self, prompt: Prompt, answer: Any, source: str) -> Mapping[str, Any]:
        """The payload (with `completion`) of a given completion, encoded as if this policy had generated it."""

    def train(self, rows: Path, work: Path, out: Path) -> TrainReport:
        """Trains on the rows (Parquet: prompt, weight, payload) and writes the new model into `out`.

        Resumes from the newest valid checkpoint under `work`.
        """

    def notes(self) -> tuple[str, ...]:
        """Remarks for the user about how this policy generated (a fallback, truncated prompts), each once."""


@runtime_checkable
class SupportsLogProbs(Protocol):
    """A policy that computes log-probabilities of completions, which beta > 0 requires."""

    def log_probs(self, prompts: Sequence[Prompt], samples: pa.Table, batch_size: int) -> FloatArray:
        """(N,) nats, untempered, summed over the completion's tokens, EOS included."""

    def recorded_log_probs(self, samples: pa.Table) -> FloatArray:
        """(N,) the same under the policy that generated the samples, recorded then; NaN where nothing was recorded."""


@runtime_checkable
class SupportsPromptCheck(Protocol):
    """A policy that reports unreadable prompts before generation."""

    def unread(self, prompt: Prompt) -> str | None:
        """The end of a prompt that is cut for its length, else None. Raises DataError for an unusable prompt."""


@runtime_checkable
class BatchReader(Protocol):
    """A policy that checks many prompts together faster than one by one."""

    def reads_all(self, prompts: Sequence[Prompt]) -> bool:
        """Whether `unread` would return None for every one of them."""


@dataclass(frozen=True)
class GenerationRequest:
    """A completion is generated for each seed of each of the token prompts.

    parameters: temperature, top_p, top_k, min_p, repetition_penalty, max_completion_length, stop_strings, eos_ids,
    pad_id and batch_size, as attributes. tokenizer: for stop strings only.
    """

    prompts: Sequence[Sequence[int]]
    seeds: Sequence[Sequence[int]]
    parameters: Any
    tokenizer: Any


# Token ids with the EOS where there is one, a log-probability for each (nats, before temperature and cuts), and why it
# ended: eos, stop (a stop string) or length.
Completion = tuple[Sequence[int], Sequence[float], str]


class SamplingBackend(Protocol):
    """Generates the completions of a language model."""

    @property
    def reproducible(self) -> bool:
        """Whether a completion depends on model, prompt, seed and parameters alone, and not on its batch."""

    def generate(self, model: Any, request: GenerationRequest) -> Sequence[Sequence[Completion]]:
        """result[i][k] continues prompts[i] with the noise of seeds[i][k]."""


@runtime_checkable
class SupportsBackends(Protocol):
    """A policy with several ways to generate, of which a run chooses and records one, as JSON."""

    def choose_backend(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """The record of a trial on these prompts. Raises ModelError where no way is correct."""

    def use_backend(self, record: Mapping[str, Any]) -> None:
        """Makes this policy generate as the record says."""

    def backend(self) -> Mapping[str, Any] | None:
        """The record by which this policy generates, None before one was chosen."""


class GenerationServers(Protocol):
    """Processes outside raftune that generate, which all policies of a run share. Where `planning`, none is used."""

    planning: bool

    def release(self) -> None:
        """Frees the memory that other models need."""

    def close(self) -> None:
        """Ends what raftune started."""


@runtime_checkable
class SupportsServers(Protocol):
    """A family that can generate through servers."""

    @classmethod
    def servers(cls, config: Any, start: Path, tmp: Path) -> GenerationServers | None:
        """The servers of a run that starts from this committed folder, which are started when they are needed; None
        where the configuration has none. Raises ConfigError."""

    @classmethod
    def check_servers(cls, config: Any) -> None:
        """Raises ConfigError or EngineError where the configured servers cannot be used; starts none."""

    def use_servers(self, servers: Any) -> None:
        """Makes this policy generate through them, where its record says so."""


@runtime_checkable
class SupportsObjectives(Protocol):
    """A family whose `train` minimises the configured objective (objectives.load_objective), also a custom one."""

    any_objective: bool


@runtime_checkable
class SupportsRestart(Protocol):
    """A family whose rounds other runs can start from; without it `policy.model` is set to the round's folder."""

    @classmethod
    def section_at(cls, policy: Mapping[str, Any], folder: Path, start: Path) -> dict[str, Any]:
        """The `policy` section of a run that starts from this committed folder of a run with this initial model."""


@runtime_checkable
class SupportsSharedParts(Protocol):
    """A policy with frozen parts that all rounds share; they stay in memory between rounds."""

    @property
    def shared(self) -> Any:
        """The parts, with `nbytes`."""


@runtime_checkable
class SupportsTrainer(Protocol):
    """A family whose `train` uses transformers' Trainer: the options of `training` are tried before the run."""

    uses_trainer: bool


@runtime_checkable
class SupportsProcesses(Protocol):
    """A family whose `train` runs through raftune.training.fit, and so on several processes at once."""

    parallel: frozenset[str]  # how: ddp, fsdp


@runtime_checkable
class SupportsMismatch(Protocol):
    """A family whose training compares recorded log-probabilities with the trainer's own forward.

    `train` puts the result into its report's details as `mismatch`; where training starts from another model than
    generated, the stage asks the one that did.
    """

    def mismatch(self, rows: Path) -> Mapping[str, Any]:
        """|Δ| in nats a token between the log-probs that this model recorded for some of the rows and those of its
        forward: `mean`, `p99`, `max`, the mean that is `allowed`, `tokens`, `completions`, and `worst`, pairs of sample
        id and mean. Empty where it generated none of them."""


@runtime_checkable
class SupportsDescription(Protocol):
    """A family that describes its samples and their options; the default is completions and temperature."""

    @classmethod
    def describe_samples(cls, config: Any, count: int) -> str:
        """The samples and the options they are generated with, in words: 4 images, 30 steps."""


@runtime_checkable
class SupportsConfigCheck(Protocol):
    """A policy that refuses unsupported options; called again when a run resumes with another configuration."""

    def check_config(self) -> None:
        """Raises ConfigError for an option that the family or this model does not support."""


@runtime_checkable
class SupportsTruncation(Protocol):
    """A policy that can truncate completions; without it completions that are too long are skipped."""

    def encode_truncated(self, prompt: Prompt, answer: Any, source: str, max_length: int | None) -> Mapping[str, Any]:
        """As `encode_completion`, cut to max_length (tokens, prompt and completion). Raises TooLong without room."""


@dataclass(frozen=True)
class ModelUsage:
    """What a model card says: the hub's library and task, code that loads the model, a remark, what it generates."""

    library: str = ""
    task: str = ""
    code: str = ""
    note: str = ""
    generated: str = "completions to"


@runtime_checkable
class SupportsPublishing(Protocol):
    """A family whose models other libraries load; without it the committed files are copied as they are."""

    @classmethod
    def publish(cls, config: Any, folder: Path, start: Path, out: Path, base: str | None, merged: bool) -> ModelUsage:
        """Writes the model of a committed folder into `out`, with all that it needs. `base`: the initial model's public
        name, None for a bundled one. `merged`: an adapter is added to its base. Raises ConfigError where there is none.
        """


@dataclass(frozen=True)
class RankedCandidates:
    """What a rule chooses from: C candidates sorted by prompt, then by score descending, then by k.

    The i-th of G prompts is the slice start[i] : start[i] + size[i].
    """

    row: IntArray  # (C,) the row of the candidate in the round's samples
    group: IntArray  # (C,) the number of its prompt
    k: npt.NDArray[np.int32]  # (C,) its index within the prompt
    score: FloatArray  # (C,) what it is ranked by
    rank: npt.NDArray[np.int32]  # (C,) 1 is the best of its prompt
    start: IntArray  # (G,)
    size: IntArray  # (G,) at least 1

    @property
    def equal(self) -> BoolArray:
        """(G,) whether all candidates of a prompt have the same score; true of a single one."""
        return np.asarray(self.score[self.start] == self.score[self.start + self.size - 1])

    def of_prompt(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """(C,) for each candidate the value of its prompt, from values (G,)."""
        return np.repeat(values, self.size)

    def only(self, groups: BoolArray) -> RankedCandidates:
        """The candidates of the prompts that are True in `groups` (G,)."""
        if groups.all():
            return self
        mine, size = self.of_prompt(groups), self.size[groups]
        row, group, k = self.row[mine], self.group[mine], self.k[mine]
        return RankedCandidates(row, group, k, self.score[mine], self.rank[mine], np.cumsum(size) - size, size)


# Weights (C,), 0 for what is not kept, and reasons (C,): indices into the `reasons` of the rule.
Decision = tuple[FloatArray, npt.NDArray[Any]]


class Rule(Protocol):
    """Decides which candidates are kept, with what weight: pure, the same for the same candidates and seed."""

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why a candidate is kept or not, in words."""

    def decide(self, pool: RankedCandidates, seed: int) -> Decision:
        """A weight and a reason for every candidate; `seed`, the round's, decides anything random."""


class LearnedModel(Protocol):
    """The trained model, as an objective sees it."""

    def terms(self, batch: Mapping[str, Any]) -> tuple[Any, Any, Any]:
        """Tensors, with gradient: loss and weight of each unit (token, image at a noise level), the batch's weight."""


class Objective(Protocol):
    """Chooses the training rows and computes the loss. needs: which samples `rows` gets, of kept and rejected."""

    @property
    def needs(self) -> frozenset[str]: ...

    def rows(self, samples: pa.Table, verdicts: pa.Table) -> pa.Table:
        """The rows to train on, from one chunk's samples and their verdicts, row for row: all columns of `samples`, and
        `weight` (0 leaves a row out). Further columns of numbers reach the batch by their names."""

    def loss(self, model: Any, batch: Mapping[str, Any]) -> tuple[Any, Any]:
        """Tensors: the loss of a micro-batch, normalised so that those of a step add up, and the weight behind it."""


class Reward:
    """Gives a number to each completion: TRL's contract, called by keyword.

    A reward model sets `has_weights`: it is called on the main thread, and frees its memory when a policy needs it.
    """

    name: str
    media: frozenset[str]
    accepts: frozenset[str] | None = None  # the keywords that it takes; None: all
    needs: frozenset[str] = frozenset()  # columns of the data without which every call fails
    is_async = False
    has_weights = False

    def __call__(self, *, prompts: list[Any], completions: list[Any], **columns: Any) -> Any:
        """A number, or None where the reward does not apply, for each completion; `prompts` and `columns` alike."""
        raise TypeError(f"{type(self).__name__} must define `__call__`")

    @cached_property
    def fingerprint(self) -> str:
        """Changes when the reward's code, options or weights change: enters the score stage's key."""
        raise TypeError(f"{type(self).__name__} must define `fingerprint`")

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that are held now."""
        return 0

    def prepare(self) -> None:
        """Reads the weights, unless they are held: may take longer than a call is given."""

    def release(self) -> None:
        """Frees the weights; the next call reads them again."""

    def notes(self) -> tuple[str, ...]:
        """What a user should know about how the samples were read, each told once."""
        return ()

    def close(self) -> None:
        """Ends processes and threads of the reward."""


class PolicyProvider(Protocol):
    """Loads policies, and holds at most one large model at a time."""

    def at(self, folder: Path) -> Policy:
        """The policy of this committed folder, for generation and log-probabilities, kept for the next call."""

    def fresh(self, folder: Path) -> Policy:
        """A newly loaded instance, for training; all others are freed."""

    def encoder(self, folder: Path) -> Policy:
        """An instance for `encode_completion` alone, which needs no weights: it stays beside the one large model."""


StageInputs = Mapping[str, Path]


class StageBase(ABC):
    """What every stage declares, so that keys, resume and staleness are computed from the table of stages alone.

    `writes` is its folder in the round. `reads` are the folders whose manifest enters its key: "generate", "model@-1"
    of the round before, "data@0" of round 0. `fields` are the dotted config fields that enter it.
    """

    name: str
    writes: str
    reads: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()  # those of `reads` of which every column is needed
    grows = False  # whether later versions add fields and inputs, which leaves older rounds valid
    scratch: Path | None = None  # deleted once the stage is committed
    unkeyed: frozenset[str] = frozenset()  # fields of the sections in `fields` that do not enter the key
    reproducible = True  # whether running it again gives the same bytes

    def fingerprints(self) -> Mapping[str, str]:
        """What shapes the stage besides fields and inputs: the hash of a reward's code, of a model's weights."""
        return {}


class SingleStage(StageBase):
    """A stage that runs once, in the loop's process."""

    @abstractmethod
    def run(self, inputs: StageInputs, out: Path) -> tuple[str, ...] | None:
        """Writes the stage's files into `out`; returns notes for the user."""


class ChunkedStage(StageBase):
    """A stage that an engine runs chunk by chunk; a `local` one needs objects that only the loop's process has."""

    local = False

    @abstractmethod
    def chunks(self, inputs: StageInputs) -> list[int]:
        """The numbers of the chunks to run."""

    @abstractmethod
    def run_chunk(self, inputs: StageInputs, index: int, out: Path, metadata: Mapping[str, str]) -> tuple[str, ...]:
        """Writes one chunk's table to `out`, with this metadata; returns notes for the user."""


Stage = SingleStage | ChunkedStage


class Scorer(Protocol):
    """Several rewards with their weights: one score for each sample."""

    names: tuple[str, ...]

    @property
    def extras(self) -> Any:
        """What rewards logged in the last call: `metrics` (means), `counts` behind them, `columns` (by sample)."""

    @property
    def fingerprint(self) -> str: ...

    def score_samples(
        self, prompts: list[Prompt], samples: pa.Table, earlier: Mapping[int, Score] | None = None
    ) -> list[Score]:
        """Scores of the samples, row for row; prompts[i] is the prompt of row i.

        `earlier`: by row, scores that are kept as they are; no reward is called for these samples.
        """

    def notes(self) -> tuple[str, ...]:
        """Remarks for the user about how the samples were read (truncated prompts), each once."""


class Metric(Protocol):
    """A pure function of committed samples, or of the reference completions of the held-out prompts.

    A built-in one returns its numbers by name; a custom one a number, or one for each sample.
    """

    needs: frozenset[str]  # scores, text, image, features, invalid, log_probs, own_log_probs, references

    def __call__(self, samples: pa.Table) -> Any: ...


@dataclass(frozen=True, slots=True)
class MonitorInput:
    """What the alarms of a round are computed from; tables have one row a sample, null where a value is not known.

    `samples`, of the round: sample_id, prompt_id, k, source, score, weight (0: rejected) and rewards/NAME; counts/NAME
    is what a reward counts in the score where that is not its value; `factors` are the rewards' weights. Of texts also
    length, clipped, similarity (among its prompt's own samples), and text where it was kept or is in the control; of
    images brightness, saturation, contrast, thumbnail. `control`: as many of the policy's first samples of each prompt
    as were kept. `held_out`, of the evaluation: sample_id, prompt_id, k, score, and, where measured, held_out (the
    reward that `judge` names) and log_ratio (log p - log p0, nats); `earlier` are the same of rounds 0, 1, …. Both
    have, where known, `empty`, `clipped`, `length`, and `content`, equal for equal completions. `first` are the
    measures of round 1's samples, None in round 1. `losses` are those of the round's optimizer steps. `mismatch`:
    see SupportsMismatch; empty where nothing was measured.
    """

    round: int
    samples: pa.Table
    factors: Mapping[str, float]
    held_out: pa.Table | None
    earlier: Sequence[pa.Table | None]
    judge: str
    first: Mapping[str, Any] | None
    losses: Sequence[float] = ()
    mismatch: Mapping[str, Any] = field(default_factory=dict)
