"""`raftune runs`, `report`, `verify` and `export`: list, show, check and export runs."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from raftune.cli.flags import Json, RunDirectory, switch
from raftune.cli.output import PlainTable, echo
from raftune.errors import ConfigError, RunDamaged
from raftune.results.samples import span
from raftune.results.status import DAMAGED, FINISHED, IN_USE, status_of
from raftune.runtime.run import all_runs
from raftune.runtime.run import verify as verify_run
from raftune.sanitize import counted, megabytes, shell_command
from raftune.store.commit import Manifest
from raftune.store.run import RunFolder

Format = Literal["model", "sft", "preference", "unpaired", "sft-tokens"]
WEIGHTS, LATENTS = "the weights", "the latents of what was generated and not kept"
RESTORE = {
    WEIGHTS: "`raftune resume RUN --keep-models all --from ROUND/train` makes them again.",
    LATENTS: "`raftune resume RUN --keep-latents all --from ROUND/generate` generates the same again.",
}
STYLES = {FINISHED: "green", IN_USE: "cyan", DAMAGED: "bold red"}


def runs(folder: Annotated[str, Parameter(help="The folder.")] = "runs", *, as_json: Json = False) -> None:
    """List the runs in a folder: progress, best round, and whether they can be resumed."""
    statuses = sorted((status_of(path) for path in all_runs(folder)), key=lambda status: status.when)
    if as_json:
        print(json.dumps([status.as_json() for status in statuses]))
        return
    if not statuses:
        echo(f"There is no run in {Path(folder)}. `raftune train run.yaml` makes one.")
        return
    table = PlainTable("run", "family", "rounds", "best", "reward", "alarms", "state", "when")
    for status in statuses:
        start, best = status.start_reward, status.best_reward
        rewards = "–" if start is None else f"{start:.3f}" if best is None else f"{start:.3f} → {best:.3f}"
        table.add(
            status.root.name,
            status.family,
            f"{status.rounds}/{status.num_rounds}" if status.num_rounds else "evaluation",
            "–" if status.best is None else str(status.best or "start"),
            rewards,
            str(status.alarms or "–"),
            (status.state, STYLES.get(status.state, "yellow")),
            f"{status.when:%Y-%m-%d %H:%M}",
        )
    table.show()
    for status in statuses:
        if status.state == DAMAGED:
            echo(f"{status.root.name}: {status.why}")
        elif status.generation and (len(statuses) == 1 or not status.generation.startswith("shared prefix")):
            echo(f"{status.root.name} generates by {status.generation}")


def report(
    run: RunDirectory,
    *,
    out: Annotated[str | None, Parameter(help="Where to write it; default: RUN/report.html.")] = None,
    as_json: Annotated[bool, switch("Print what the page shows as JSON; write no page.", "--json")] = False,
) -> None:
    """Write a run's report: one HTML file with charts, all candidates, reasons and alarms.

    raftune report runs/mine --out mine.html

    A run writes its report after every round. Use this command for a run with `report: false`, of an earlier version,
    or with damaged files; the page then names what is missing, and the exit code is 1.
    """
    from raftune.report import collect, write_report

    page = collect(run)
    if as_json:
        print(json.dumps(page.document, ensure_ascii=False))
    else:
        echo(str(write_report(run, out, data=page)))
    if missing := page.document["missing"]:
        more = f" (and {len(missing) - 1} more, which the page names)" if len(missing) > 1 else ""
        command = shell_command("raftune", "verify", run)
        raise RunDamaged(f"{missing[0]}{more}. The page leaves it out; `{command}` lists what is damaged.")


def verify(run: RunDirectory, *, as_json: Json = False) -> int:
    """Check the hashes of everything in a run, and name what is missing, changed, or inconsistent.

    The exit code is 0 if everything is as committed, otherwise 1.
    """
    faults = verify_run(run)
    folder = RunFolder(run)
    commits: list[Manifest] = []
    for round_, name in folder.places():
        with contextlib.suppress(RunDamaged):  # an unreadable manifest is among the faults
            if commit := folder.commit(round_, name):
                commits.append(commit)
    files = sum(len(commit.files) for commit in commits)
    size = sum(entry.bytes for commit in commits for entry in commit.files.values())
    dropped: dict[str, list[int]] = {}  # what the run's own settings have deleted, and of which rounds
    with contextlib.suppress(RunDamaged):  # an unreadable marker is among the faults
        if weights := [r for r in folder.rounds() if folder.is_dropped(r, "model")]:
            dropped[WEIGHTS] = weights
        stages = ("generate", "teach")
        if latents := [r for r in folder.rounds() if any(folder.dropped_columns(r, stage) for stage in stages)]:
            dropped[LATENTS] = latents
    if as_json:
        facts = {"run": run, "stages": len(commits), "files": files, "bytes": size, "faults": faults}
        print(json.dumps({**facts, "dropped": dropped}))
    elif faults:
        echo(*faults)
        echo(f"{len(faults)} of {files} files or links are not as committed. Restore them, or redo with --from.")
    else:
        counts = f"{counted(len(commits), 'stage')}, {counted(files, 'file')}"
        echo(f"{run} is whole: {counts}, {megabytes(size)}, every SHA-256 as committed.")
    for kind, rounds in dropped.items():
        echo(f"  not here on purpose: {kind} of round {span(rounds)}. {RESTORE[kind]}", style="dim")
    return 1 if faults else 0


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
    try:
        publish_model(run, path, int(round_) if round_ and round_.isdigit() else None, merged)
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)  # it held nothing before, and the same command has to work again
        raise
    echo(f"Wrote the model and its card to {path}.")
