"""`raftune train`: runs a configuration. Resumes if the run exists."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from raftune.cli.flags import FromStage, OnlyStatuses, Tokens


def train(
    *files: Tokens,
    from_: FromStage = None,
    only: OnlyStatuses = None,
    json: Annotated[bool, Parameter(negative="", show_default=False, help="Print the outcome as JSON.")] = False,
) -> None:
    """Train. Resumes if the run exists.

    raftune train base.yaml mine.yaml --training.learning_rate 1e-4 --num-rounds 12

    FILES are YAML, later ones override earlier ones; any field of the configuration is a flag and overrides the files
    (`raftune schema` lists the fields). The same configuration in the same directory resumes. Another configuration is
    refused with the difference, unless --from names the stage to redo from; the earlier results move to superseded/.
    """
    from raftune.cli.flags import read_tokens
    from raftune.cli.run_command import work
    from raftune.config.load import load_config
    from raftune.errors import ConfigError

    given = read_tokens(files, "train", ("--from", "--only", "--json"))
    refuse_folders(given.words)
    if not given.words and not given.flags:
        raise ConfigError("train needs a configuration file; got none. `raftune init run.yaml` writes one.")
    work(load_config(given.words, given.flags), redo=from_, only=only, as_json=json)


def refuse_folders(files: Sequence[str]) -> None:
    """Raises ConfigError where a run, or another command's output, stands in the place of a configuration."""
    from raftune.errors import ConfigError
    from raftune.sanitize import shell_command
    from raftune.store.kinds import is_run, model_in, written_by

    for path in map(Path, files):
        if is_run(path):
            resume = shell_command("raftune", "resume", path)
            again = shell_command("raftune", "train", path / "config.yaml", "--output-dir", "NEW")
            raise ConfigError(
                f"FILES must be YAML files; {path} is a run's directory. `{resume}` goes on with it, `{again}` begins "
                "another of the same configuration."
            )
        if (command := written_by(path)) is not None:
            flag = "--policy.model" if command == "raftune sft" else "--rewards.reward_funcs"
            words = shell_command("raftune", "train", "RUN.yaml", flag, model_in(path))
            raise ConfigError(f"FILES must be YAML files; {path} is what `{command}` wrote. Write: {words}")
        if path.is_dir():
            raise ConfigError(f"FILES must be YAML files; {path} is a folder. `raftune init run.yaml` writes a file.")
