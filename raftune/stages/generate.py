"""Stage `generate`: K samples for each prompt from the policy, and candidates from other sources."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from raftune.config.sampling import DRAWN_BY
from raftune.errors import DataError, ModelError
from raftune.protocols import Chunk, ChunkedStage, Policy, PolicyProvider, StageInputs, SupportsBackends
from raftune.records import Prompt, Sample, derive_seed, samples_table
from raftune.stages.parity import PARITY, generation_words
from raftune.stages.plan import read_chunk, read_plan
from raftune.store.commit import stage_of
from raftune.store.layout import chunk_file, chunk_numbers
from raftune.store.parquet import read_table, write_table


@dataclass(frozen=True)
class Generation:
    """How the policy of a run generates: `record` reads backend.json, empty before there is one; `code` is the hash of
    a custom backend's code, `options` the dotted fields of the backend's options that enter the key."""

    record: Callable[[], Mapping[str, Any]] = dict
    code: Mapping[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ("sampling.backend_options",)

    @property
    def server(self) -> Mapping[str, Any] | None:
        """The record of the server that generates; None where raftune does."""
        return self.record().get("server")

    @property
    def reproducible(self) -> bool:
        """Whether a sample can be generated again, byte for byte."""
        record = self.record()
        return bool((record.get("server") or record).get("reproducible", True))


class GenerateStage(ChunkedStage):
    """One file per chunk: prompt by prompt the policy's own samples, then the completions in the data set's columns.

    Where a server generates, the stage runs in the loop's process, which has the server, and depends on its record.
    """

    def __init__(
        self,
        policies: PolicyProvider,
        generation: Generation | None = None,
        *,
        model: str = "model@-1",
        plan: str = "plan",
        writes: str = "generate",
        columns: tuple[str, ...] = (),
    ) -> None:
        self.policies, self.model, self.plan, self.columns = policies, model, plan, columns
        self.generation = generation or Generation()
        self.name, self.writes = stage_of(writes), writes
        self.fields = (*DRAWN_BY, *self.generation.options, *(("sampling.candidate_columns",) if columns else ()))

    # The record is made by an earlier stage of the same table: it is read when these are asked for.

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.plan, self.model, *((f"{PARITY}@0",) if self.generation.server is not None else ()))

    @property
    def local(self) -> bool:  # type: ignore[override]
        return self.generation.server is not None

    @property
    def reproducible(self) -> bool:  # type: ignore[override]
        return self.generation.reproducible

    def fingerprints(self) -> Mapping[str, str]:
        server = self.generation.server
        if server is None:
            return self.generation.code
        return {"server": " ".join(str(value) for name, value in server.items() if name not in ("probe", "flags"))}

    def chunks(self, inputs: StageInputs) -> list[int]:
        return list(range(read_plan(inputs[self.plan])["num_units"]))

    def run_chunk(self, inputs: StageInputs, index: int, out: Path, metadata: Mapping[str, str]) -> tuple[str, ...]:
        policy = self.policies.at(inputs[self.model])
        chunk = read_chunk(inputs[self.plan], index)
        if "batch_size" in metadata:
            chunk = replace(chunk, batch_size=int(metadata["batch_size"]))
        samples = generate_samples(policy, chunk)
        if self.columns:
            pool: dict[str, list[Sample]] = {prompt.id: [] for prompt in chunk.prompts}
            for sample in samples:
                pool[sample.prompt_id].append(sample)
            for prompt in chunk.prompts:
                for column in self.columns:
                    if column not in prompt.columns:
                        raise DataError(
                            f"sampling.candidate_columns names {column!r}, which the prompts lack; they have "
                            f"{', '.join(prompt.columns) or 'no other columns'}. Name one of these, or leave it out."
                        )
                    k = len(pool[prompt.id])
                    pool[prompt.id].append(
                        encoded(policy, chunk, prompt, k, prompt.columns[column], f"column:{column}")
                    )
            samples = [sample for candidates in pool.values() for sample in candidates]
        write_table(as_table(samples, policy), out, metadata)
        return policy.notes()


class TeacherStage(ChunkedStage):
    """One file per chunk: a teacher's completions, encoded as if the policy had generated them."""

    name = writes = "teach"
    reads = ("plan", "generate", "model@-1", "teacher@0")

    def __init__(self, policies: PolicyProvider, num_generations: int, options: tuple[str, ...]) -> None:
        """`options`: the dotted fields of the backend's options that enter the key."""
        self.policies, self.num_generations = policies, num_generations
        self.fields = (*DRAWN_BY, *options, "sampling.teacher")

    def chunks(self, inputs: StageInputs) -> list[int]:
        return chunk_numbers(inputs["generate"])

    def run_chunk(self, inputs: StageInputs, index: int, out: Path, metadata: Mapping[str, str]) -> tuple[str, ...]:
        teacher = self.policies.at(inputs["teacher@0"])
        policy = self.policies.encoder(inputs["model@-1"])
        chunk = read_chunk(inputs["plan"], index)
        generated = read_table(inputs["generate"] / chunk_file(index), ["prompt_id"]).column("prompt_id")
        taken = Counter(generated.to_pylist())
        start = read_plan(inputs["plan"])["seed"]
        seeds = tuple(
            tuple(derive_seed("teacher", *start, prompt.id, k) for k in range(self.num_generations))
            for prompt in chunk.prompts
        )
        prompts = {prompt.id: prompt for prompt in chunk.prompts}
        samples = []
        for sample in generate_samples(teacher, replace(chunk, version="teacher", seeds=seeds)):
            prompt, k = prompts[sample.prompt_id], taken[sample.prompt_id] + sample.k
            samples.append(encoded(policy, chunk, prompt, k, sample.completion, "teacher", sample.seed, "teacher"))
        write_table(as_table(samples, policy), out, metadata)
        record = teacher.backend() if isinstance(teacher, SupportsBackends) else None
        if record is None:
            return teacher.notes()
        return (*teacher.notes(), f"the teacher generates by {generation_words(record, distance=False)}")


def encoded(
    policy: Policy,
    chunk: Chunk,
    prompt: Prompt,
    k: int,
    completion: Any,
    source: str,
    seed: int | None = None,
    version: str = "",
) -> Sample:
    """A given completion as the k-th sample of a prompt. Raises DataError where the policy cannot encode it."""
    payload = dict(policy.encode_completion(prompt, completion, source))
    return Sample(chunk.sample_id(prompt, k), prompt.id, k, source, seed, version, payload.pop("completion"), payload)


def generate_samples(policy: Policy, chunk: Chunk) -> list[Sample]:
    """The policy's samples of the chunk: prompt by prompt, k ascending, each with its planned seed.

    Raises ModelError if they are not in this order, on which everything after it relies.
    """
    samples = policy.generate(chunk)
    name = type(policy).__name__
    planned = [
        (chunk.sample_id(prompt, k), prompt.id, k, "policy", seed, chunk.version)
        for prompt, seeds in zip(chunk.prompts, chunk.seeds, strict=True)
        for k, seed in enumerate(seeds)
    ]
    if len(samples) != len(planned):
        raise ModelError(
            f"{name}.generate must return a sample for each seed of each prompt of the chunk, {len(planned)} here; got "
            f"{len(samples)}. docs/families.md shows the order."
        )
    for number, (sample, expected) in enumerate(zip(samples, planned, strict=True)):
        actual = (sample.id, sample.prompt_id, sample.k, sample.source, sample.seed, sample.version)
        if actual != expected:
            names = ("id", "prompt_id", "k", "source", "seed", "version")
            field, was, should = next(f for f in zip(names, actual, expected, strict=True) if f[1] != f[2])
            raise ModelError(
                f"{name}.generate must return its samples prompt by prompt, k ascending, each with its own seed; "
                f"sample {number} has {field} {was!r} where {should!r} was asked for. docs/families.md shows the order."
            )
    return samples


def as_table(samples: list[Sample], policy: Policy) -> pa.Table:
    """The samples as a table. Raises ModelError for a payload that does not fit its family's schema."""
    name, columns = type(policy).__name__, set(policy.payload.names)
    for sample in samples:
        if unknown := sorted(sample.payload.keys() - columns):
            raise ModelError(
                f"the payload of a sample may have the columns that {name}.payload declares "
                f"({', '.join(policy.payload.names)}); sample {sample.id} has {', '.join(unknown)}. Declare it too."
            )
    try:
        table = samples_table(samples, policy.payload)
        table.validate()
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        raise ModelError(f"the payload of {name} must fit the types that it declares; {error}.") from error
    for column in policy.payload:
        if not column.nullable and table.column(column.name).null_count:
            raise ModelError(f"{name}.payload says that {column.name} is never null; a sample has none. Give it one.")
    return table
