"""`raftune reward score`: scores a file of completions, images or preferences with any reward."""

from __future__ import annotations

import json as js
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from raftune.cli.commands.reward import read_options
from raftune.cli.errors import interruptible
from raftune.cli.output import echo
from raftune.errors import ConfigError, RewardError
from raftune.results.measures import spread
from raftune.runtime.progress import StepProgress
from raftune.sanitize import counted, shell_command

if TYPE_CHECKING:
    from raftune.rewards.files import FileScores

MOST_FAILED = 0.5  # share of failed answers above which nothing may be built on the rest


def score(
    spec: Annotated[str, Parameter(name="MODEL", help="A model's folder, or any reward as in rewards.reward_funcs.")],
    file: Annotated[str, Parameter(help="Prompts with completions or images, or preferences; a file or a folder.")],
    *,
    out: Annotated[str | None, Parameter(help="Output file: FILE.jsonl or FILE.parquet.")] = None,
    split: Annotated[str, Parameter(help="Split of a hub or `datasets` folder.")] = "train",
    dialogues: Annotated[
        Literal["text", "messages"], Parameter(help="HH-RLHF dialogues as text, or as messages.")
    ] = "text",
    options: Annotated[str | None, Parameter(help="The reward's options, as JSON.")] = None,
    timeout: Annotated[float, Parameter(help="Time limit of one call, in seconds.")] = 120.0,
    device: Annotated[str, Parameter(help="Device of a reward model: auto, cpu, cuda, mps.")] = "auto",
    json: Annotated[bool, Parameter(negative="", show_default=False, help="Print the summary as JSON.")] = False,
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
    from raftune.rewards.files import summary, write_scored

    target = checked_out(out)
    scored = run(spec, file, split, dialogues, options, timeout, device)
    if target is not None:
        write_scored(scored, target)
    found = summary(scored)
    if json:
        print(js.dumps({**found, "out": out}))
    else:
        show(scored, found, out)
    failed = sum(scored.failures.counts.values())
    if scored.failures.fraction > MOST_FAILED:
        raise RewardError(
            f"{failed:,} of {counted(len(scored.scores), 'answer')} could not be scored. Fix the reward: "
            f"`{shell_command('raftune', 'reward', 'check', spec)}` shows what it does."
        )


def checked_out(out: str | None) -> Path | None:
    """The path to write. Raises ConfigError for one that exists, or that says no format."""
    if out is None:
        return None
    path = Path(out).expanduser()
    if path.suffix not in (".jsonl", ".parquet"):
        raise ConfigError(f"--out must end in .jsonl or .parquet; got {path.name!r}. Rename it.")
    if path.exists():
        raise ConfigError(f"--out must not exist yet; {path} does. Choose another name.")
    return path


def run(
    spec: str,
    file: str,
    split: str,
    dialogues: Literal["text", "messages"],
    options: str | None,
    timeout: float,
    device: str,
) -> FileScores:
    """The scores, under the eyes of a person."""
    from raftune.config.load import validate_as
    from raftune.config.rewards import RewardsConfig
    from raftune.rewards.files import read_answers, score_answers
    from raftune.rewards.loading import load_panel
    from raftune.rewards.media import refuse_unfit
    from raftune.starters.resolve import IMAGES, resolve_reward

    given: dict[str, Any] = {"reward_funcs": {"spec": spec, "options": read_options(options)}}
    config = validate_as(RewardsConfig, {**given, "timeout": timeout, "device": device})
    answers = read_answers(file, split, dialogues)
    family = IMAGES if answers.media == "image" else None
    config = config.model_copy(update={"reward_funcs": (resolve_reward(config.reward_funcs[0], family),)})
    with interruptible(Path(), "nothing was written.") as watch, StepProgress() as steps, load_panel(config) as panel:
        refuse_unfit(panel.media, answers.media)
        steps.begin(f"scoring {counted(len(answers.completions), 'answer')}")

        def observe(done: int, of: int) -> None:
            steps.advance(done, of)
            watch("progress", {})

        return score_answers(panel, answers, observe)


def show(scored: FileScores, found: dict[str, Any], out: str | None) -> None:
    """The summary, a line for each fact."""
    for words in scored.answers.words:
        echo(words)
    echo("  statuses   " + ", ".join(f"{count:,} {status}" for status, count in sorted(found["statuses"].items())))
    if found["score"]:
        low, middle, high = (found["quantiles"][name] for name in ("0.05", "0.5", "0.95"))
        echo(f"  score      {spread(found['score'])} over {counted(found['score']['n'], 'prompt')}, 95 % interval")
        quantiles = f"5 % below {low:.3f}, half below {middle:.3f}, 95 % below {high:.3f}"
        echo(f"  spread     standard deviation {found['std']:.3f}; {quantiles}")
    if found.get("accuracy"):
        pairs = counted(found["pairs"], "pair")
        echo(f"  accuracy   {spread(found['accuracy'])}: the preferred answer scores higher, {pairs}")
    for detail, (status, prompt, completion) in scored.failures.examples.items():
        echo(f"  {status}: {detail}", style="yellow")
        echo(f"    prompt {prompt!r}, completion {completion!r}")
    if out is not None:
        echo(f"  rows       {out}")
