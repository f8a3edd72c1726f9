"""`raftune plan`: checks a configuration and forecasts its cost."""

from __future__ import annotations

import json as js
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from raftune.cli.commands.train import refuse_folders
from raftune.cli.flags import Tokens
from raftune.cli.output import echo
from raftune.errors import ConfigError
from raftune.sanitize import counted, duration, megabytes, percent, shell_command

if TYPE_CHECKING:
    from raftune.config.run import RunConfig
    from raftune.planning import Forecast
    from raftune.policies.footprint import MemoryPeaks


def plan(
    *files: Tokens,
    probe: Annotated[bool, Parameter(help="Measure time and memory with two prompts.")] = True,
    probe_seconds: Annotated[float, Parameter(help="Time limit of the probe, in seconds.")] = 60.0,
    json: Annotated[bool, Parameter(negative="", show_default=False, help="Print the forecast as JSON.")] = False,
) -> None:
    """Check a configuration and forecast its cost: samples, tokens, disk, memory, time.

    raftune plan base.yaml mine.yaml --sampling.num_generations 16

    Everything is checked that needs no training: data, model, rewards, selection. A probe generates, scores and trains
    on two prompts in a temporary folder, for at most --probe-seconds; if that is not enough it uses fewer tokens and
    rows and says so. --no-probe skips it. Nothing is written to the run's directory.
    """
    from raftune.cli.flags import read_tokens
    from raftune.config.load import load_config
    from raftune.planning import forecast
    from raftune.runtime.progress import StepProgress

    given = read_tokens(files, "plan", ("--probe", "--no-probe", "--probe-seconds", "--json"))
    if not given.words and not given.flags:
        raise ConfigError("plan needs a configuration file; got none. `raftune init run.yaml` writes one.")
    refuse_folders(given.words)
    config = load_config(given.words, given.flags)
    if probe_seconds <= 0:
        raise ConfigError(f"--probe-seconds must be above 0; got {probe_seconds:g}. --no-probe leaves the trial out.")
    with StepProgress() as steps:
        found = forecast(config, measured=probe, seconds=probe_seconds, tell=steps.begin)
    if json:
        print(js.dumps(found.as_json() | {"command": command(files)}))
        return
    for title, words in lines(config, found):
        echo(f"{title:<10}  {words}")
    for note in found.notes:
        echo(f"note        {note}", style="yellow")
    echo("")
    echo(f"Start it with:  {command(files)}")


def command(tokens: tuple[str, ...]) -> str:
    return shell_command("raftune", "train", *tokens)


def lines(config: RunConfig, found: Forecast) -> list[tuple[str, str]]:
    """The forecast in words: a title and a line each."""
    said = [
        ("run", state(config, found)),
        ("policy", found.model.describe(config.policy.family)),
        ("prompts", prompts(found)),
    ]
    said += [("a round", a_round(config, found))] if config.num_rounds else []
    said += [("in all", in_all(config, found)), ("disk", disk(found))]
    if memory := measured(found.peaks, config) or (found.memory.describe() if found.memory else ""):
        said.append(("memory", memory))
    if found.probe is not None and found.probe.generation:
        said.append(("generation", found.probe.generation))
    if found.seconds is not None:
        said.append(("time", time(found)))
    return said


def state(config: RunConfig, found: Forecast) -> str:
    if found.done is None:
        return f"{config.name}, new, in {found.root}"
    return f"{config.name}, in {found.root}: {found.done} of {config.num_rounds} rounds are done"


def prompts(found: Forecast) -> str:
    have = found.prompts
    lengths = f", of {have.shortest} to {have.longest} tokens" if have.longest is not None else ""
    return f"{have.train:,} to learn from, {have.held_out:,} held out{lengths}"


def a_round(config: RunConfig, found: Forecast) -> str:
    a = found.amounts
    others = f" + {a.competing - a.drawn:,} from other sources" if a.competing > a.drawn else ""
    kept = f"{'' if a.kept_exact else 'at most '}{a.kept:,} kept ({config.selection.rule})"
    drawn = f"{counted(a.prompts, 'prompt')} x {config.sampling.num_generations} = {counted(a.drawn, 'sample')}{others}"
    return f"{drawn}, {kept}, {counted(a.steps, 'optimizer step')}"


def in_all(config: RunConfig, found: Forecast) -> str:
    a = found.amounts
    judged = (a.rounds + 1) * a.judged
    text = f"{counted(a.samples, 'sample')}: {a.rounds * a.drawn:,} to learn from, {judged:,} to judge by"
    work = found.model.describe_work(config, a, found.probe.tokens if found.probe else None)
    return f"{text}; {work}" if work else text


def disk(found: Forecast) -> str:
    parts = {"models": found.disk.models, found.model.samples: found.disk.samples, "latents": found.disk.latents}
    parts["checkpoints"] = found.disk.checkpoints
    return f"{megabytes(found.disk.total)}: " + ", ".join(f"{n} {megabytes(size)}" for n, size in parts.items() if size)


def measured(peaks: MemoryPeaks | None, config: RunConfig) -> str:
    """The memory that the probe took, and what the run will; empty where nothing was measured."""
    if peaks is None or peaks.drawing is None:
        return ""
    lacking = "; that of training was not measured" if config.num_rounds and peaks.training is None else ""
    run, probe = (
        ", ".join(f"{kind} {megabytes(most)}" for kind, most in pair if most is not None)
        for pair in (
            (("generating", peaks.run_drawing), ("training", peaks.run_tuning)),
            (("generating", peaks.drawing), ("training", peaks.training)),
        )
    )
    return f"{run} at most; measured in the probe, with all that was loaded: {probe}{lacking}"


def time(found: Forecast) -> str:
    assert found.seconds is not None
    if not found.seconds:
        return f"not known ({basis(found)})"
    total = sum(found.seconds.values())
    shares = ", ".join(f"{name} {percent(seconds / total)}" for name, seconds in found.seconds.items() if seconds > 0)
    least = "more than" if found.probe is not None and found.probe.missing else "about"
    return f"{least} {duration(total)}: {shares} ({basis(found)})"


def basis(found: Forecast) -> str:
    """Where the seconds come from."""
    probe = found.probe
    if probe is None:
        return found.model.seconds_basis
    short = f"; extrapolated: {', '.join(probe.cut_short)}" if probe.cut_short else ""
    missing = ", ".join(probe.missing)
    lacking = f"; not measured within {probe.limit:g} s: {missing} (--probe-seconds gives more)" if missing else ""
    return f"from a probe of two prompts that took {duration(probe.seconds)}{short}{lacking}"
