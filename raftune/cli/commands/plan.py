"""`raftune plan`: checks a configuration and forecasts its cost."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from raftune.cli.commands.train import read_config
from raftune.cli.flags import Json, Tokens
from raftune.cli.output import echo
from raftune.sanitize import counted, duration, megabytes, percent, shell_command

if TYPE_CHECKING:
    from raftune.config.run import RunConfig
    from raftune.planning import Forecast


def plan(
    *files: Tokens,
    probe: Annotated[bool, Parameter(help="Measure time and memory with two prompts.")] = True,
    probe_seconds: Annotated[
        float, Parameter(help="Time limit of the probe, in seconds.", validator=Number(gt=0))
    ] = 60.0,
    as_json: Json = False,
) -> None:
    """Check a configuration and forecast its cost: samples, tokens, disk, memory, time.

    raftune plan base.yaml mine.yaml --sampling.num_generations 16

    Everything is checked that needs no training: data, model, rewards, selection. A probe generates, scores and trains
    on two prompts in a temporary folder, for at most --probe-seconds; if that is not enough it uses fewer tokens and
    rows and says so. --no-probe skips it: there is no time then, and memory is by parameter counts. Nothing is written
    to the run's directory.
    """
    from raftune.planning import forecast
    from raftune.runtime.progress import StepProgress

    config = read_config(files, "plan", ("--probe", "--no-probe", "--probe-seconds", "--json"))
    with StepProgress() as steps:
        result = forecast(config, measured=probe, seconds=probe_seconds, tell=steps.begin)
    command = shell_command("raftune", "train", *files)
    if as_json:
        print(json.dumps(result.as_json() | {"command": command}))
        return
    echo(*(f"{title:<10}  {words}" for title, words in lines(config, result)))
    echo(*(f"note        {note}" for note in result.notes), style="yellow")
    echo("", f"Start it with:  {command}")


def lines(config: RunConfig, forecast: Forecast) -> list[tuple[str, str]]:
    amounts, prompts, probe = forecast.amounts, forecast.prompts, forecast.probe
    state = "new, in" if forecast.done is None else "in"
    done = "" if forecast.done is None else f": {forecast.done} of {config.num_rounds} rounds are done"
    lengths = f", of {prompts.shortest} to {prompts.longest} tokens" if prompts.longest is not None else ""
    words = [
        ("run", f"{config.name}, {state} {forecast.root}{done}"),
        ("policy", forecast.model.describe(config.policy.family)),
        ("prompts", f"{prompts.train:,} to learn from, {prompts.held_out:,} held out{lengths}"),
    ]
    if config.num_rounds:
        extra = amounts.competing - amounts.generated
        others = f" + {extra:,} from other sources" if extra > 0 else ""
        samples = f"{config.sampling.num_generations} = {counted(amounts.generated, 'sample')}{others}"
        kept = f"{'' if amounts.kept_exact else 'at most '}{amounts.kept:,} kept ({config.selection.rule})"
        steps = counted(amounts.steps, "optimizer step")
        words.append(("a round", f"{counted(amounts.prompts, 'prompt')} x {samples}, {kept}, {steps}"))
    judged = (amounts.rounds + 1) * amounts.judged
    total = f"{counted(amounts.samples, 'sample')}: {amounts.rounds * amounts.generated:,} to learn from, {judged:,}"
    work = forecast.model.describe_work(config, amounts, probe.tokens if probe else None)
    words.append(("in all", f"{total} to judge by{f'; {work}' if work else ''}"))
    disk = forecast.disk
    parts = {
        "models": disk.models,
        forecast.model.samples: disk.samples,
        "latents": disk.latents,
        "checkpoints": disk.checkpoints,
    }
    shares = ", ".join(f"{name} {megabytes(size)}" for name, size in parts.items() if size)
    words.append(("disk", f"{megabytes(disk.total)}: {shares}"))
    if (peaks := forecast.peaks) is not None and peaks.drawing is not None:
        run, in_probe = (
            ", ".join(f"{kind} {megabytes(peak)}" for kind, peak in pair if peak is not None)
            for pair in (
                (("generating", peaks.run_drawing), ("training", peaks.run_tuning)),
                (("generating", peaks.drawing), ("training", peaks.training)),
            )
        )
        compared = probe.comparing if probe is not None else None
        if compared is not None and ("log-probabilities" in (forecast.seconds or {})):
            in_probe += f", log-probabilities {megabytes(compared.most)}"
        missing = "; that of training was not measured" if config.num_rounds and peaks.training is None else ""
        measured = f"measured in the probe, with all that was loaded: {in_probe}{missing}"
        words.append(("memory", f"{run} at most; {measured}"))
    elif forecast.memory:
        words.append(("memory", forecast.memory.describe()))
    if (sharing := forecast.sharing).workers > 1:
        words.append(("workers", sharing.describe(peaks.run_drawing if peaks is not None else None)))
    if sharing.processes > 1 and config.num_rounds:
        words.append(("training", sharing.describe_training(peaks.run_tuning if peaks else None, forecast.model)))
    if probe is not None and probe.generation:
        words.append(("generation", probe.generation))
    if forecast.seconds is not None:
        words.append(("time", time(forecast)))
    return words


def time(forecast: Forecast) -> str:
    probe, seconds = forecast.probe, forecast.seconds or {}
    assert probe is not None
    source = f"from a probe of two prompts that took {duration(probe.seconds)}"
    if probe.cut_short:
        source += f"; extrapolated: {', '.join(probe.cut_short)}"
    if probe.missing:
        missing = ", ".join(probe.missing)
        source += f"; not measured within {probe.limit:g} s: {missing} (--probe-seconds gives more)"
    if not seconds:
        return f"not known ({source})"
    total = sum(seconds.values())
    shares = ", ".join(f"{name} {percent(value / total)}" for name, value in seconds.items() if value > 0)
    return f"{'more than' if probe.missing else 'about'} {duration(total)}: {shares} ({source})"
