"""`raftune reward`: checks, lists, trains rewards, and scores files with them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from cyclopts import Parameter

from raftune.cli.errors import interruptible
from raftune.cli.flags import Device, Json, Options, Timeout, Tokens, read_data_flags, read_object, switch
from raftune.cli.output import PlainTable, echo
from raftune.errors import ConfigError, DataError, GateFailed, RewardError
from raftune.results.measures import loss_ends, spread
from raftune.runtime.progress import StepProgress
from raftune.sanitize import counted, percent, shell_command

if TYPE_CHECKING:
    from raftune.reward_models.training import RewardTrainingOutcome
    from raftune.rewards import CheckReport, RewardBatch
    from raftune.rewards.files import FileScores
    from raftune.rewards.registry import BuiltInReward, RewardOption

MOST = 256
PLACES = {"here": "this process", "thread": "a thread", "loop": "an event loop", "process": "a process of its own"}


def check(
    spec: Annotated[str, Parameter(help="As in rewards.reward_funcs: file.py:function, a model, regex, …")],
    *,
    samples: Annotated[
        str | None,
        Parameter(help="Data set with prompt and completion, or images; default: built-in examples."),
    ] = None,
    images: Annotated[bool, switch("Use image examples if no samples are given.")] = False,
    options: Options = None,
    timeout: Timeout = 120.0,
    device: Device = "auto",
    as_json: Json = False,
) -> int:
    """Try a reward on samples and report signature, values, failures, determinism and speed.

    raftune reward check rewards.py:polite --samples answers.jsonl
    raftune reward check length --options '{"target": 20}'
    raftune reward check rewards.py:tidy --images

    Other columns of the samples are passed to the reward by keyword. The exit code is 0 if every sample got a number or
    None, and the same again in any order and batch size; otherwise 3.
    """
    from raftune.config.rewards import RewardSpec
    from raftune.rewards import check_reward
    from raftune.rewards.batch import is_image
    from raftune.starters.resolve import IMAGES, resolve_reward

    parsed = RewardSpec.model_validate({"spec": spec, "options": read_object("--options", options)})
    batch = read_samples(samples) if samples is not None else starter_samples(spec, images)
    are_images = images if batch is None else any(map(is_image, batch.completions))
    reward = resolve_reward(parsed, IMAGES if are_images else None)
    report = check_reward(reward, batch, timeout=timeout, device=device, pictures=are_images)
    if as_json:
        print(json.dumps(dataclasses.asdict(report) | {"ok": report.ok, "findings": report.findings}))
        return 0 if report.ok else 3
    show_check(report)
    if samples is None and not are_images and report.statuses.get("error"):
        echo(
            "  - was tried on texts of our own, without further columns: a reward that reads the data's columns is",
            "    tried with --samples FILE, one of images with --images",
        )
    return 0 if report.ok else 3


def read_samples(source: str) -> RewardBatch:
    """The first samples of a data set. Raises DataError if it lacks prompt or completion."""
    from raftune.data.tables import read_rows
    from raftune.rewards import RewardBatch
    from raftune.rewards.files import holds_image, is_folder, read_answers

    table = None if is_folder(source) else read_rows(source, field="--samples")
    if table is None or (table.num_rows and holds_image(table.slice(0, 1).to_pylist()[0])):
        rows = read_answers(source, field="--samples")
        batch = RewardBatch(rows.prompts, cast("list[Any]", rows.completions), rows.columns)
        return batch.take(range(min(MOST, len(rows.completions))))
    if missing := [name for name in ("prompt", "completion") if name not in table.column_names]:
        raise DataError(
            f"--samples must have the columns prompt and completion; {missing[0]} is missing from "
            f"{', '.join(table.column_names)}. `raftune export --format sft` writes such a file."
        )
    columns = table.slice(0, MOST).to_pydict()
    prompts, completions = columns.pop("prompt"), columns.pop("completion")
    if not completions:
        raise DataError(f"--samples must hold at least one sample; {Path(source).name} has none.")
    return RewardBatch(prompts, completions, columns)


def starter_samples(spec: str, images: bool) -> RewardBatch | None:
    """Prompts and completions, or captions and images, for the bundled rewards; None for any other.

    The images are of the bundled generator, each under the caption of the next but one.
    """
    from raftune.rewards import RewardBatch
    from raftune.starters.resolve import JUDGE, WORD

    if images and spec.startswith(WORD):
        import numpy as np

        from raftune.starters.image.pictures import as_image, paint, scenes

        shown = scenes("heldout")[:32]
        painted = [as_image(pixels) for pixels in paint(shown, np.random.default_rng(0))]
        return RewardBatch([scene.caption for scene in (*shown[2:], *shown[:2])], painted)
    if spec not in (WORD, JUDGE):
        return None
    from raftune.starters.text.corpus import dialogues

    samples = [dialogue for dialogue, _ in zip(dialogues(32, 0), range(32), strict=False)]
    return RewardBatch([sample.prompt for sample in samples], [sample.completion for sample in samples])


def show_check(report: CheckReport) -> None:
    def verdict(same: bool | None) -> str:
        return "cannot be told, since calls failed" if same is None else "the same values" if same else "other values"

    fine = "scores all samples the same" if report.constant else "fine"
    echo(f"{report.name}: {fine if report.ok else 'not fit for a run yet'}", style="bold")
    statuses = ", ".join(f"{count} {status}" for status, count in sorted(report.statuses.items()))
    echo(
        f"  takes          {'all columns' if report.accepts is None else ', '.join(report.accepts)}",
        f"  runs in        {PLACES[report.place]}",
        f"  samples        {report.samples}: {statuses}",
    )
    if report.statuses.get("ok", 0):
        echo(f"  values         mean {report.mean:.4g}, from {report.lowest:.4g} to {report.highest:.4g}")
    echo(
        f"  asked again    {verdict(report.deterministic)}",
        f"  other order    {verdict(report.order_independent)}",
        f"  smaller calls  {verdict(report.batch_independent)}",
    )
    if report.mixed_sizes is not None:
        echo(f"  mixed sizes    {'scored in one call' if report.mixed_sizes else 'cannot be scored in one call'}")
    echo(f"  speed          {report.samples_per_second:.3g} samples a second")
    echo(*(f"  - {finding}" for finding in report.findings))
    # a call that fails fails for all its samples: the first of each detail is shown
    for failing in {failing.detail: failing for failing in reversed(report.failing)}.values():
        echo(f"  sample {failing.index}, {failing.status}: {failing.detail}")
        echo(f"    prompt {failing.prompt!r}, completion {failing.completion!r}")


MOST_FAILED = 0.5  # share of failed samples above which the command fails


def score(
    spec: Annotated[str, Parameter(name="MODEL", help="A model's folder, or any reward as in rewards.reward_funcs.")],
    file: Annotated[str, Parameter(help="Prompts with completions or images, or preferences; a file or a folder.")],
    *,
    out: Annotated[str | None, Parameter(help="Output file: FILE.jsonl or FILE.parquet.")] = None,
    split: Annotated[str, Parameter(help="Split of a hub or `datasets` folder.")] = "train",
    dialogues: Annotated[
        Literal["text", "messages"], Parameter(help="HH-RLHF dialogues as text, or as messages.")
    ] = "text",
    options: Options = None,
    timeout: Timeout = 120.0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Score a file of completions or preferences with any reward; of preferences, also how often the chosen one wins.

    raftune reward score rm/model answers.jsonl --out scored.parquet
    raftune reward score length prefs.jsonl.gz --options '{"target": 200}'
    raftune reward score clip_score images/ --options '{"model": "openai/clip-vit-base-patch32"}'

    FILE has prompt and completion (other columns are passed to the reward and kept), or preferences in any format that
    `raftune reward train` reads. Images are a column `image` (bytes, or paths relative to FILE), or a folder with
    metadata.jsonl (file_name, prompt) or a text file beside each. Rows that cannot be read and samples that cannot be
    scored are counted and reported.
    """
    from raftune.config.load import validate_as
    from raftune.config.rewards import RewardsConfig
    from raftune.rewards.batch import check_media
    from raftune.rewards.files import read_answers, score_answers, summary, write_scored
    from raftune.rewards.loading import load_panel
    from raftune.starters.resolve import IMAGES, resolve_reward

    target = None if out is None else Path(out).expanduser()
    if target is not None and target.suffix not in (".jsonl", ".parquet"):
        raise ConfigError(f"--out must end in .jsonl or .parquet; got {target.name!r}. Rename it.")
    if target is not None and target.exists():
        raise ConfigError(f"--out must not exist yet; {target} does. Choose another name.")
    reward = {"spec": spec, "options": read_object("--options", options)}
    config = validate_as(RewardsConfig, {"reward_funcs": reward, "timeout": timeout, "device": device})
    rows = read_answers(file, split, dialogues)
    family = IMAGES if rows.media == "image" else None
    config = config.model_copy(update={"reward_funcs": (resolve_reward(config.reward_funcs[0], family),)})
    with interruptible(Path(), "nothing was written.") as watch, StepProgress() as steps, load_panel(config) as rewards:
        check_media(rewards.media, rows.media)
        steps.begin(f"scoring {counted(len(rows.completions), 'answer')}")

        def observe(done: int, of: int) -> None:
            steps.advance(done, of)
            watch("progress", {})

        scored = score_answers(rewards, rows, observe)
    if target is not None:
        write_scored(scored, target)
    result = summary(scored)
    if as_json:
        print(json.dumps({**result, "out": out}))
    else:
        show_scores(scored, result, out)
    if scored.failures.fraction > MOST_FAILED:
        raise RewardError(
            f"{sum(scored.failures.counts.values()):,} of {counted(len(scored.scores), 'answer')} could not be scored. "
            f"Fix the reward: `{shell_command('raftune', 'reward', 'check', spec)}` shows what it does."
        )


def show_scores(scored: FileScores, result: dict[str, Any], out: str | None) -> None:
    echo(*scored.answers.words)
    echo("  statuses   " + ", ".join(f"{count:,} {status}" for status, count in sorted(result["statuses"].items())))
    if result["score"]:
        low, middle, high = (result["quantiles"][name] for name in ("0.05", "0.5", "0.95"))
        quantiles = f"5 % below {low:.3f}, half below {middle:.3f}, 95 % below {high:.3f}"
        prompts = counted(result["score"]["n"], "prompt")
        echo(f"  score      {spread(result['score'])} over {prompts}, 95 % interval")
        echo(f"  spread     standard deviation {result['std']:.3f}; {quantiles}")
    if result.get("accuracy"):
        pairs = counted(result["pairs"], "pair")
        echo(f"  accuracy   {spread(result['accuracy'])}: the preferred answer scores higher, {pairs}")
    for detail, (status, prompt, completion) in scored.failures.examples.items():
        echo(f"  {status}: {detail}", style="yellow")
        echo(f"    prompt {prompt!r}, completion {completion!r}")
    if out is not None:
        echo(f"  rows       {out}")


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
        show_training(outcome)
    if not outcome.published:
        raise GateFailed(
            f"The model {outcome.report['verdict']}. It was not saved as {root / 'model'}; the report was.\n"
            f"Look at {root / 'held_out.parquet'}; try more rows, more epochs or another learning_rate in another "
            "output_dir; or save it as it is: the same command with --allow-chance."
        )


def show_training(outcome: RewardTrainingOutcome) -> None:
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


MEDIA = {"text": "texts", "messages": "conversations", "image": "images"}
OTHERS = (
    ("FILE.py:FUNCTION", "Your function with TRL's signature: a number for each completion."),
    ("MODULE:FUNCTION", "A function of an installed package."),
    ("FOLDER or OWNER/NAME", "A reward model or a CLIPModel, from `raftune reward train` or the hub."),
    ("starter", "The bundled reward model for the bundled texts; for images the bundled CLIP score."),
    ("starter:judge", "The bundled judge of the same texts or images; held out in `raftune demo`."),
)
PAGE = """\
# Built-in rewards

<!-- Generated by `raftune reward list --markdown`. -->

`raftune reward list` prints this list, and `raftune reward check NAME` tries a reward. `rewards.reward_funcs` lists the
rewards of a run, with or without options. The score is their weighted sum:

```yaml
rewards:
  reward_funcs:
    - {spec: length, options: {target: 20}}
    - {spec: repetition, weight: 0.5}
```

On the command line: `--rewards.reward_funcs '[{spec: length, options: {target: 20}}]'`.
"""


def list_rewards(
    name: Annotated[str | None, Parameter(help="Only this reward.")] = None,
    *,
    as_json: Json = False,
    markdown: Annotated[bool, switch("Print a page of Markdown.")] = False,
) -> None:
    """List the built-in rewards with their options and an example each.

    raftune reward list
    raftune reward list length
    """
    from raftune.rewards.registry import BUILT_IN, nearest
    from raftune.rewards.resolve import SHORT_NAMES

    if name is not None and name not in BUILT_IN:
        near = nearest(name, list(BUILT_IN))
        hint = f"did you mean {near!r}?" if near else f"there are {', '.join(sorted(BUILT_IN))}."
        raise ConfigError(f"NAME must be a built-in reward; got {name!r}; {hint}")
    rewards = [BUILT_IN[name]] if name is not None else list(BUILT_IN.values())
    rewards.sort(key=lambda reward: (scored_media(reward), reward.name))
    if as_json:
        documents = []
        for reward in rewards:
            options = [dataclasses.asdict(option) for option in reward.option_list()]
            document = {name: getattr(reward, name) for name in ("name", "media", "summary", "details")}
            document["media"] = [medium for medium in MEDIA if medium in reward.media]
            example = {"spec": reward.name, "options": dict(reward.example)}
            documents.append(document | {"options": options, "example": example, "command": example_command(reward)})
        print(json.dumps(documents))
    elif markdown:
        print(markdown_page(rewards, SHORT_NAMES), end="")
    else:
        for reward in rewards:
            echo(f"{reward.name} ({scored_media(reward)})", style="bold")
            echo(*(f"  {text}" for text in (reward.summary, *reward.details)))
            show_pairs((option.name, option_words(option)) for option in reward.option_list())
            echo(f"  example  {yaml_example(reward)}", f"  try it   {example_command(reward)}", "")
        if name is None:
            echo("Also taken as a reward", style="bold")
            show_pairs([*OTHERS, (", ".join(SHORT_NAMES), "Functions of trl.rewards; they need raftune[trl].")])


def show_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    table = PlainTable()
    for left, right in pairs:
        table.add("", left, right)
    table.show()


def markdown_page(rewards: Iterable[type[BuiltInReward]], of_trl: Iterable[str]) -> str:
    parts = [PAGE]
    for reward in rewards:
        parts.append(f"\n## {reward.name}\n\nScores {scored_media(reward)}. {reward.summary}\n")
        parts += [f"\n{text}\n" for text in reward.details]
        if options := reward.option_list():
            parts.append("\n| option | type | default | meaning |\n|---|---|---|---|\n")
            for option in options:
                cells = (f"`{option.name}`", option.type, default_value(option), option.meaning)
                parts.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n")
        parts.append(f"\n```yaml\nreward_funcs: [{yaml_example(reward)}]\n```\n")
        parts.append(f"\n```sh\n{example_command(reward)}\n```\n")
    parts.append("\n## Others\n\n| spec | reward |\n|---|---|\n")
    others = [*OTHERS, *((short, "The function of trl.rewards; needs `raftune[trl]`.") for short in of_trl)]
    parts += [f"| `{spec}` | {meaning} |\n" for spec, meaning in others]
    return "".join(parts)


def scored_media(reward: type[BuiltInReward]) -> str:
    *others, last = [words for medium, words in MEDIA.items() if medium in reward.media]
    return f"{', '.join(others)} and {last}" if others else last


def yaml_example(reward: type[BuiltInReward]) -> str:
    if not reward.example:
        return reward.name
    return f"{{spec: {reward.name}, options: {json.dumps(dict(reward.example), ensure_ascii=False)}}}"


def example_command(reward: type[BuiltInReward]) -> str:
    words = ["raftune", "reward", "check", reward.name]
    if reward.name == "answer":
        words += ["--samples", "answers.jsonl"]  # it reads a column, which the built-in samples lack
    elif reward.media == {"image"}:
        words += ["--images"]
    return shell_command(*words, *(["--options", json.dumps(dict(reward.example))] if reward.example else []))


def option_words(option: RewardOption) -> str:
    value = "required" if option.required else f"default {default_value(option)}"
    return f"{option.meaning} [{option.type}; {value}]"


def default_value(option: RewardOption) -> str:
    return "required" if option.required else json.dumps(option.default).strip('"') or '""'
