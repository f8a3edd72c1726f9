"""Forecast of a run: time, memory and disk."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raftune.config.run import RunConfig
from raftune.errors import ModelError, RewardError
from raftune.planning.amounts import amounts
from raftune.planning.probe import SECONDS, Emit, ProbeResult, ProbeRun, probe, seconds_by_stage
from raftune.planning.prompts import PromptCounts, check_answers, leave_out, measure, read_prompts
from raftune.policies.footprint import DiskForecast, Footprint, MemoryPeaks, RoundAmounts, footprint_of
from raftune.protocols import SupportsPromptCheck
from raftune.results.summary import overlap_words, rows_of
from raftune.runtime.assembly import Runtime
from raftune.runtime.preflight import preflight
from raftune.runtime.run import check_writable, refuse_foreign, root_of
from raftune.runtime.staleness import check
from raftune.runtime.trackers import check_installed, wanted
from raftune.sanitize import counted, one_line
from raftune.stages.data import held_out_words
from raftune.store.run import RunFolder


@dataclass(frozen=True)
class Forecast:
    """What a run will take. `done` rounds lie in its directory already; `seconds` are those of a run from the start, by
    kind of work, from a probe, or, for a pipeline without one, by arithmetic on a named device; else None. `model` and
    `memory` are those of a language model, `pipeline`, `work` and `room` those of a pipeline."""

    root: Path
    done: int | None
    prompts: PromptCounts
    amounts: RoundAmounts
    model: Footprint
    work: Any
    memory: Any
    disk: DiskForecast
    peaks: MemoryPeaks | None
    probe: ProbeResult | None
    seconds: dict[str, float] | None
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        values = asdict(self) | {"root": str(self.root), "samples": self.amounts.samples, "notes": list(self.notes)}
        model, memory = values.pop("model"), values.pop("memory")
        named = {self.model.model_key: model, self.model.memory_key: memory} if self.model.model_key else {}
        return values | dict.fromkeys(("model", "pipeline", "memory", "room")) | named


def forecast(
    config: RunConfig, *, measured: bool = True, seconds: float = SECONDS, tell: Emit = lambda words: None
) -> Forecast:
    """The forecast; nothing is written where the run will be. Raises what the run would: ConfigError, DataError, ….

    With `measured`, two prompts are generated, scored and trained on, in a temporary folder, for about `seconds` at
    most; `tell` hears of each step.
    """
    root = root_of(config)
    check_writable(root)
    check_installed(wanted(config.report_to))
    with tempfile.TemporaryDirectory(prefix="raftune-plan-") as scratch:
        trial = ProbeRun(seconds, tell) if measured else None
        assembly = Runtime(RunFolder(Path(scratch) / "run"), config)
        try:
            lacking = checked(assembly)
            done = rounds_done(root, config)
            return look(assembly, root, done, Path(scratch), trial, lacking)
        finally:
            assembly.close()


def rounds_done(root: Path, config: RunConfig) -> int | None:
    """The rounds that are done where the run will be; None where there is no run. Raises ConfigChanged, StoreError."""
    folder = RunFolder(root)
    refuse_foreign(folder)
    if not folder.exists():
        return None
    assembly = Runtime(folder, config)
    try:
        check(assembly)
    finally:
        assembly.close()
    return max((row["round"] for row in rows_of(root)), default=0)


def look(
    assembly: Runtime, root: Path, done: int | None, scratch: Path, trial: ProbeRun | None, lacking: list[str]
) -> Forecast:
    config = assembly.config
    if trial:
        trial.tell("reading the prompts, checking the model")
    with uncounted(trial):
        data = read_prompts(assembly)
    begun = begin(assembly, data, trial)
    with uncounted(trial):
        prompts = measure(data, begun.encoder)
    planned = amounts(config, prompts.train, prompts.held_out)
    notes = [*begun.notes, *lacking, *remarks(config, prompts, planned)]
    model = begun.model
    notes += model.remarks(config, prompts.longest)
    found = None
    if trial and not model.not_tried:
        found = probe(assembly, data, scratch / "probe", trial, model.widths)
    size = found.size if found else None
    rows = min(config.sampling.chunk_size, planned.prompts) * config.sampling.num_generations
    work = model.work(config, planned)
    seconds = seconds_by_stage(found, planned, assembly) if found else model.seconds(config, work)
    measured = found is not None and seconds is not None and "training" in seconds and planned.rounds
    fit = seconds["training"] / planned.rounds if seconds and measured else None
    return Forecast(
        root=root,
        done=done,
        prompts=prompts,
        amounts=planned,
        model=model,
        work=work,
        memory=model.memory(config, prompts.longest or 0, rows),
        disk=model.disk(config, planned, size, fit),
        peaks=model.peaks(found.drawing, found.training, config, prompts.longest or 0, rows) if found else None,
        probe=found,
        seconds=seconds,
        notes=tuple(dict.fromkeys([*notes, *(found.notes if found else ())])),
    )


@dataclass(frozen=True)
class StartModelInfo:
    """Numbers of the initial model, its token counter, and notes for the user."""

    model: Footprint
    encoder: Any
    notes: list[str]


def uncounted(trial: ProbeRun | None) -> contextlib.AbstractContextManager[None]:
    """Every prompt is looked at, however long that takes: it does not count as time of the trial."""
    return trial.paused() if trial else contextlib.nullcontext()


def begin(assembly: Runtime, data: Path, trial: ProbeRun | None) -> StartModelInfo:
    """Starts the initial model and measures it; for a hub pipeline that is not cached, published sizes are used."""
    config, family_footprint = assembly.config, footprint_of(assembly.family)
    if (known := family_footprint.published(config)) is not None:
        return StartModelInfo(known, None, [known.not_tried])
    start = assembly.run.folder(0, "model")
    start.mkdir(parents=True)
    facts = read_start(assembly, start, trial)
    policy = assembly.policies.encoder(start)
    model = family_footprint.of(policy, start, facts)
    with uncounted(trial):
        left_out = leave_out(assembly, data, policy) if isinstance(policy, SupportsPromptCheck) else ()
        if model.encodes_answers:
            check_answers(policy, data, config)
    own = facts.get("notes", []) if isinstance(facts, dict) else []
    notes = [note for note in (*own, *left_out, *policy.notes(), model.not_tried) if note]
    return StartModelInfo(model, policy.encoder if model.counts_tokens else None, notes)  # type: ignore[attr-defined]


def read_start(assembly: Runtime, start: Path, trial: ProbeRun | None) -> Any:
    """What the family says of the initial model. If the time ends before a language model's weights are read,
    what its configuration says, with a note. Raises ModelError where that is not enough."""
    config, answers = assembly.config, list[Any]()

    def read() -> None:
        answers.append(assembly.family.start(config, start))

    if trial is None:
        read()
    elif trial.ended(read) and not answers:
        facts = footprint_of(assembly.family).unread_facts(config, start)
        if facts is None:
            raise ModelError(
                f"policy.model could not be read within {trial.seconds:g} seconds. Give `raftune plan` more time, with "
                "--probe-seconds, or let it measure nothing, with --no-probe."
            )
        facts["notes"] = [
            f"the model's weights could not be read within {trial.seconds:g} seconds, and were not checked: "
            "--probe-seconds gives more time"
        ]
        return facts
    return answers[0]


def checked(assembly: Runtime) -> list[str]:
    """Everything is checked that can be without training; of rewards their code and options, not their models.

    Where the policy itself is not at hand, what a reward lacks is said, and is no error yet.
    """
    try:
        preflight(assembly)
        assembly.panel(), assembly.judge()
    except RewardError as error:
        if footprint_of(assembly.family).published(assembly.config) is None:
            raise
        return [f"the run will need a reward that is not at hand: {one_line(str(error), 140)}"]
    return []


def remarks(config: RunConfig, prompts: PromptCounts, planned: RoundAmounts) -> list[str]:
    """What is allowed, but perhaps not meant."""
    said = []
    if prompts.repeated:
        said.append(
            f"{prompts.repeated} of {prompts.train} training prompts repeat an earlier one: each is generated for"
        )
    if warning := overlap_words(prompts.overlap, prompts.held_out):
        said.append(warning)
    if config.num_rounds and (warning := held_out_words(prompts.held_out, config.evaluation.num_prompts)):
        said.append(warning)
    if config.num_rounds and config.prompts_per_round > prompts.train:
        have = counted(prompts.train, "prompt")
        are = "is" if prompts.train == 1 else "are"
        said.append(f"prompts_per_round is {config.prompts_per_round}; there {are} {have}: all are asked")
    if config.evaluation.num_prompts and not prompts.held_out:
        said.append("too few prompts to hold any out: no round is judged, and the last one is published")
    if config.num_rounds and planned.competing == planned.prompts and config.selection.rule == "best_of_k":
        said.append("one sample a prompt: the best of one is that one, so that nothing is selected")
    if config.sampling.temperature == 0 and config.sampling.num_generations > 1:
        said.append("sampling.temperature is 0: all samples of a prompt will be equal")
    elif config.num_rounds and 0 < config.sampling.temperature < 1:
        said.append("sampling.temperature is below 1: each round sharpens the policy, whatever the reward says")
    return said
