"""`raftune evaluate`: measures a model, or a round of a run, on held-out prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from raftune.cli.flags import Json, Tokens, read_tokens
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
    as_json: Json = False,
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
    from raftune.runtime.evaluation_target import check_no_training_run, evaluation_of, parse_target
    from raftune.runtime.run import root_of

    words, flags = read_tokens(files, "evaluate", ("--from", "--only", "--json"))
    target = parse_target(subject)
    config = evaluation_of(target, words, flags)
    check_no_training_run(root_of(config))
    run_evaluation(target, config, from_, only, as_json)


def run_evaluation(target: EvalTarget, config: RunConfig, from_: str | None, only: str | None, as_json: bool) -> None:
    from raftune.cli.run_command import run_with_progress
    from raftune.evaluation.history import metrics_of
    from raftune.results.summary import best_of_k
    from raftune.runtime.evaluation_target import prompts_judged
    from raftune.runtime.run import root_of
    from raftune.store.run import RunFolder

    root = root_of(config)
    _, worked = run_with_progress(config, from_, only)
    metrics, prompts = dict(metrics_of(RunFolder(root), 0)), prompts_judged(root)
    if not as_json:
        show(target, config, root, prompts["held_out"], metrics)
        return
    result = {
        "run": str(root),
        "subject": {"words": target.words, "run": str(target.run) if target.run else None, "round": target.round},
        "prompts": prompts["held_out"],
        "num_generations": config.evaluation.num_generations,
        "overlap": prompts["overlap"],
        "metrics": metrics,
        "gains": {best.k: best.gain for best in best_of_k(metrics)},
        "worked": worked,
    }
    print(json.dumps(result))


def show(target: EvalTarget, config: RunConfig, root: Path, prompts: int, metrics: dict[str, Any]) -> None:
    from raftune.policies.registry import family_of
    from raftune.protocols import SupportsDescription
    from raftune.results.summary import best_of_k, measures, overlap_warning, worth_of_k

    count, family = config.evaluation.num_generations, family_of(config)
    if isinstance(family, SupportsDescription):
        samples = family.describe_samples(config, count)
    else:
        samples = f"{counted(count, 'completion')}, temperature {config.sampling.temperature:g}"
    echo(f"{target.words}: {prompts:,} held-out prompts x {samples}", style="bold")
    if warning := overlap_warning(root):
        echo(warning, style="yellow")
    echo("")
    table = PlainTable("measure", "value", "95 % interval", "meaning", right=(1, 2))
    for measure in measures(metrics):
        table.add(measure.title, measure.value, measure.interval, (measure.meaning, "dim"))
    table.show()
    echo(*remarks(metrics), style="yellow")
    curve = best_of_k(metrics)
    if len(curve) > 1:
        table = PlainTable("best of", "reward", "95 % interval", "of the gain", right=range(4))
        for best in curve:
            gain = "–" if best.gain is None else percent(best.gain)
            table.add(str(best.k), f"{best.reward:.3f}", best.interval, gain)
        echo("")
        table.show()
        if words := worth_of_k(curve):
            echo(f"{words}.")
    echo("", f"  samples   {shell_command('raftune', 'samples', root, '--held-out', '--sort', 'best')}")
    echo(f"  compare   {shell_command('raftune', 'compare', root, 'OTHER')}")


def remarks(metrics: dict[str, Any]) -> Iterator[str]:
    statuses = dict(metrics.get("statuses") or {})
    scored = statuses.pop("ok", 0)
    if statuses:
        others = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items()))
        yield f"{scored} of {scored + sum(statuses.values())} completions have a score; {others}"
    for name, error in (metrics.get("metric_errors") or {}).items():
        yield f"{name} has no value: {error}"
    references = metrics.get("references") or {}
    if left_out := references.get("left_out"):
        total = sum(references.values())
        yield f"perplexity: left out, for want of a usable reference completion: {left_out} of {total}"
    if impossible := references.get("impossible"):
        yield f"perplexity: infinite, for {impossible} reference completions are impossible here"
