"""`raftune export`: exports a run's model or its samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from raftune.cli.flags import RunDirectory, switch
from raftune.cli.output import echo
from raftune.errors import ConfigError
from raftune.sanitize import counted

Format = Literal["model", "sft", "preference", "unpaired", "sft-tokens"]


def export(
    run: RunDirectory,
    *,
    format_: Annotated[Format, Parameter(name="--format", help="What to export.")],
    out: Annotated[str, Parameter(help="Where to write it: FILE.jsonl, FILE.parquet, or a folder.")],
    round_: Annotated[str | None, Parameter(name="--round", help="A number, best, or all.")] = None,
    merged: Annotated[bool, Parameter(help="For a LoRA run: merge the adapter into its base.")] = False,
    allow_code: Annotated[
        bool, switch("For sft-tokens: import a custom family that the run's configuration names.")
    ] = False,
) -> None:
    """Export a run's model or its samples, in the formats that TRL reads.

    model        the best round's model with tokenizer and model card, as transformers, peft or diffusers loads it
    sft          prompt, completion, weight: the kept samples
    preference   prompt, chosen, rejected, margin: each prompt's best and worst sample
    unpaired     prompt, completion, label: every scored sample, true if it was kept
    sft-tokens   input_ids, labels: the kept samples as the exact tokens that were generated, the prompt masked

    The default is the best round for a model and all rounds for samples; --round changes it. A folder of samples is
    read by `datasets.load_from_disk`. Existing files are not overwritten.
    """
    if format_ != "model":
        from raftune.results.export import export as export_samples

        if merged:
            raise ConfigError(f"--merged goes with --format model; got --format {format_}. Leave it out.")
        count = export_samples(run, format_, out, round_ or "all", allow_code=allow_code)
        echo(f"Wrote {counted(count, 'row')} to {out}.")
        return
    from raftune.results.model_card import publish_model

    path = Path(out)
    if round_ not in (None, "best") and not round_.isdigit():
        raise ConfigError(f"--round must be a number or best for a model; got {round_!r}. Leave it out for the best.")
    if path.suffix in (".jsonl", ".parquet"):
        raise ConfigError(f"--out must be a folder for a model; got {path.name!r}. Rename it.")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"--out must not exist yet, or be empty; {path} is not. Choose another name.")
    publish_model(run, path, int(round_) if round_ and round_.isdigit() else None, merged)
    echo(f"Wrote the model and its card to {path}.")
