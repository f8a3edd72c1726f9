"""The output directory of a reward model's training: layout and resume check.

config.yaml          the configuration
data.json            what was read: counts, formats, and a hash over all of it
skipped.jsonl        every skipped row, with its reason
work/                checkpoints, and the trained model until it is judged; removed once model/ is there
held_out.parquet     every held-out row with its scores
report.json          metrics of the model
model/               the model: a plain transformers folder
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from raftune.config.load import differences
from raftune.config.reward_model import RewardModelConfig
from raftune.errors import ConfigChanged, ConfigError
from raftune.store.committed import write_manifest
from raftune.store.files import set_usual_mode
from raftune.store.run import CONFIG as OF_A_RUN

CONFIG, DATA, SKIPPED, HELD_OUT, REPORT = "config.yaml", "data.json", "skipped.jsonl", "held_out.parquet", "report.json"
FREE = {"output_dir", "allow_chance"}  # fields that shape nothing which was computed


class RewardModelFolder:
    """The paths of one training."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.work, self.model = root / "work", root / "model"
        self.candidate = self.work / "model"
        self.report, self.data = root / REPORT, root / DATA

    def refuse_foreign(self) -> None:
        """Raises ConfigError for a directory of something else, before anything in it is touched."""
        if not self.root.is_dir() or self._noted() is not None:
            return
        if foreign := sorted(path.name for path in self.root.iterdir() if path.name not in ("LOCK", "tmp")):
            what = "a run" if (self.root / OF_A_RUN).is_file() else repr(foreign[0])
            raise ConfigError(f"output_dir must be new, or of this training; {self.root} holds {what}. Choose another.")
        if any((self.root / "tmp").glob("*")):
            raise ConfigError(f"output_dir must be new, or of this training; {self.root}/tmp is not empty. Clear it.")

    def claim(self, config: RewardModelConfig) -> None:
        """Notes the configuration; where there is work already it must be the same.

        Raises ConfigChanged with the difference.
        """
        asked = config.model_dump(mode="json", exclude=FREE)
        if self.begun:
            changes = differences(self._noted() or {}, asked)
            if changed := {name: pair for name, pair in changes.items() if not same_file(*pair)}:
                told = "; ".join(f"{name}: {old!r} there, {new!r} now" for name, (old, new) in changed.items())
                raise ConfigChanged(
                    f"{self.root} was made with another configuration. {told}. Choose another output_dir, or remove it."
                )
        else:
            (self.root / CONFIG).write_text(yaml.safe_dump(asked, sort_keys=False, allow_unicode=True), "utf-8")

    @property
    def begun(self) -> bool:
        """Whether there is work that another configuration, or other data, would throw away."""
        return self.report.is_file() or self.candidate.is_dir() or any(self.work.glob("checkpoint-*"))

    def _noted(self) -> dict[str, Any] | None:
        """The configuration that was noted, if this is the directory of such a training."""
        try:
            found = yaml.safe_load((self.root / CONFIG).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError):
            return None
        return found if isinstance(found, dict) and "held_out_fraction" in found else None

    def refuse_other_data(self, identity: str) -> None:
        """Raises ConfigChanged where there is work on rows of another identity."""
        if self.begun and self.data.is_file() and json.loads(self.data.read_bytes())["identity"] != identity:
            raise ConfigChanged(
                f"{self.root} was begun with other data, or another tokenizer, under the same names. Choose another "
                "output_dir, or remove this one."
            )

    def publish(self) -> None:
        """Moves the trained model to its place."""
        write_manifest(self.candidate)
        set_usual_mode(self.candidate)
        self.candidate.replace(self.model)


def same_file(old: object, new: object) -> bool:
    """Whether two names are two ways to the same file."""
    return (
        isinstance(old, str)
        and isinstance(new, str)
        and Path(new).exists()
        and Path(old).resolve() == Path(new).resolve()
    )
