"""Forecast of a run: amounts, time, memory and disk."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from raftune.config.run import RunConfig
from raftune.errors import DataError, ModelError
from raftune.planning.probe import SECONDS, Emit, ProbeResult, ProbeRun, probe, seconds_by_stage
from raftune.planning.sharing import Sharing
from raftune.policies.footprint import DiskForecast, Footprint, MemoryPeaks, RoundAmounts, rows_of_round
from raftune.protocols import Policy, SupportsPromptCheck
from raftune.results.summary import overlap_words, read_json, rows_of
from raftune.runtime.assembly import Runtime
from raftune.runtime.preflight import preflight
from raftune.runtime.run import check_output_dir, check_writable, root_of
from raftune.runtime.staleness import check
from raftune.runtime.trackers import check_installed, wanted
from raftune.sanitize import counted
from raftune.stages.data import DataStage, held_out_words
from raftune.stages.gather import encoded_reference, prompts_of, reference_rows
from raftune.stages.plan import prompt_columns, prompts_from
from raftune.stages.prompt_check import LEAVE_OUT, check_prompts, cut_short, prompts_in, refusal, unlike_starter
from raftune.store.job import run_once
from raftune.store.parquet import read_groups, read_table, write_table
from raftune.store.run import RunFolder

BATCH = 512  # prompts that are encoded at once


@dataclass(frozen=True)
class PromptCounts:
    """Numbers of prompts; `repeated`: training rows that repeat an earlier one; `overlap`: held-out prompts that are
    also trained on; `shortest` and `longest` in tokens, None where the family has none."""

    train: int
    held_out: int
    repeated: int
    overlap: int
    shortest: int | None
    longest: int | None


@dataclass(frozen=True)
class Forecast:
    """What a run will take. `done`: rounds that its directory already has. `seconds`: of the whole run by kind of
    work, as extrapolated from the probe; None without one. `work` and `memory` are in the terms of `model`."""

    root: Path
    done: int | None
    prompts: PromptCounts
    amounts: RoundAmounts
    sharing: Sharing
    model: Footprint
    work: Any
    memory: Any
    disk: DiskForecast
    peaks: MemoryPeaks | None
    probe: ProbeResult | None
    seconds: dict[str, float] | None
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The forecast for `raftune plan --json`; model and memory have the keys that the family gives them."""
        values = asdict(self) | {"root": str(self.root), "samples": self.amounts.samples, "notes": list(self.notes)}
        model, memory = values.pop("model"), values.pop("memory")
        named = {self.model.model_key: model, self.model.memory_key: memory} if self.model.model_key else {}
        return values | dict.fromkeys(("model", "pipeline", "memory", "room")) | named


def forecast(
    config: RunConfig, *, measured: bool = True, seconds: float = SECONDS, tell: Emit = lambda words: None
) -> Forecast:
    """The forecast; nothing is written where the run will be. Raises what the run would: ConfigError, DataError, ….

    With `measured`, two prompts are generated, scored and trained on, in a temporary folder, for about `seconds` at
    most; `tell` is called at each step. Without it there is no time, and memory is arithmetic on parameter counts.
    """
    root = root_of(config)
    check_writable(root)
    check_installed(wanted(config.report_to))
    trial = ProbeRun(seconds if measured else math.inf, tell if measured else lambda words: None)
    with (
        tempfile.TemporaryDirectory(prefix="raftune-plan-") as scratch,
        contextlib.closing(Runtime(RunFolder(Path(scratch) / "run"), config)) as runtime,
    ):
        runtime.policies.planning = True
        preflight(runtime)
        runtime.rewards(), runtime.held_out_rewards()
        done = rounds_done(root, config)
        trial.tell("reading the prompts, checking the model")
        with trial.paused():  # all prompts are checked, however long that takes
            stage = runtime.stage(0, "data")
            run_once(runtime.job(stage, 0), stage)  # type: ignore[arg-type]
            data = runtime.run.folder(0, "data")
        start = runtime.run.folder(0, "model")
        start.mkdir(parents=True)
        facts = read_start(runtime, start, trial)
        policy = runtime.policies.encoder(start)
        model = getattr(runtime.family, "footprint", Footprint).of(policy, start, facts)
        with trial.paused():
            left_out = leave_out(runtime, data, policy) if isinstance(policy, SupportsPromptCheck) else ()
            if model.encodes_answers:
                check_answers(policy, data, config)
            prompts = measure(data, policy.encoder if model.counts_tokens else None)  # type: ignore[attr-defined]
        planned, longest = amounts(config, prompts.train, prompts.held_out), prompts.longest or 0
        notes = [*(facts.get("notes", []) if isinstance(facts, dict) else []), *left_out, *policy.notes()]
        notes += [model.not_tried, *remarks(config, prompts, planned), *model.remarks(config, prompts.longest)]
        result, peaks, times, fit = None, None, None, None
        sharing = Sharing.of(config, planned, str(getattr(model, "device", "cpu")))
        notes += sharing.remarks(config, planned.prompts) if config.num_rounds else []
        rows = min(config.sampling.chunk_size, planned.prompts) * config.sampling.num_generations
        if measured and not model.not_tried:
            result = probe(runtime, data, Path(scratch) / "probe", trial)
            peaks = model.peaks(result.drawing, result.training, config, longest, rows)
            times = seconds_by_stage(result, planned, runtime, sharing.times, sharing.training_times)
            notes += result.notes
            if "training" in times and planned.rounds:
                fit = times["training"] / planned.rounds
        return Forecast(
            root=root,
            done=done,
            prompts=prompts,
            amounts=planned,
            sharing=sharing,
            model=model,
            work=model.work(config, planned),
            memory=model.memory(config, longest, rows),
            disk=model.disk(config, planned, result.size if result else None, fit),
            peaks=peaks,
            probe=result,
            seconds=times,
            notes=tuple(dict.fromkeys(note for note in notes if note)),
        )


def rounds_done(root: Path, config: RunConfig) -> int | None:
    """Finished rounds in a run's directory; None where there is no run. Raises ConfigChanged, StoreError."""
    folder = RunFolder(root)
    check_output_dir(folder)
    if not folder.exists():
        return None
    with contextlib.closing(Runtime(folder, config)) as runtime:
        check(runtime)
    return max((row["round"] for row in rows_of(root)), default=0)


def read_start(runtime: Runtime, start: Path, trial: ProbeRun) -> Any:
    """What the family's `start` returns; if the time ends before the weights are read, what the model's configuration
    says, with a note. Raises ModelError where that is not enough."""
    facts: list[Any] = []
    if not trial.ended(lambda: facts.append(runtime.family.start(runtime.config, start))) or facts:
        return facts[0]
    unread = getattr(runtime.family, "footprint", Footprint).unread_facts(runtime.config, start)
    if unread is None:
        raise ModelError(
            f"policy.model could not be read within {trial.seconds:g} seconds. Give `raftune plan` more time, with "
            "--probe-seconds, or let it measure nothing, with --no-probe."
        )
    note = f"the model's weights could not be read within {trial.seconds:g} seconds, and were not checked: "
    return unread | {"notes": [f"{note}--probe-seconds gives more time"]}


# -- prompts -----------------------------------------------------------------------------------------------------------


def check_answers(policy: Policy, folder: Path, config: RunConfig) -> None:
    """Encodes every completion of the data, candidates and references, as the run will. Raises DataError for the first
    that cannot be used."""
    if not config.num_rounds:
        return
    if columns := config.sampling.candidate_columns:
        for prompt in (p for rows in read_groups(folder / "train.parquet") for p in prompts_from(rows)):
            for column in columns:
                try:
                    policy.encode_completion(prompt, prompt.columns[column], f"column:{column}")
                except DataError as error:
                    raise DataError(f"sampling.candidate_columns, {column!r} of prompt {prompt.id}: {error}") from error
    if (reference := config.training.reference) is not None:
        rows = reference_rows(reference)
        completions = rows.column(reference.completion_column).to_pylist()
        prompts = prompts_from(prompts_of(rows, reference))
        for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True), 1):
            encoded_reference(policy, prompt, completion, number)


def leave_out(runtime: Runtime, folder: Path, policy: SupportsPromptCheck) -> tuple[str, ...]:
    """Removes the copied prompts that the policy cannot take; returns notes. Raises DataError where a run would."""
    source = runtime.stage(0, "data")
    assert isinstance(source, DataStage)
    looks = check_prompts(prompts_in(folder, runtime.config.sampling.candidate_columns), [policy])
    refused = looks.refused
    notes = (*(unlike_starter(looks) if runtime.starter else ()), *cut_short(looks))
    if not refused:
        return notes
    if not runtime.drops:
        raise DataError(f"{refusal(looks, source)} {LEAVE_OUT}")
    tables = {name: read_table(folder / f"{name}.parquet") for name in ("train", "held_out")}
    (folder / "_COMMIT.json").unlink(missing_ok=True)  # the plan's own copy, which is about to change
    counts = {}
    for name, rows in tables.items():
        kept = rows.filter(pa.array([id_ not in refused for id_ in rows.column("prompt_id").to_pylist()], pa.bool_()))
        if rows.num_rows and not kept.num_rows:
            raise DataError(f"{refusal(looks, source)} None is left of the {name} prompts.")
        write_table(kept, folder / f"{name}.parquet")
        counts[name] = kept.num_rows
    (folder / "notes.json").write_text(json.dumps(read_json(folder / "notes.json") | counts))
    return (*notes, f"left out: {refusal(looks, source)}")


def measure(folder: Path, encoder: Any | None) -> PromptCounts:
    """The counts; with an encoder, lengths as well."""
    notes = read_json(folder / "notes.json")
    files = (folder / f"{name}.parquet" for name in ("train", "held_out")) if encoder is not None else ()
    lengths = [length for path in files for length in lengths_of(path, encoder)]
    counts = {name: notes[name] for name in ("train", "held_out", "repeated", "overlap")}
    return PromptCounts(**counts, shortest=min(lengths, default=None), longest=max(lengths, default=None))


def lengths_of(path: Path, encoder: Any) -> list[int]:
    """Tokens of each of the file's prompts, as rendered for generation. Raises DataError for one that does not fit."""
    lengths: list[int] = []  # encoded in batches: a tokenizer's own record of a text is many times larger than the text
    for rows in read_groups(path, prompt_columns(path)):
        for start in range(0, rows.num_rows, BATCH):
            lengths += map(len, encoder.encode(prompts_from(rows.slice(start, BATCH)), for_drawing=True))
    return lengths


# -- amounts -----------------------------------------------------------------------------------------------------------


def amounts(config: RunConfig, train: int, held_out: int) -> RoundAmounts:
    """The amounts of a run with so many prompts."""
    sampling, training, rule = config.sampling, config.training, config.selection
    prompts = min(config.prompts_per_round, train)
    pool = sampling.num_generations + len(sampling.candidate_columns)
    pool += sampling.teacher.num_generations if sampling.teacher else 0
    kept, exact = rule.most_kept(prompts, pool)
    filtered = rule.margin != 0 or rule.drop_duplicates or rule.min_length is not None or rule.max_length is not None
    steps = training.max_steps
    if steps <= 0:
        per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps
        steps = max(1, math.ceil(math.ceil(rows_of_round(config, kept) / per_step) * training.num_train_epochs))
    return RoundAmounts(
        rounds=config.num_rounds,
        prompts=prompts,
        generated=prompts * sampling.num_generations,
        competing=prompts * pool,
        kept=kept,
        kept_exact=exact and not filtered and not (rule.skips_equal and pool > 1),
        steps=steps,
        judged=held_out * config.evaluation.num_generations,
    )


def remarks(config: RunConfig, prompts: PromptCounts, planned: RoundAmounts) -> list[str]:
    """Notes on what is allowed, but perhaps not meant."""
    notes, temperature = [], config.sampling.temperature
    if prompts.repeated:
        notes.append(
            f"{prompts.repeated} of {prompts.train} training prompts repeat an earlier one: each is generated for"
        )
    notes.append(overlap_words(prompts.overlap, prompts.held_out))
    if config.num_rounds:
        notes.append(held_out_words(prompts.held_out, config.evaluation.num_prompts))
    if config.num_rounds and config.prompts_per_round > prompts.train:
        have = f"{'is' if prompts.train == 1 else 'are'} {counted(prompts.train, 'prompt')}"
        notes.append(f"prompts_per_round is {config.prompts_per_round}; there {have}: all are asked")
    if config.evaluation.num_prompts and not prompts.held_out:
        notes.append("too few prompts to hold any out: no round is judged, and the last one is published")
    if config.num_rounds and planned.competing == planned.prompts and config.selection.rule == "best_of_k":
        notes.append("one sample a prompt: the best of one is that one, so that nothing is selected")
    if temperature == 0 and config.sampling.num_generations > 1:
        notes.append("sampling.temperature is 0: all samples of a prompt will be equal")
    elif config.num_rounds and 0 < temperature < 1:
        notes.append("sampling.temperature is below 1: each round sharpens the policy, whatever the reward says")
    return notes
