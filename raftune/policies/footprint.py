"""What a family's start model takes: memory, disk, time. The base of every footprint counts samples alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from raftune.config.run import RunConfig
from raftune.store.partial import SAVE_EVERY

BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
ADAM = 2  # moments for each trained weight
PER_TOKEN = 12  # on disk: an id, a log-probability, and the text, before compression
PER_SAMPLE = 200  # identity, scores and verdict


@dataclass(frozen=True)
class RoundAmounts:
    """Of one round: prompts asked, samples generated to learn from, samples that compete (with other sources), rows
    kept,
    optimizer steps; samples generated to judge by. Of the run: rounds.

    `kept_exact`: how many are kept does not depend on their scores.
    """

    rounds: int
    prompts: int
    drawn: int
    competing: int
    kept: int
    kept_exact: bool
    steps: int
    judged: int

    @property
    def samples(self) -> int:
        """All that the policy generates in the run: every round to learn from, the start and every round to judge
        by.
        """
        return self.rounds * self.drawn + (self.rounds + 1) * self.judged


@dataclass(frozen=True)
class MeasuredPeak:
    """Bytes that the process (on a GPU: its tensors) took at most, and before; the rows, and tokens of each answer."""

    most: int
    before: int
    rows: int
    tokens: float


@dataclass(frozen=True)
class MemoryPeaks:
    """Bytes that generating and training took in the probe, and what they will take in the run at most; None: not
    known.
    """

    drawing: int | None
    training: int | None
    run_drawing: int | None
    run_tuning: int | None


@dataclass(frozen=True)
class DiskForecast:
    """Bytes: the models that are kept, the checkpoints while a round is trained, the samples (of text at most, of
    images about), the latents that images are learned by."""

    models: int
    checkpoints: int
    samples: int
    latents: int = 0

    @property
    def total(self) -> int:
        return self.models + self.checkpoints + self.samples + self.latents


@dataclass(frozen=True)
class Footprint:
    """The start model in numbers. A family gives its own as its attribute `footprint`; of one that has none, nothing is
    known of its model."""

    model_key: ClassVar[str] = ""  # names of the footprint and of its memory in `raftune plan --json`
    memory_key: ClassVar[str] = ""
    counts_tokens: ClassVar[bool] = False  # whether the policy has an `encoder` that counts a prompt's tokens
    encodes_answers: ClassVar[bool] = True  # whether to encode all answers of the data takes no model
    samples: ClassVar[str] = "samples at most"  # what takes room on disk

    @classmethod
    def of(cls, policy: Any, start: Path, facts: Any) -> Footprint:
        """That of a start model that was checked before; `facts` is what `start` returned."""
        return cls()

    @classmethod
    def published(cls, config: RunConfig) -> Self | None:
        """That of a model that is not at hand, whose sizes are published; else None."""
        return None

    @classmethod
    def unread_facts(cls, config: RunConfig, start: Path) -> dict[str, Any] | None:
        """What `start` would return, as far as it is known without weights; None where it is not."""
        return None

    @property
    def not_tried(self) -> str:
        """Why no samples are generated to measure time; empty where they are."""
        return ""

    @property
    def widths(self) -> tuple[int, ...]:
        """Samples of each prompt that are generated for that; empty: as configured."""
        return ()

    @property
    def seconds_basis(self) -> str:
        """What the `seconds` are reckoned by."""
        return ""

    def describe(self, family: str) -> str:
        """The model in words."""
        return family

    def describe_work(self, config: RunConfig, planned: RoundAmounts, tokens: float | None) -> str:
        """What generating and training come to, in the model's terms; `tokens` are those of an answer, as measured."""
        return ""

    def remarks(self, config: RunConfig, longest: int | None) -> list[str]:
        """What a user should know, with a longest prompt of so many tokens."""
        return []

    def work(self, config: RunConfig, planned: RoundAmounts) -> Any:
        return None

    def memory(self, config: RunConfig, longest_prompt: int = 0, rows: int = 0) -> Any:
        """Bytes at the two peaks, as a dataclass that describes itself, with at most `rows` samples at once."""
        return None

    def peaks(
        self, drawing: MeasuredPeak | None, training: MeasuredPeak | None, config: RunConfig, prompt: int, rows: int
    ) -> MemoryPeaks:
        """What was measured, and what the run will take at most."""
        generated, trained = drawing.most if drawing else None, training.most if training else None
        return MemoryPeaks(generated, trained, generated, trained)

    def disk(
        self, config: RunConfig, planned: RoundAmounts, sample: float | None = None, fit: float | None = None
    ) -> DiskForecast:
        """What the run writes. `sample`: bytes of a sample as measured. `fit`: seconds of a round's training."""
        return sample_disk(planned, PER_TOKEN if sample is None else sample)

    def seconds(self, config: RunConfig, work: Any) -> dict[str, float] | None:
        """By arithmetic, where nothing was measured; None where they are not known."""
        return None


def sample_disk(planned: RoundAmounts, content: float, model: int = 0, checkpoint: int = 0) -> DiskForecast:
    every = planned.samples + planned.rounds * (planned.competing - planned.drawn)
    return DiskForecast(model, 2 * checkpoint, int(every * (content + PER_SAMPLE)))


def kept_models(config: RunConfig, rounds: int) -> int:
    """How many rounds' models lie on disk."""
    return {"all": rounds, "best": min(3, rounds), "last": min(2, rounds)}[config.keep_models]


def takes_checkpoints(config: RunConfig, planned: RoundAmounts, fit: float | None) -> bool:
    """Whether a fit that takes `fit` seconds (None: not known) leaves checkpoints before it is done."""
    by_steps = config.training.save_steps is not None and planned.steps > config.training.save_steps
    return by_steps or (planned.steps > 1 and (fit is None or fit > SAVE_EVERY))


def in_short(number: int) -> str:
    """A number of parameters as people say it: 0.9M, 7.2B."""
    for size, letter in ((1_000_000_000, "B"), (1_000_000, "M")):
        if number >= size / 10:
            return f"{number / size:.1f}{letter}"
    return f"{number:,}"


def footprint_of(family: Any) -> type[Footprint]:
    """The class of the family's footprints."""
    found: type[Footprint] = getattr(family, "footprint", Footprint)
    return found
