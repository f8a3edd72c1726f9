"""`raftune reward score`: scores a file of completions, images or preferences with any reward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from raftune.cli.errors import interruptible
from raftune.cli.flags import Device, Json, Options, Timeout, read_object
from raftune.cli.output import echo
from raftune.errors import ConfigError, RewardError
from raftune.results.measures import spread
from raftune.runtime.progress import StepProgress
from raftune.sanitize import counted, shell_command

if TYPE_CHECKING:
    from raftune.rewards.files import FileScores

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
    from raftune.rewards.files import read_answers, score_answers, summary, write_scored
    from raftune.rewards.loading import load_panel
    from raftune.rewards.media import refuse_unfit
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
        refuse_unfit(rewards.media, rows.media)
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
        show(scored, result, out)
    if scored.failures.fraction > MOST_FAILED:
        raise RewardError(
            f"{sum(scored.failures.counts.values()):,} of {counted(len(scored.scores), 'answer')} could not be scored. "
            f"Fix the reward: `{shell_command('raftune', 'reward', 'check', spec)}` shows what it does."
        )


def show(scored: FileScores, result: dict[str, Any], out: str | None) -> None:
    """Prints the summary, a line for each fact."""
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
