"""`raftune train` and `raftune resume`: run a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from raftune.cli.flags import FromStage, Json, OnlyStatuses, RunDirectory, Tokens, read_run_flags, read_tokens
from raftune.config.load import load_config
from raftune.config.run import RunConfig
from raftune.errors import ConfigError
from raftune.sanitize import shell_command


def train(*files: Tokens, from_: FromStage = None, only: OnlyStatuses = None, as_json: Json = False) -> None:
    """Train. Resumes if the run exists.

    raftune train base.yaml mine.yaml --training.learning_rate 1e-4 --num-rounds 12

    FILES are YAML, later ones override earlier ones; any field of the configuration is a flag and overrides the files
    (`raftune schema` lists the fields). The same configuration in the same directory resumes. Another configuration is
    refused with the difference, unless --from names the stage to redo from; the earlier results move to superseded/.
    """
    from raftune.cli.run_command import work

    work(read_config(files, "train", ("--from", "--only", "--json")), redo=from_, only=only, as_json=as_json)


def read_config(tokens: Sequence[str], command: str, options: Sequence[str]) -> RunConfig:
    """The configuration of files and flags. Raises ConfigError for a run, or another command's output, as a file."""
    from raftune.store.kinds import is_run, model_in, written_by

    files, flags = read_tokens(tokens, command, options)
    if not files and not flags:
        raise ConfigError(f"{command} needs a configuration file; got none. `raftune init run.yaml` writes one.")
    for path in map(Path, files):
        fault = f"FILES must be YAML files; {path} is"
        if is_run(path):
            resume = shell_command("raftune", "resume", path)
            again = shell_command("raftune", "train", path / "config.yaml", "--output-dir", "NEW")
            raise ConfigError(
                f"{fault} a run's directory. `{resume}` goes on with it, `{again}` begins another of the same "
                "configuration."
            )
        if (writer := written_by(path)) is not None:
            flag = "--policy.model" if writer == "raftune sft" else "--rewards.reward_funcs"
            words = shell_command("raftune", "train", "RUN.yaml", flag, model_in(path))
            raise ConfigError(f"{fault} what `{writer}` wrote. Write: {words}")
        if path.is_dir():
            raise ConfigError(f"{fault} a folder. `raftune init run.yaml` writes a file.")
    return load_config(files, flags)


def resume(
    run: RunDirectory, *flags: Tokens, from_: FromStage = None, only: OnlyStatuses = None, as_json: Json = False
) -> None:
    """Resume a run exactly: on a CPU the result is bit-identical to that of an uninterrupted run.

    raftune resume runs/mine
    raftune resume runs/mine --num-rounds 12
    raftune resume runs/mine --from 3/select --selection.rule top_m --selection.m 2
    raftune resume runs/mine --from score --only error,timeout

    Any field of the configuration is a flag. A change that affects committed stages is refused with the difference,
    unless --from redoes that stage and all later ones; the earlier results move to superseded/.

    --only scores again what failed: all samples with a part of such a status (error, timeout, invalid, not_applicable,
    ok) get new scores from every reward, from the first round on that has one. All other samples keep their scores.
    """
    from raftune.cli.commands.evaluate import run_evaluation
    from raftune.cli.run_command import work
    from raftune.config.load import merge, nested, validate
    from raftune.runtime.evaluation_target import EvalTarget
    from raftune.runtime.verification import check_config_file
    from raftune.store.kinds import is_evaluation
    from raftune.store.run import RunFolder

    fix = "To change the configuration use flags, or `raftune train` with its files."
    changes = read_run_flags(flags, "resume", ("--from", "--only", "--json"), fix)
    folder = RunFolder(run)
    recorded = folder.configuration().model_dump(mode="json")
    check_config_file(folder)
    config = validate(merge([recorded, nested(changes), {"output_dir": run}]))
    if is_evaluation({"num_rounds": config.num_rounds}):
        model = getattr(config.policy, "model", None) or config.name
        run_evaluation(EvalTarget(model, config.name, {}, {}), config, from_, only, as_json)
    else:
        work(config, redo=from_, only=only, as_json=as_json)
