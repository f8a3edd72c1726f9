"""`raftune reward train`: trains a reward model on human feedback."""

from __future__ import annotations

import json as js
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from raftune.cli.errors import interruptible
from raftune.cli.flags import Tokens
from raftune.cli.output import PlainTable, echo
from raftune.errors import GateFailed
from raftune.results.measures import loss_ends, spread
from raftune.runtime.progress import StepProgress
from raftune.sanitize import counted, percent, shell_command

if TYPE_CHECKING:
    from raftune.config.reward_model import RewardModelConfig
    from raftune.reward_models.training import RewardTrainingOutcome


def train(
    *words: Tokens,
    json: Annotated[bool, Parameter(negative="", show_default=False, help="Print the report as JSON.")] = False,
) -> None:
    """Train a reward model on preferences or ratings, and evaluate it on held-out prompts.

    raftune reward train prefs.jsonl --model distilbert-base-uncased --output-dir rm
    raftune reward train ratings.parquet --model starter --output-dir rm --num-train-epochs 3

    DATA is JSON lines (also gzipped), CSV, Parquet, a `datasets` folder or a hub name: HH-RLHF dialogues, chosen and
    rejected with or without a prompt, ranked completions, or prompt, completion and score. Rows that cannot be used are
    counted and listed in skipped.jsonl. FILE.yaml holds any of the fields below.

    The directory gets model/ (a plain transformers folder that any run takes as a reward), report.json and
    held_out.parquet. A model that is not better than chance on the held-out prompts is not saved, and the exit code is
    3; --allow-chance saves it. The same command resumes an interrupted training.
    """
    from raftune.cli.flags import data_and_files, read_tokens
    from raftune.config.load import load_as
    from raftune.config.reward_model import RewardModelConfig

    given = read_tokens(words, "reward train", ("--json",), RewardModelConfig)
    data, files = data_and_files(given, "reward train")
    outcome = go(load_as(RewardModelConfig, files, given.flags | ({"data": data} if data else {})))
    if json:
        facts = {"directory": str(outcome.root), "worked": outcome.worked, "published": outcome.published}
        print(js.dumps({**facts, **outcome.report}, ensure_ascii=False))
    else:
        show(outcome)
    if not outcome.published:
        raise GateFailed(refusal(outcome))


def go(config: RewardModelConfig) -> RewardTrainingOutcome:
    """The training under the eyes of a person."""
    from raftune.reward_models.training import train_reward_model
    from raftune.rewards import load_reward
    from raftune.starters.resolve import WORD
    from raftune.starters.text import policy_path

    if config.model == WORD:  # the policy, not the reward model: that one has learned its judge already
        config = config.model_copy(update={"model": str(policy_path())})
    root = Path(config.output_dir)
    kept = f"checkpoints are kept in {root}. The same command goes on with the newest."
    with interruptible(root, kept) as watch, StepProgress() as steps:

        def observe(kind: str, facts: dict[str, Any]) -> None:
            tell(steps, kind, facts)
            watch(kind, facts)

        return train_reward_model(config, lambda folder: load_reward(str(folder), device=config.device), observe)


def tell(steps: StepProgress, kind: str, facts: dict[str, Any]) -> None:
    """What has happened, on stderr."""
    if kind == "begin":
        steps.begin(facts["what"])
    elif kind == "said":
        steps.note(facts["words"])
    elif kind == "progress":
        steps.advance(facts["done"], facts["of"])


def refusal(outcome: RewardTrainingOutcome) -> str:
    """Why there is no model, and what to do."""
    return (
        f"The model {outcome.report['verdict']}. It was not saved as {outcome.root / 'model'}; the report was.\n"
        f"Look at {outcome.root / 'held_out.parquet'}; try more rows, more epochs or another learning_rate in another "
        "output_dir; or save it as it is: the same command with --allow-chance."
    )


def show(outcome: RewardTrainingOutcome) -> None:
    """The report in words and tables."""
    report, data = outcome.report, outcome.report["data"]
    echo("Finished." if outcome.worked else "Already finished; nothing to do.", style="bold")
    for words in data["words"]:
        echo(f"  {words}")
    if data["skipped"]:
        echo(f"    each is named in {outcome.root / 'skipped.jsonl'}")
    rows, prompts = data["rows"], data["prompts"]
    trained = f"{counted(report['steps'], 'step')}, {losses(report)}"
    echo(f"  learned    {counted(rows['train'], 'row')} of {counted(prompts['train'], 'prompt')}, {trained}")
    echo(f"  held out   {counted(rows['held_out'], 'row')} of {counted(prompts['held_out'], 'prompt')}")
    (show_pairwise if report["objective"] == "pairwise" else show_pointwise)(report)
    scores = report["distribution"]
    middle = scores["quantiles"]
    echo(
        f"  scores     mean {scores['mean']:.3f}, standard deviation {scores['std']:.3f}; "
        f"5 % below {middle['0.05']:.3f}, half below {middle['0.5']:.3f}, 95 % below {middle['0.95']:.3f}"
    )
    echo(
        f"  verdict    the model {report['verdict']}",
        style="bold" if report["better_than_chance"] and report.get("better_than_length", True) else "bold yellow",
    )
    if outcome.published:
        echo(f"  model      {outcome.root / 'model'}")
        model = outcome.root / "model"
        echo(f"  next       {shell_command('raftune', 'train', 'RUN.yaml', '--rewards.reward_funcs', model)}")


def losses(report: dict[str, Any]) -> str:
    """The mean loss of the first and of the last tenth of what was noted."""
    curve = [step["loss"] for step in report["loss"]]
    return "loss {:.3f} → {:.3f}".format(*loss_ends(curve)) if curve else "no loss"


def show_pairwise(report: dict[str, Any]) -> None:
    """Accuracy, calibration and length, on held-out pairs."""
    length, sure = report["length"], report["calibration"]
    echo(f"  accuracy   {spread(report['accuracy'])} of held-out pairs are ranked as people did; 95 % interval")
    echo(
        f"  calibrated it is {percent(sure['confidence'], 1)} sure on the mean, and right in "
        f"{percent(sure['accuracy'], 1)}; expected calibration error {sure['expected_error']:.3f}"
    )
    grid = PlainTable("    sure", "pairs", "right", right=frozenset({1, 2}))
    for one in sure["bins"]:
        if one["pairs"]:
            grid.add(
                f"    {percent(one['from'])} to {percent(one['to'])}",
                f"{one['pairs']:,}",
                f"{percent(one['accuracy'], 1)}",
            )
    grid.show()
    echo(f"  length     it prefers the longer answer in {percent(length['prefers_longer'], 1)} of the pairs")
    rule, gain = spread(length["longer_wins"]), spread(length["gain_over_length"])
    echo(f"    the rule that the longer wins is right in {rule}; the model gains {gain} over it")
    grid = PlainTable("    preferred is", "pairs", "right", right=frozenset({1}))
    for one in length["bins"]:
        if one["pairs"]:
            grid.add(f"    {one['preferred']}", f"{one['pairs']:,}", spread(one["accuracy"]))
    grid.show()
    if length["only_length"]:
        echo("    It may be measuring length alone: a ruler does as well on these rows.", style="yellow")


def show_pointwise(report: dict[str, Any]) -> None:
    """Explained variance, ranks, deciles and length, on held-out ratings."""
    length, deciles = report["length"], report["calibration"]
    echo(f"  R²         {spread(report['r2'])} of the variance of held-out ratings is explained; 95 % interval")
    echo(f"  error      {spread(report['mse'])} squared; the mean rating alone has {spread(report['mse_of_mean'])}")
    echo(f"  correlated Pearson {number(report['pearson'])}, Spearman {number(report['spearman'])}")
    if report["pair_accuracy"]:
        echo(
            f"  pairs      {spread(report['pair_accuracy'])} of the pairs of answers to one prompt are ranked as rated"
        )
    echo(f"  calibrated predictions miss the mean rating of their tenth by {deciles['expected_error']:.3f}")
    grid = PlainTable("    predicted", "rated", "rows", right=frozenset({1, 2}))
    for one in deciles["bins"]:
        grid.add(f"    {one['predicted']:.3f}", f"{one['rating']:.3f}", f"{one['rows']:,}")
    grid.show()
    echo(
        f"  length     rank correlation with the score {number(length['spearman_with_score'])}, with the rating "
        f"{number(length['spearman_with_rating'])}"
    )
    scale = report["ratings"]
    echo(f"  unit       a score of 0 is a rating of {scale['mean']:.3f}; a score of 1 is {scale['std']:.3f} more")


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
