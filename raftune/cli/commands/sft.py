"""`raftune sft`: supervised fine-tuning before the first round."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raftune.cli.errors import interruptible
from raftune.cli.flags import Json, Tokens, read_data_flags
from raftune.cli.output import echo
from raftune.runtime.progress import StepProgress
from raftune.sanitize import counted, shell_command

if TYPE_CHECKING:
    from raftune.sft import SftOutcome

SHORT = ("--min-score", "--keep", "--columns")
STEPS = {
    "read": "reading the completions",
    "start": "checking the model",
    "data.json": "encoding the completions",
    "model": "training",
    "report.json": "measuring held-out completions, before and after",
}


def sft(*words: Tokens, as_json: Json = False) -> None:
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
    from raftune.config.load import load_as
    from raftune.config.sft import SftConfig
    from raftune.runtime.distributed import launched
    from raftune.sft import sft as run_sft

    tokens = [in_full(word) for word in words]
    files, flags = read_data_flags(tokens, "sft", ("--json", *SHORT), SftConfig, "data.path")
    config = load_as(SftConfig, files, flags)
    root = Path(config.output_dir)
    kept = f"what is done is kept in {root}. The same command goes on with it."
    with launched(config), interruptible(root, kept) as watch, StepProgress() as steps:

        def observe(kind: str, facts: dict[str, Any]) -> None:
            if kind == "step":
                steps.begin(STEPS[facts["name"]])
            elif kind in ("encoded", "trained"):
                steps.advance(facts["done"], facts["of"])
            watch(kind, facts)

        outcome = run_sft(config, observe)
    if as_json:
        print(json.dumps({"directory": str(root), "worked": outcome.worked, **outcome.report}, ensure_ascii=False))
    else:
        echo(*outcome_words(outcome))


def in_full(word: str) -> str:
    """A short flag as the field of `data` that it stands for."""
    flag, equals, value = word.partition("=")
    return f"--data.{flag.replace('-', '_').strip('_')}{equals}{value}" if flag in SHORT else word


def outcome_words(outcome: SftOutcome) -> Iterator[str]:
    root, report = outcome.root, outcome.report
    data, training = report["data"], report["training"]
    done = "Finished" if outcome.worked else "Already finished; nothing to do"
    steps = counted(training["steps"], "step")
    yield (
        f"{done}: learned {counted(data['learned'], 'completion')} in {steps}, loss {training['loss_first']:.3f} → "
        f"{training['loss_last']:.3f} (means of the first and the last tenth)."
    )
    skipped = sum(data["skipped"].values())
    yield f"  data        {data['source']}: {counted(data['rows'], 'row')}, {data['format']}"
    yield f"  rows        {data['learned']:,} learned, {data['held_out']:,} held out, {skipped:,} skipped"
    for reason, count in sorted(data["skipped"].items(), key=lambda item: -item[1]):
        yield f"                {count:,} {reason}"
    if skipped:
        yield f"              each is named in {root / 'skipped.jsonl'}"
    if data["cut"]:
        yield f"              {counted(data['cut'], 'completion')} were cut to fit"
    for note in data["notes"]:
        yield f"  note        {note}"
    if perplexity := report["perplexity"]:
        completions, tokens = (
            counted(perplexity["answers"], "held-out completion"),
            counted(perplexity["tokens"], "token"),
        )
        change = f"{perplexity['before']:.2f} → {perplexity['after']:.2f}"
        yield f"  perplexity  {change}, on {completions} of {tokens}"
    model = root / report["model"]
    flags = ("--policy.model", model, "--data.prompts", root / "prompts.jsonl")
    yield f"  model       {model}"
    yield f"  next        {shell_command('raftune', 'train', 'RUN.yaml', *flags)}"
