"""Protocols shared across packages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raftune.arrays import BoolArray, Float32Array, FloatArray, IntArray
from raftune.records import Prompt, Sample, Score

Callback = Callable[[str, dict[str, Any]], None]  # (event, its facts)
EVALUATION = "e"  # ends the scope of a chunk whose samples are only looked at


@dataclass(frozen=True, slots=True)
class Chunk:
    """A fixed slice of prompts x K: what is generated and scored at once, always in the same batches.

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
        """Whether a training may learn from its samples; those of an evaluation are only looked at."""
        return not self.scope.endswith(EVALUATION)

    def sample_id(self, prompt: Prompt, k: int) -> str:
        """The id of the prompt's k-th sample: scope, prompt and k."""
        return f"{self.scope}/{prompt.id}/{k:03d}"


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What a training did, without times: the same for an interrupted and an uninterrupted one.

    losses[i] is the mean loss of optimizer step i (nats per token, or the chunk that the named loss has).
    """

    rows: int
    steps: int
    losses: tuple[float, ...]
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """A chunk that lies on disk: its file with its size in bytes, its SHA-256, its rows."""

    chunk: int
    file: str
    rows: int
    sha256: str
    bytes: int
    seconds: float = 0.0
    notes: tuple[str, ...] = ()


class Policy(Protocol):
    """The generative model being aligned. A family is a kind of policy."""

    media: str  # text | messages | image | category
    payload: pa.Schema  # the family's columns of a sample, `completion` first: opaque to the loop

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that this instance holds now; 0 before they are read."""
        ...

    def generate(self, chunk: Chunk) -> list[Sample]:
        """All samples of the chunk, prompt by prompt, k ascending. Raises OutOfMemory, ModelError."""
        ...

    def encode_completion(self, prompt: Prompt, answer: Any, source: str) -> Mapping[str, Any]:
        """The payload (with `completion`) of somebody else's answer, encoded as if this policy had generated it."""
        ...

    def train(self, rows: Path, work: Path, out: Path) -> TrainReport:
        """Fits the policy to the rows (Parquet: prompt, weight, payload) and writes the new model into `out`.

        Checkpoints lie under `work`; the newest one that verifies is continued from.
        """
        ...

    def notes(self) -> tuple[str, ...]:
        """What a user should know about how this policy generated (a fallback taken, prompts cut), each once."""
        ...


@runtime_checkable
class SupportsLogProbs(Protocol):
    """A policy that computes log-probabilities of completions; without it beta > 0 is refused."""

    def log_probs(self, prompts: Sequence[Prompt], samples: pa.Table, batch_size: int) -> FloatArray:
        """(N,) nats, untempered, summed over the completion's tokens, EOS included."""
        ...

    def recorded_log_probs(self, samples: pa.Table) -> FloatArray:
        """(N,) the same under the policy that generated the samples, as noted while generating; NaN where nothing was
        noted.
        """
        ...


@runtime_checkable
class SupportsPromptCheck(Protocol):
    """A policy that reports unreadable prompts before generation."""

    def unread(self, prompt: Prompt) -> str | None:
        """The end of a prompt that is too long to be read whole; None where it is not. Raises DataError for one that
        cannot be read at all."""
        ...


@dataclass(frozen=True)
class GenerationRequest:
    """What a backend generates: for each of the token prompts a completion for each of its seeds.

    parameters: temperature, top_p, top_k, min_p, repetition_penalty, max_completion_length, stop_strings, eos_ids,
    pad_id and batch_size, as attributes. tokenizer: for stop strings alone.
    """

    prompts: Sequence[Sequence[int]]
    seeds: Sequence[Sequence[int]]
    parameters: Any
    tokenizer: Any


# Token ids with the EOS where there is one, a log-probability for each (nats, before temperature and cuts), and why it
# ended: eos, stop (a stop string) or length.
Completion = tuple[Sequence[int], Sequence[float], str]


class SamplingBackend(Protocol):
    """What generates the completions of a language model."""

    @property
    def reproducible(self) -> bool:
        """Whether a completion depends on model, prompt, seed and parameters alone, and not on its batch."""
        ...

    def generate(self, model: Any, request: GenerationRequest) -> Sequence[Sequence[Completion]]:
        """result[i][k] continues prompts[i] with the noise of seeds[i][k]."""
        ...


@runtime_checkable
class BatchReader(Protocol):
    """A Reader that looks at many prompts at once faster than at each."""

    def reads_all(self, prompts: Sequence[Prompt]) -> bool:
        """Whether `unread` would say None of every one of them."""
        ...


@runtime_checkable
class SupportsBackends(Protocol):
    """A policy that can generate in several ways: one is chosen once a run, and recorded."""

    def choose_backend(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """What a trial on these prompts found, as JSON holds it. Raises ModelError where no way is right."""
        ...

    def use_backend(self, record: Mapping[str, Any]) -> None:
        """From now on, this policy generates as the record of its run says."""
        ...

    def backend(self) -> Mapping[str, Any] | None:
        """The record by which this policy generates, its run's or one of a trial of its own; None before either."""
        ...


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
        ...


@runtime_checkable
class SupportsSharedParts(Protocol):
    """A policy with frozen parts that all rounds share; they stay in memory between rounds."""

    @property
    def shared(self) -> Any:
        """The parts, with `nbytes`."""
        ...


@runtime_checkable
class SupportsTrainer(Protocol):
    """A family whose `train` goes through transformers' Trainer: the options of `training` are tried when planning."""

    uses_trainer: bool


@runtime_checkable
class SupportsDescription(Protocol):
    """A family that describes its samples and their options; the default is answers and temperature."""

    @classmethod
    def describe_samples(cls, config: Any, count: int) -> str:
        """So many samples, in words, and by which options they are generated: 4 images, 30 steps."""
        ...


@runtime_checkable
class SupportsConfigCheck(Protocol):
    """A policy that refuses unsupported options; called again when a run resumes with another configuration."""

    def check_config(self) -> None:
        """Raises ConfigError for an option that the family, or this very model, does not have or cannot follow."""
        ...


@runtime_checkable
class SupportsTruncation(Protocol):
    """A policy that can truncate completions; without it completions that are too long are skipped."""

    def encode_truncated(self, prompt: Prompt, answer: Any, source: str, max_length: int | None) -> Mapping[str, Any]:
        """As `encode_completion`; what exceeds max_length (tokens, prompt and answer) is cut. Raises TooLong without
        any room.
        """
        ...


@dataclass(frozen=True)
class ModelUsage:
    """What a model card says of a model's use: library and task for the hub, the code that loads it, a remark; and in
    words what was generated for a prompt."""

    library: str = ""
    task: str = ""
    code: str = ""
    note: str = ""
    generated: str = "answers to"


@runtime_checkable
class SupportsPublishing(Protocol):
    """A family whose models other libraries load; without it the committed files are copied as they are."""

    @classmethod
    def publish(cls, config: Any, folder: Path, start: Path, out: Path, base: str | None, merged: bool) -> ModelUsage:
        """Writes the model of a committed folder into `out`, with what it needs, and returns what its card says.

        base: what the start is called elsewhere, None for a bundled one. merged: an adapter is added to its base;
        raises ConfigError where there is none.
        """
        ...


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
        """(G,) whether all candidates of a prompt score the same; one alone does."""
        return np.asarray(self.score[self.start] == self.score[self.start + self.size - 1])

    def of_prompt(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """(C,) for each candidate the value of its prompt, from values (G,)."""
        return np.repeat(values, self.size)

    def only(self, groups: BoolArray) -> RankedCandidates:
        """The candidates without the prompts that are False in `groups` (G,)."""
        if groups.all():
            return self
        mine = np.repeat(groups, self.size)
        size = self.size[groups]
        row, group, k = self.row[mine], self.group[mine], self.k[mine]
        return RankedCandidates(row, group, k, self.score[mine], self.rank[mine], group_starts(size), size)


def group_starts(size: IntArray) -> IntArray:
    """(G,) where each of consecutive runs of these sizes starts."""
    return np.cumsum(size) - size


# Weights (C,), 0 for what is not kept, and reasons (C,): indices into the `reasons` of the rule.
Decision = tuple[FloatArray, npt.NDArray[Any]]


class Rule(Protocol):
    """Decides which of the candidates are kept, with what weight: pure, the same for the same candidates and seed."""

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why a candidate is kept or not, in words."""
        ...

    def decide(self, pool: RankedCandidates, seed: int) -> Decision:
        """A weight and a reason for every candidate; `seed` is the round's, for what is left to chance."""
        ...


class LearnedModel(Protocol):
    """What an objective sees of the model that is trained."""

    def terms(self, batch: Mapping[str, Any]) -> tuple[Any, Any, Any]:
        """Tensors, with gradient: the loss of each chunk (a token, an image at a noise level), the weight of each, and
        the weight that the batch has in all."""
        ...


class Objective(Protocol):
    """What of the candidates reaches training, and the loss.

    needs: of kept and rejected, the samples that `rows` is given.
    """

    @property
    def needs(self) -> frozenset[str]: ...

    def rows(self, samples: pa.Table, verdicts: pa.Table) -> pa.Table:
        """The rows to train on, of one chunk's samples with their verdicts, row for row: all columns of `samples`, and
        `weight` (0 leaves a row out). Further columns of numbers reach the batch by their names."""
        ...

    def loss(self, model: Any, batch: Mapping[str, Any]) -> tuple[Any, Any]:
        """Tensors: the loss of a micro-batch, normalised so that those of a step add up, and the weight behind it."""
        ...


class Reward(Protocol):
    """What gives a number to a completion: TRL's contract, called by keyword."""

    name: str
    media: frozenset[str]
    fingerprint: str  # changes when the reward's code, options or weights change: enters the score stage's key

    def __call__(self, *, prompts: list[Any], completions: list[Any], **columns: list[Any]) -> list[float | None]: ...


StageInputs = Mapping[str, Path]


class PolicyProvider(Protocol):
    """Hands out policies, and holds at most one large model at a time."""

    def at(self, folder: Path) -> Policy:
        """The policy of this committed folder, for generating and log-probabilities; held until another is asked
        for.
        """
        ...

    def fresh(self, folder: Path) -> Policy:
        """A newly read instance, for training; whatever was held before is let go."""
        ...

    def encoder(self, folder: Path) -> Policy:
        """An instance for `encode_completion` alone, which needs no weights: it stays beside the one large model."""
        ...


class StageBase(Protocol):
    """What every stage declares, so that keys, resume and staleness are one walk over a table of stages.

    `name` is its name, `writes` its folder in the round. `reads` are the folders whose manifest enters its key:
    "generate", "model@-1" of the round before, "data@0" of the start. `fields` are the dotted config fields that enter
    it.
    """

    @property
    def name(self) -> str: ...
    @property
    def writes(self) -> str: ...
    @property
    def reads(self) -> tuple[str, ...]: ...
    @property
    def fields(self) -> tuple[str, ...]: ...

    def fingerprints(self) -> Mapping[str, str]:
        """What shapes the stage besides fields and inputs: the hash of a reward's code, of a model's weights."""
        ...


class SingleStage(StageBase, Protocol):
    """A stage that runs once, in the loop's process."""

    def run(self, inputs: StageInputs, out: Path) -> tuple[str, ...] | None:
        """Writes the stage's files into `out`; returns what a user should know about it."""
        ...


@runtime_checkable
class ChunkedStage(StageBase, Protocol):
    """A stage that an engine runs chunk by chunk; a `local` one needs objects that only the loop's process has."""

    @property
    def local(self) -> bool: ...

    def chunks(self, inputs: StageInputs) -> list[int]:
        """The numbers of the chunks to run."""
        ...

    def run_chunk(self, inputs: StageInputs, index: int, out: Path, metadata: Mapping[str, str]) -> tuple[str, ...]:
        """Writes one chunk's table to `out`, with this metadata; returns what a user should know about it."""
        ...


Stage = SingleStage | ChunkedStage


class RewardExtras(Protocol):
    """Means of what rewards gave to `log_metric`, and of how many numbers; columns of `log_extra`, a value a sample."""

    @property
    def metrics(self) -> dict[str, float]: ...

    @property
    def counts(self) -> dict[str, int]: ...

    @property
    def columns(self) -> dict[str, list[Any]]: ...


class Scorer(Protocol):
    """Several rewards with their weights: one score for each sample."""

    names: tuple[str, ...]

    @property
    def extras(self) -> RewardExtras:
        """What rewards logged during the last `score_samples`."""
        ...

    @property
    def fingerprint(self) -> str: ...

    def score_samples(
        self, prompts: list[Prompt], samples: pa.Table, earlier: Mapping[int, Score] | None = None
    ) -> list[Score]:
        """Scores of the samples, row for row; prompts[i] is what row i answers.

        `earlier`: by their row, the scores of samples about which no reward is asked again.
        """
        ...

    def notes(self) -> tuple[str, ...]:
        """What a user should know about how the samples were read (prompts cut), each once."""
        ...


class FeatureExtractor(Protocol):
    """A model that sees images as vectors."""

    @property
    def fingerprint(self) -> str:
        """Changes with whatever shapes the vectors."""
        ...

    def image_features(self, images: Sequence[Any]) -> Float32Array:
        """(N, d) a vector for each PIL image, of any size."""
        ...


class Metric(Protocol):
    """A pure function of committed samples, or of the reference answers to the prompts that they answer.

    A built-in one gives its numbers by name; a custom one a number, or one for each sample.
    """

    needs: frozenset[str]  # scores, text, image, features, invalid, log_probs, own_log_probs, references

    def __call__(self, samples: pa.Table) -> Any: ...


@dataclass(frozen=True, slots=True)
class MonitorInput:
    """What is looked at when a round ends; tables have one row a sample, null where a value is not known.

    `samples` competed in the round: sample_id, prompt_id, k, source, score, weight (0: rejected) and rewards/NAME; of
    texts also length, clipped, similarity (among its prompt's own samples), control, and text where it was kept or is
    of the control: of each prompt as many of the policy's first samples as were kept; of images also brightness,
    saturation, contrast, thumbnail, and control. `factors` are the rewards' weights; counts/NAME is what a reward
    counts where that is not its value. `held_out` judged the round: sample_id, prompt_id, k, score, and, where they
    were measured, held_out and log_ratio (log p - log p0, nats), None without any; `earlier` are the same of rounds 0,
    1, …; `judge` says what held_out is. `first` are the measures of what round 1 generated, None in round 1. Beside
    these, samples and held_out say of each answer, where the family lets it be known, whether it is empty and clipped,
    and `content`, equal where two are the same; of tokens `length`. `losses` are those of the round's optimizer steps.
    """

    round: int
    samples: pa.Table
    factors: Mapping[str, float]
    held_out: pa.Table | None
    earlier: Sequence[pa.Table | None]
    judge: str
    first: Mapping[str, Any] | None
    losses: Sequence[float] = ()


class Monitor(Protocol):
    """Pure functions that look at a round."""

    def similarities(self, texts: Sequence[str], groups: IntArray) -> FloatArray:
        """(G,) the mean similarity of two texts of each group, NaN for a group without two; text i is in groups[i]."""
        ...

    def measures(self, evidence: MonitorInput) -> dict[str, dict[str, Any]]:
        """The measures of what was `generated`, and of what was `selected`."""
        ...

    def alarms(self, evidence: MonitorInput, sets: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
        """What a person should look at, each with evidence in words, numbers, and samples."""
        ...
