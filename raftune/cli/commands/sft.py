"""`raftune sft`: supervised fine-tuning before the first round."""

from __future__ import annotations

import json as js
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from raftune.cli.errors import interruptible
from raftune.cli.flags import Tokens
from raftune.cli.output import echo
from raftune.runtime.progress import StepProgress
from raftune.sanitize import counted, shell_command

if TYPE_CHECKING:
    from raftune.sft import SftOutcome

SHORT = ("--min-score", "--keep", "--columns")
STEPS = {
    "read": "reading the answers",
    "start": "checking the model",
    "data.json": "encoding the answers",
    "model": "training",
    "report.json": "measuring held-out answers, before and after",
}


def sft(
    *words: Tokens,
    json: Annotated[bool, Parameter(negative="", show_default=False, help="Print the report as JSON.")] = False,
) -> None:
    """Supervised fine-tuning on the chosen completions of preferences, prompts with completions, or dialogues.

    raftune sft prefs.jsonl --policy.model gpt2 --output-dir sft --training.learning_rate 2e-5

    DATA is JSON lines (also gzipped), CSV, Parquet, a `datasets` folder or a hub name: HH-RLHF dialogues, chosen and
    rejected with or without a prompt, ranked completions, prompt and completion, or messages. Rows that cannot be used
    are counted and listed in skipped.jsonl. FILE.yaml holds any of the fields below.

    For completions with a score (or rating, or reward) choose what to train on: --min-score 4 takes those of 4 or more,
    --keep best the best of each prompt, --keep all every one. Other column names: --columns
    prompt=question,completion=reply.

    The directory gets model/ (loaded by transformers or peft, and by `raftune train` as policy.model), rows.parquet
    (the exact training rows), prompts.jsonl and held_out.jsonl (for later rounds) and report.json (with the perplexity
    of held-out completions before and after). The same command resumes an interrupted training, to the same bytes.
    """
    from raftune.cli.flags import data_and_files, read_tokens
    from raftune.config.load import load_as
    from raftune.config.sft import SftConfig
    from raftune.sft import sft as learn

    given = read_tokens([in_full(word) for word in words], "sft", ("--json", *SHORT), SftConfig)
    data, files = data_and_files(given, "sft")
    config = load_as(SftConfig, files, given.flags | ({"data.path": data} if data else {}))
    root = Path(config.output_dir)
    kept = f"what is done is kept in {root}. The same command goes on with it."
    with interruptible(root, kept) as watch, StepProgress() as steps:

        def observe(kind: str, facts: dict[str, Any]) -> None:
            if kind == "step":
                steps.begin(STEPS[facts["name"]])
            elif kind in ("encoded", "trained"):
                steps.advance(facts["done"], facts["of"])
            watch(kind, facts)

        learned = learn(config, observe)
    if json:
        print(js.dumps({"directory": str(root), "worked": learned.worked, **learned.report}, ensure_ascii=False))
        return
    for line in outcome(learned):
        echo(line)


def in_full(word: str) -> str:
    """The flag of a field of `data` that has a short name, in full."""
    flag, equals, value = word.partition("=")
    return f"--data.{flag.replace('-', '_').strip('_')}{equals}{value}" if flag in SHORT else word


def outcome(learned: SftOutcome) -> list[str]:
    """What was learned, how much it helped, and what to do with it."""
    root, report = learned.root, learned.report
    data, training = report["data"], report["training"]
    done = "Finished" if learned.worked else "Already finished; nothing to do"
    lines = [
        f"{done}: learned {counted(data['learned'], 'answer')} in {counted(training['steps'], 'step')}, loss "
        f"{training['loss_first']:.3f} → {training['loss_last']:.3f} (means of the first and the last tenth).",
        *data_lines(root, data),
    ]
    if perplexity := report["perplexity"]:
        change = f"{perplexity['before']:.2f} → {perplexity['after']:.2f}"
        answers, tokens = counted(perplexity["answers"], "held-out answer"), counted(perplexity["tokens"], "token")
        lines.append(f"  perplexity  {change}, on {answers} of {tokens}")
    model = root / report["model"]
    flags = ("--policy.model", model, "--data.prompts", root / "prompts.jsonl")
    following = shell_command("raftune", "train", "RUN.yaml", *flags)
    return [*lines, f"  model       {model}", f"  next        {following}"]


def data_lines(root: Path, data: dict[str, Any]) -> list[str]:
    """Where each row of the source went."""
    learned, held_out, skipped = data["learned"], data["held_out"], sum(data["skipped"].values())
    lines = [f"  data        {data['source']}: {counted(data['rows'], 'row')}, {data['format']}"]
    lines.append(f"  rows        {learned:,} learned, {held_out:,} held out, {skipped:,} skipped")
    for reason, count in sorted(data["skipped"].items(), key=lambda item: -item[1]):
        lines.append(f"                {count:,} {reason}")
    if skipped:
        lines.append(f"              each is named in {root / 'skipped.jsonl'}")
    if data["cut"]:
        lines.append(f"              {counted(data['cut'], 'answer')} were cut to fit")
    return lines + [f"  note        {note}" for note in data["notes"]]
