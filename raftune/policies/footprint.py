"""Memory and disk that a family's model takes, as `raftune plan` forecasts it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from raftune.config.run import RunConfig
from raftune.store.partial import SAVE_EVERY

BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
ADAM = 2  # moments for each trained weight
PER_TOKEN = 12  # on disk: an id, a log-probability, and the text, before compression
PER_SAMPLE = 200  # identity, scores and verdict


@dataclass(frozen=True)
class RoundAmounts:
    """Counts for one round, except `rounds`. `generated`: samples for training, `competing` include those of
    other sources, `judged` are generated for evaluation. `kept_exact`: whether `kept` is independent of the scores.
    """

    rounds: int
    prompts: int
    generated: int
    competing: int
    kept: int
    kept_exact: bool
    steps: int
    judged: int

    @property
    def samples(self) -> int:
        """All samples that the policy generates in the run; the initial model is evaluated as every round is."""
        return self.rounds * self.generated + (self.rounds + 1) * self.judged


@dataclass(frozen=True)
class MeasuredPeak:
    """Peak bytes of the process (on a GPU: of its tensors), bytes before, rows, and mean tokens of a completion."""

    most: int
    before: int
    rows: int
    tokens: float


@dataclass(frozen=True)
class MemoryPeaks:
    """Peak bytes of generating and training: in the probe, and in the run at most. None: not measured."""

    drawing: int | None
    training: int | None
    run_drawing: int | None
    run_tuning: int | None


@dataclass(frozen=True)
class DiskForecast:
    """Bytes of the kept models, of checkpoints while a round is trained, of samples, and of latents of images."""

    models: int
    checkpoints: int
    samples: int
    latents: int = 0

    @property
    def total(self) -> int:
        return self.models + self.checkpoints + self.samples + self.latents


@dataclass(frozen=True)
class Footprint:
    """Sizes of the initial model. A family names its subclass as the attribute `footprint`; without one, samples alone
    are counted."""

    model_key: ClassVar[str] = ""  # names of the footprint and of its memory in `raftune plan --json`
    memory_key: ClassVar[str] = ""
    counts_tokens: ClassVar[bool] = False  # whether the policy has an `encoder` that counts a prompt's tokens
    encodes_answers: ClassVar[bool] = True  # whether the completions of the data can be encoded without the model
    samples: ClassVar[str] = "samples at most"  # label of the disk that samples take

    @classmethod
    def of(cls, policy: Any, start: Path, facts: Any) -> Footprint:
        """The footprint of a checked initial model; `facts` is what the family's `start` returned."""
        return cls()

    @classmethod
    def unread_facts(cls, config: RunConfig, start: Path) -> dict[str, Any] | None:
        """What `start` would return, as far as it is known without weights; None where it is not."""
        return None

    @property
    def not_tried(self) -> str:
        """Why the probe is skipped; empty where it is not."""
        return ""

    @property
    def held(self) -> int:
        """Bytes of the weights in memory."""
        return 0

    @property
    def saved(self) -> int:
        """Bytes of a round's saved model."""
        return 0

    def describe(self, family: str) -> str:
        """The model in words."""
        return family

    def describe_work(self, config: RunConfig, planned: RoundAmounts, tokens: float | None) -> str:
        """Generation and training in the model's units; `tokens`: the measured mean length of a completion."""
        return ""

    def remarks(self, config: RunConfig, longest: int | None) -> list[str]:
        """Notes for the user, where the longest prompt has so many tokens."""
        return []

    def work(self, config: RunConfig, planned: RoundAmounts) -> Any:
        """Amounts in the model's units, as a dataclass; None where there are none."""
        return None

    def memory(self, config: RunConfig, longest_prompt: int = 0, rows: int = 0) -> Any:
        """Bytes by arithmetic with at most `rows` samples at once, as a dataclass with a `describe`; None: unknown."""
        return None

    def peaks(
        self, drawing: MeasuredPeak | None, training: MeasuredPeak | None, config: RunConfig, prompt: int, rows: int
    ) -> MemoryPeaks:
        """The measured peaks, scaled to the run."""
        generated, trained = drawing.most if drawing else None, training.most if training else None
        return MemoryPeaks(generated, trained, generated, trained)

    def sample_bytes(self, config: RunConfig, planned: RoundAmounts, sample: float | None) -> tuple[int, int]:
        """Bytes on disk of all samples of the run, and of their latents; `sample`: measured bytes of one."""
        content = PER_TOKEN if sample is None else sample
        total = planned.samples + planned.rounds * (planned.competing - planned.generated)
        return int(total * (content + PER_SAMPLE)), 0

    def disk(
        self, config: RunConfig, planned: RoundAmounts, sample: float | None = None, fit: float | None = None
    ) -> DiskForecast:
        """What the run writes. `sample`: measured bytes of a sample. `fit`: measured seconds of a round's training."""
        rounds, save_steps = planned.rounds, config.training.save_steps
        models = {"all": rounds, "best": min(3, rounds), "last": min(2, rounds)}[config.keep_models]
        slow = planned.steps > 1 and (fit is None or fit > SAVE_EVERY)
        checkpoints = 2 if slow or (save_steps is not None and planned.steps > save_steps) else 0
        samples, latents = self.sample_bytes(config, planned, sample)
        return DiskForecast(models * self.saved, checkpoints * (1 + ADAM) * self.saved, samples, latents)


def rows_of_round(config: RunConfig, kept: int) -> float:
    """Rows that a round trains on in one epoch, replayed and reference rows included, at most."""
    training = config.training
    rows = float(kept * (1 + min(training.replay_rounds, max(0, config.num_rounds - 1))))
    return rows if training.reference is None else rows / (1 - training.reference.fraction)


def in_short(number: int) -> str:
    """A number of parameters as people write it: 0.9M, 7.2B."""
    for size, letter in ((1_000_000_000, "B"), (1_000_000, "M")):
        if number >= size / 10:
            return f"{number / size:.1f}{letter}"
    return f"{number:,}"
