"""Checks that every policy family must pass, built-in or custom.

    @pytest.mark.parametrize("claim", claims(Digits), ids=lambda claim: claim.__name__)
    def test_digits_keep(claim, tmp_path):
        claim(begin(config, tmp_path, prompts=[3, 1, 4], answer=image), tmp_path)

A failed claim raises AssertionError with an explanation. Claims need no test runner.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raftune.config.load import validate
from raftune.config.run import RunConfig
from raftune.policies.registry import Family, family_of, load_policy
from raftune.protocols import Chunk, Policy, SupportsLogProbs, TrainReport
from raftune.records import Prompt, PromptContent, Sample, derive_seed, prompt_ids
from raftune.stages.gather import with_prompts
from raftune.stages.generate import as_table, encoded, generate_samples
from raftune.store.files import sha256_of
from raftune.store.parquet import write_table

K = 3
SMALL = 1e-4  # nats: what the order of sums may change in a log-probability
LEVELS = 2  # of 255: what the order of sums may change in a pixel


@dataclass(frozen=True)
class FamilyCase:
    """A family with its initial model on disk, prompts, and `answer`, which it did not generate and encodes as
    `completion`."""

    config: RunConfig
    family: Family
    start: Path
    prompts: tuple[Prompt, ...]
    answer: Any
    completion: Any

    def load(self, folder: Path | None = None) -> Policy:
        return load_policy(self.family, self.config, folder or self.start, self.start)

    def chunk(self, batch_size: int = 64) -> Chunk:
        """K samples of each prompt."""
        seeds = tuple(tuple(derive_seed("contract", prompt.id, k) for k in range(K)) for prompt in self.prompts)
        return Chunk(0, "0001", "round-0000", self.prompts, seeds, batch_size)

    @property
    def sample_prompts(self) -> list[Prompt]:
        """The prompt of each sample of the chunk."""
        return [prompt for prompt in self.prompts for _ in range(K)]

    def encoded(self) -> Sample:
        """The answer as a sample of the first prompt."""
        return encoded(self.load(), self.chunk(), self.prompts[0], 0, self.answer, "column:answer")

    def rows(self, samples: list[Sample], folder: Path) -> Path:
        """A file with the samples as training rows of weight one."""
        prompts = pa.table({"prompt_id": [p.id for p in self.prompts], "prompt": [p.content for p in self.prompts]})
        table = as_table(samples, self.load()).append_column("weight", pa.array([1.0] * len(samples)))
        write_table(with_prompts(table, prompts, 1), folder / "rows.parquet", {"raftune.round": "1"})
        return folder / "rows.parquet"

    def train(self, folder: Path, samples: list[Sample] | None = None) -> TrainReport:
        """Trains the initial model on these samples, or on its own; the new model is in `folder`/model."""
        (folder / "model").mkdir(parents=True)
        rows = self.rows(self.load().generate(self.chunk()) if samples is None else samples, folder)
        return self.load().train(rows, folder / "work", folder / "model")


Claim = Callable[[FamilyCase, Path], None]


def begin(
    config: RunConfig | Mapping[str, Any],
    folder: Path,
    *,
    prompts: Sequence[PromptContent],
    answer: Any,
    completion: Any = None,
) -> FamilyCase:
    """The case of the configuration's family, its initial model written to `folder`. `completion`: the answer as the
    family encodes it, where it differs."""
    config = config if isinstance(config, RunConfig) else validate(config)
    family, start = family_of(config), folder / "round-0000" / "model"
    start.mkdir(parents=True)
    family.start(config, start)
    records = tuple(Prompt(name, content) for name, content in zip(prompt_ids(prompts), prompts, strict=True))
    return FamilyCase(config, family, start, records, answer, answer if completion is None else completion)


def claims(family: Any) -> tuple[Claim, ...]:
    """The claims for this family: those about log-probabilities only where it computes them."""
    return ALL if hasattr(family, "log_probs") else tuple(claim for claim in ALL if claim not in LOG_PROB_CLAIMS)


def hold(kept: object, words: str) -> None:
    """Raises AssertionError with these words unless the claim is kept."""
    if not kept:
        raise AssertionError(words)


# -- generating --------------------------------------------------------------------------------------------------------


def every_prompt_gets_its_samples_in_order_with_ids_and_seeds_as_planned(case: FamilyCase, folder: Path) -> None:
    generate_samples(case.load(), case.chunk())


def samples_fit_the_schema_that_the_family_declares(case: FamilyCase, folder: Path) -> None:
    policy = case.load()
    table = as_table(policy.generate(case.chunk()), policy)
    table.validate(full=True)
    hold(
        table.num_rows == len(case.sample_prompts),
        f"generate must return {len(case.sample_prompts)} samples; got {table.num_rows}",
    )
    hold(policy.media == case.family.media, "media must be the same of the class and of what it loads")
    hold(policy.payload == case.family.payload, "payload must be the same of the class and of what it loads")


def the_same_seeds_generate_the_same_samples_in_another_instance(case: FamilyCase, folder: Path) -> None:
    hold(
        case.load().generate(case.chunk()) == case.load().generate(case.chunk()),
        "what is generated must depend on model, prompts and seeds alone: seed every generator from a sample's seed",
    )


def other_seeds_generate_other_samples(case: FamilyCase, folder: Path) -> None:
    """Of 8 x 9 samples under other seeds at least one differs, unless the family is nearly deterministic."""
    policy, chunk = case.load(), case.chunk()
    first = [sample.completion for sample in policy.generate(chunk)]
    others = [replace(chunk, seeds=tuple(tuple(s + i for s in row) for row in chunk.seeds)) for i in range(1, 9)]
    hold(
        any([sample.completion for sample in policy.generate(other)] != first for other in others),
        "what is generated must depend on the seeds; eight other sets of seeds gave the same samples",
    )


def a_smaller_batch_generates_the_same_samples(case: FamilyCase, folder: Path) -> None:
    """Images may differ by what the order of sums changes."""
    policy = case.load()
    large, small = ([s.completion for s in policy.generate(case.chunk(size))] for size in (64, K))
    same = large == small
    if case.family.media == "image":
        from raftune.data.images import image_of

        same = True
        for first, second in zip(large, small, strict=True):
            if first is None or second is None:
                same &= first == second
            else:
                pixels, others = (np.asarray(image_of(png), dtype=np.int16) for png in (first, second))
                same &= pixels.shape == others.shape and int(abs(pixels - others).max()) <= LEVELS
    hold(same, "a sample must not depend on what else is in its batch: memory that runs out makes batches smaller")


def no_weights_are_read_before_they_are_needed(case: FamilyCase, folder: Path) -> None:
    """An instance that only encodes completions stays beside the one large model: it must be small."""
    policy = case.load()
    before = policy.nbytes
    policy.generate(case.chunk())
    hold(policy.nbytes > 0, "nbytes must be the bytes of the weights that are held; got 0 after generate")
    hold(
        before == 0 or policy.nbytes < 2**20,
        f"load must read no weights; got {before} bytes before anything is generated",
    )


# -- training ---------------------------------------------------------------------------------------------------------


def training_twice_on_the_same_rows_gives_the_same_bytes(case: FamilyCase, folder: Path) -> None:
    case.train(folder / "a")
    case.train(folder / "b")
    first, second = (_hashes(folder / name / "model") for name in ("a", "b"))
    hold(first, "train must write the new model into the folder `out`; it wrote nothing")
    differing = sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
    hold(
        not differing,
        f"train must give the same bytes for the same rows and seed; {', '.join(differing)} differed: "
        "seed what is random from config.seed, and write no times",
    )


def _hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}


def training_leaves_the_start_as_it_was(case: FamilyCase, folder: Path) -> None:
    before, first = _hashes(case.start), case.load().generate(case.chunk())
    case.train(folder)
    hold(_hashes(case.start) == before, "train must not write into the folder of the model that it begins from")
    hold(case.load().generate(case.chunk()) == first, "train must not change what the initial model generates")


def training_leaves_its_rows_as_they_were(case: FamilyCase, folder: Path) -> None:
    case.train(folder / "once")
    rows = case.rows(case.load().generate(case.chunk()), folder)
    hold(
        rows.read_bytes() == (folder / "once/rows.parquet").read_bytes(),
        "train must not write into the file of its rows",
    )


def a_given_completion_is_encoded_so_that_it_can_be_trained_on(case: FamilyCase, folder: Path) -> None:
    policy = case.load()
    payload = dict(policy.encode_completion(case.prompts[0], case.answer, "column:answer"))
    hold(
        payload.get("completion") == case.completion,
        "encode_completion must give the answer as a completion of this family",
    )
    strange = sorted(set(payload) - set(policy.payload.names))
    hold(not strange, f"encode_completion must give columns of the payload; got {', '.join(strange)} besides")
    report = case.train(folder, [case.encoded()] * 4)
    hold(report.rows == 4, f"train must say how many rows it learned from, 4 here; got {report.rows}")
    hold(np.isfinite(report.losses).all(), f"train must report finite losses; got {report.losses}")


def training_on_a_completion_changes_what_is_generated(case: FamilyCase, folder: Path) -> None:
    before = [sample.completion for sample in case.load().generate(case.chunk())]
    case.train(folder, [case.encoded()] * 4)
    after = [sample.completion for sample in case.load(folder / "model").generate(case.chunk())]
    hold(
        before != after,
        "a trained model must generate otherwise than the start; raise the rate or the steps of the test",
    )


# -- log-probabilities ------------------------------------------------------------------------------------------------


def _samples(case: FamilyCase) -> tuple[Any, pa.Table]:
    """The policy, which must compute log-probabilities, and samples of it."""
    policy = case.load()
    hold(isinstance(policy, SupportsLogProbs), "a family with log_probs must have recorded_log_probs too")
    return policy, as_table(policy.generate(case.chunk()), policy)


def log_probs_are_the_same_alone_and_in_a_batch(case: FamilyCase, folder: Path) -> None:
    policy, table = _samples(case)
    together = policy.log_probs(case.sample_prompts, table, 64)
    alone = [policy.log_probs([prompt], table.slice(i, 1), 1)[0] for i, prompt in enumerate(case.sample_prompts)]
    hold(
        together.shape == (len(case.sample_prompts),),
        f"log_probs must give (N,) numbers; got the shape {together.shape}",
    )
    if case.family.media != "image":  # of pixels and latents there are densities, which may exceed one
        hold((together < 0).all(), f"log-probabilities must be below 0; got {together.max():g}")
    np.testing.assert_allclose(together, alone, atol=SMALL)


def recorded_log_probs_equal_computed_ones(case: FamilyCase, folder: Path) -> None:
    policy, table = _samples(case)
    recorded, computed = policy.recorded_log_probs(table), policy.log_probs(case.sample_prompts, table, 64)
    hold(
        recorded.shape == computed.shape,
        "recorded_log_probs must give a number for each sample, NaN where none was noted",
    )
    present = ~np.isnan(recorded)
    np.testing.assert_allclose(recorded[present], computed[present], atol=SMALL)


def training_makes_its_rows_more_likely(case: FamilyCase, folder: Path) -> None:
    policy, table = _samples(case)
    case.train(folder)
    trained: Any = case.load(folder / "model")
    before, now = (model.log_probs(case.sample_prompts, table, 64).sum() for model in (policy, trained))
    hold(now > before, f"training must make its rows more likely; they went from {before:g} to {now:g} nats")


LOG_PROB_CLAIMS: tuple[Claim, ...] = (
    log_probs_are_the_same_alone_and_in_a_batch,
    recorded_log_probs_equal_computed_ones,
    training_makes_its_rows_more_likely,
)
ALL: tuple[Claim, ...] = (
    every_prompt_gets_its_samples_in_order_with_ids_and_seeds_as_planned,
    samples_fit_the_schema_that_the_family_declares,
    the_same_seeds_generate_the_same_samples_in_another_instance,
    other_seeds_generate_other_samples,
    a_smaller_batch_generates_the_same_samples,
    no_weights_are_read_before_they_are_needed,
    training_twice_on_the_same_rows_gives_the_same_bytes,
    training_leaves_the_start_as_it_was,
    training_leaves_its_rows_as_they_were,
    a_given_completion_is_encoded_so_that_it_can_be_trained_on,
    training_on_a_completion_changes_what_is_generated,
    *LOG_PROB_CLAIMS,
)
