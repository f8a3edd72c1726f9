"""`raftune train`: runs a configuration. Resumes if the run exists."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from raftune.cli.flags import FromStage, Json, OnlyStatuses, Tokens, read_tokens
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
