"""`raftune reward train`: trains a reward model on human feedback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raftune.cli.errors import interruptible
from raftune.cli.flags import Json, Tokens, read_data_flags
from raftune.cli.output import PlainTable, echo
from raftune.errors import GateFailed
from raftune.results.measures import loss_ends, spread
from raftune.runtime.progress import StepProgress
from raftune.sanitize import counted, percent, shell_command

if TYPE_CHECKING:
    from raftune.reward_models.training import RewardTrainingOutcome


def train(*words: Tokens, as_json: Json = False) -> None:
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
    from raftune.config.load import load_as
    from raftune.config.reward_model import RewardModelConfig

    files, flags = read_data_flags(words, "reward train", ("--json",), RewardModelConfig, "data")
    config = load_as(RewardModelConfig, files, flags)

    from raftune.reward_models.training import train_reward_model
    from raftune.rewards import load_reward
    from raftune.starters.resolve import WORD
    from raftune.starters.text import policy_path

    if config.model == WORD:  # the policy; the bundled reward model is already trained on these preferences
        config = config.model_copy(update={"model": str(policy_path())})
    root = Path(config.output_dir)
    kept = f"checkpoints are kept in {root}. The same command goes on with the newest."
    with interruptible(root, kept) as watch, StepProgress() as steps:

        def observe(kind: str, facts: dict[str, Any]) -> None:
            if kind == "begin":
                steps.begin(facts["what"])
            elif kind == "said":
                steps.note(facts["words"])
            elif kind == "progress":
                steps.advance(facts["done"], facts["of"])
            watch(kind, facts)

        outcome = train_reward_model(config, lambda folder: load_reward(str(folder), device=config.device), observe)
    if as_json:
        facts = {"directory": str(root), "worked": outcome.worked, "published": outcome.published}
        print(json.dumps({**facts, **outcome.report}, ensure_ascii=False))
    else:
        show(outcome)
    if not outcome.published:
        raise GateFailed(
            f"The model {outcome.report['verdict']}. It was not saved as {root / 'model'}; the report was.\n"
            f"Look at {root / 'held_out.parquet'}; try more rows, more epochs or another learning_rate in another "
            "output_dir; or save it as it is: the same command with --allow-chance."
        )


def show(outcome: RewardTrainingOutcome) -> None:
    """Prints the report in words and tables."""
    report, data = outcome.report, outcome.report["data"]
    echo("Finished." if outcome.worked else "Already finished; nothing to do.", style="bold")
    echo(*(f"  {words}" for words in data["words"]))
    if data["skipped"]:
        echo(f"    each is named in {outcome.root / 'skipped.jsonl'}")
    rows, prompts = data["rows"], data["prompts"]
    losses = [step["loss"] for step in report["loss"]]
    loss = "loss {:.3f} → {:.3f}".format(*loss_ends(losses)) if losses else "no loss"
    trained = f"{counted(rows['train'], 'row')} of {counted(prompts['train'], 'prompt')}"
    echo(
        f"  learned    {trained}, {counted(report['steps'], 'step')}, {loss}",
        f"  held out   {counted(rows['held_out'], 'row')} of {counted(prompts['held_out'], 'prompt')}",
    )
    (show_pairwise if report["objective"] == "pairwise" else show_pointwise)(report)
    scores = report["distribution"]
    low, middle, high = (scores["quantiles"][name] for name in ("0.05", "0.5", "0.95"))
    good = report["better_than_chance"] and report.get("better_than_length", True)
    echo(
        f"  scores     mean {scores['mean']:.3f}, standard deviation {scores['std']:.3f}; "
        f"5 % below {low:.3f}, half below {middle:.3f}, 95 % below {high:.3f}"
    )
    echo(f"  verdict    the model {report['verdict']}", style="bold" if good else "bold yellow")
    if outcome.published:
        model = outcome.root / "model"
        command = shell_command("raftune", "train", "RUN.yaml", "--rewards.reward_funcs", model)
        echo(f"  model      {model}", f"  next       {command}")


def show_pairwise(report: dict[str, Any]) -> None:
    """Accuracy, calibration and length, on held-out pairs."""
    length, sure = report["length"], report["calibration"]
    echo(
        f"  accuracy   {spread(report['accuracy'])} of held-out pairs are ranked as people did; 95 % interval",
        f"  calibrated it is {percent(sure['confidence'], 1)} sure on the mean, and right in "
        f"{percent(sure['accuracy'], 1)}; expected calibration error {sure['expected_error']:.3f}",
    )
    table = PlainTable("    sure", "pairs", "right", right=(1, 2))
    for row in sure["bins"]:
        if row["pairs"]:
            bounds = f"    {percent(row['from'])} to {percent(row['to'])}"
            table.add(bounds, f"{row['pairs']:,}", percent(row["accuracy"], 1))
    table.show()
    rule, gain = spread(length["longer_wins"]), spread(length["gain_over_length"])
    echo(
        f"  length     it prefers the longer answer in {percent(length['prefers_longer'], 1)} of the pairs",
        f"    the rule that the longer wins is right in {rule}; the model gains {gain} over it",
    )
    table = PlainTable("    preferred is", "pairs", "right", right=(1,))
    for row in length["bins"]:
        if row["pairs"]:
            table.add(f"    {row['preferred']}", f"{row['pairs']:,}", spread(row["accuracy"]))
    table.show()
    if length["only_length"]:
        echo("    It may be measuring length alone: a ruler does as well on these rows.", style="yellow")


def show_pointwise(report: dict[str, Any]) -> None:
    """Explained variance, ranks, deciles and length, on held-out ratings."""

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    length, deciles, scale = report["length"], report["calibration"], report["ratings"]
    echo(
        f"  R²         {spread(report['r2'])} of the variance of held-out ratings is explained; 95 % interval",
        f"  error      {spread(report['mse'])} squared; the mean rating alone has {spread(report['mse_of_mean'])}",
        f"  correlated Pearson {number(report['pearson'])}, Spearman {number(report['spearman'])}",
    )
    if report["pair_accuracy"]:
        accuracy = spread(report["pair_accuracy"])
        echo(f"  pairs      {accuracy} of the pairs of answers to one prompt are ranked as rated")
    echo(f"  calibrated predictions miss the mean rating of their tenth by {deciles['expected_error']:.3f}")
    table = PlainTable("    predicted", "rated", "rows", right=(1, 2))
    for row in deciles["bins"]:
        table.add(f"    {row['predicted']:.3f}", f"{row['rating']:.3f}", f"{row['rows']:,}")
    table.show()
    with_score, with_rating = (number(length[f"spearman_with_{name}"]) for name in ("score", "rating"))
    echo(
        f"  length     rank correlation with the score {with_score}, with the rating {with_rating}",
        f"  unit       a score of 0 is a rating of {scale['mean']:.3f}; a score of 1 is {scale['std']:.3f} more",
    )
