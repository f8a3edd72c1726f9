"""`raftune evaluate`: measures a model, or a round of a run, on held-out prompts."""

from __future__ import annotations

import json as js
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from raftune.cli.flags import Tokens
from raftune.cli.output import PlainTable, echo
from raftune.sanitize import counted, percent, shell_command

if TYPE_CHECKING:
    from raftune.config.run import RunConfig
    from raftune.runtime.evaluation_target import EvalTarget


def evaluate(
    subject: Annotated[
        str, Parameter(name="MODEL_OR_RUN", help="A model, a run, or RUN@ROUND: a number, best, last, start.")
    ],
    *files: Tokens,
    from_: Annotated[str | None, Parameter(name="--from", help="Redo from this stage of the evaluation on.")] = None,
    only: Annotated[
        str | None, Parameter(help="With --from evaluation-score: score only samples with these statuses again.")
    ] = None,
    json: Annotated[bool, Parameter(negative="", show_default=False, help="Print the metrics as JSON.")] = False,
) -> None:
    """Measure a model, or a round of a run, on held-out prompts: reward, best of k, length, diversity, perplexity.

    raftune evaluate runs/mine@best
    raftune evaluate runs/mine@3 --rewards.reward_funcs rewards.py:strict --evaluation.num_generations 8
    raftune evaluate gpt2 --evaluation.prompts held_out.jsonl --rewards.reward_funcs rewards.py:polite

    MODEL is a folder, a hub name, or `starter`. For a round of a run (default: the best), the run's held-out prompts,
    rewards and sampling options are used; YAML files override these, and flags override all.

    The result is a run without rounds, in runs/evaluation-NAME or --output-dir: it can be interrupted and resumed, and
    `samples`, `verify` and `compare` read it. The same prompts and --evaluation.seed give the same seeds, so two
    evaluations are paired.

    --evaluation.reference_column measures perplexity, --evaluation.reward_funcs adds held-out rewards.
    """
    from raftune.cli.flags import read_tokens
    from raftune.runtime.evaluation_target import evaluation_of, refuse_training_run, subject_of
    from raftune.runtime.run import root_of

    given = read_tokens(files, "evaluate", ("--from", "--only", "--json"))
    who = subject_of(subject)
    config = evaluation_of(who, given.words, given.flags)
    refuse_training_run(root_of(config))
    carry_out(who, config, from_, json, only)


def carry_out(who: EvalTarget, config: RunConfig, from_: str | None, json: bool, only: str | None = None) -> None:
    """Begins the evaluation or goes on with it, and prints what came of it."""
    from raftune.cli.run_command import go
    from raftune.evaluation.history import metrics_of
    from raftune.runtime.evaluation_target import prompts_judged
    from raftune.runtime.run import root_of
    from raftune.store.run import RunFolder

    root = root_of(config)
    _, worked = go(config, from_, only)
    metrics, judged = dict(metrics_of(RunFolder(root), 0)), prompts_judged(root)
    if json:
        print(js.dumps(as_json(who, config, root, judged, metrics) | {"worked": worked}))
    else:
        show(who, config, root, judged, metrics)


def as_json(
    who: EvalTarget, config: RunConfig, root: Path, judged: dict[str, int], metrics: dict[str, Any]
) -> dict[str, Any]:
    from raftune.results.measures import best_of_k

    return {
        "run": str(root),
        "subject": {"words": who.words, "run": str(who.run) if who.run else None, "round": who.round},
        "prompts": judged["held_out"],
        "num_generations": config.evaluation.num_generations,
        "overlap": judged["overlap"],
        "metrics": metrics,
        "gains": {best.k: best.gain for best in best_of_k(metrics)},
    }


def describe_samples(config: RunConfig) -> str:
    """How many answers or images a prompt was given, and by which options."""
    from raftune.policies.registry import family_of
    from raftune.protocols import SupportsDescription

    count, family = config.evaluation.num_generations, family_of(config)
    if isinstance(family, SupportsDescription):
        return family.describe_samples(config, count)
    return f"{counted(count, 'answer')}, temperature {config.sampling.temperature:g}"


def show(who: EvalTarget, config: RunConfig, root: Path, judged: dict[str, int], metrics: dict[str, Any]) -> None:
    """The measures with their intervals, and what more answers a prompt would be worth."""
    from raftune.results.measures import best_of_k, measures, worth_of_k
    from raftune.results.summary import overlap_warning

    echo(f"{who.words}: {judged['held_out']:,} held-out prompts x {describe_samples(config)}", style="bold")
    if warning := overlap_warning(root):
        echo(warning, style="yellow")
    echo("")
    grid = PlainTable("measure", "value", "95 % interval", "meaning", right=frozenset({1, 2}))
    for found in measures(metrics):
        grid.add(found.title, found.value, found.interval, (found.meaning, "dim"))
    grid.show()
    for note in remarks(metrics):
        echo(note, style="yellow")
    curve = best_of_k(metrics)
    if len(curve) > 1:
        echo("")
        headroom(curve)
        if words := worth_of_k(curve):
            echo(f"{words}.")
    echo("")
    echo(f"  samples   {shell_command('raftune', 'samples', root, '--held-out', '--sort', 'best')}")
    echo(f"  compare   {shell_command('raftune', 'compare', root, 'OTHER')}")


def remarks(metrics: dict[str, Any]) -> list[str]:
    """What stands behind the numbers: samples that failed, references that were left out."""
    said = []
    statuses = dict(metrics.get("statuses") or {})
    scored = statuses.pop("ok", 0)
    if statuses:
        others = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items()))
        said.append(f"{scored} of {scored + sum(statuses.values())} answers have a score; {others}")
    said += [f"{name} has no value: {error}" for name, error in (metrics.get("metric_errors") or {}).items()]
    references = metrics.get("references") or {}
    if references.get("left_out"):
        asked = sum(references.values())
        said.append(f"perplexity: left out, for want of a usable reference answer: {references['left_out']} of {asked}")
    if references.get("impossible"):
        said.append(f"perplexity: infinite, for {references['impossible']} reference answers are impossible here")
    return said


def headroom(curve: Any) -> None:
    """The reward of the best of k answers, by k: what a larger K has to choose from."""
    grid = PlainTable("best of", "reward", "95 % interval", "of the gain", right=frozenset({0, 1, 2, 3}))
    for best in curve:
        gain = "–" if best.gain is None else percent(best.gain)
        grid.add(str(best.k), f"{best.reward:.3f}", best.interval, gain)
    grid.show()
