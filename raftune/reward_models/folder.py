"""The directory of a reward model's training: what lies where, and whether it may be gone on with.

config.yaml          what was asked for
data.json            what was read: counts, formats, and a hash over all of it
skipped.jsonl        every row that was not learned from, with its reason
work/                checkpoints, and the trained model until it is judged; removed once model/ is there
held_out.parquet     every held-out row with its scores
report.json          what the model is worth
model/               the model: a plain transformers folder
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from raftune.config.load import differences
from raftune.config.reward_model import RewardModelConfig
from raftune.errors import ConfigChanged, ConfigError
from raftune.store.run import CONFIG as OF_A_RUN

CONFIG, DATA, SKIPPED, HELD_OUT, REPORT = "config.yaml", "data.json", "skipped.jsonl", "held_out.parquet", "report.json"
FREE = {"output_dir", "allow_chance"}  # fields that shape nothing which was computed


class Folder:
    """The paths of one training."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.work, self.model = root / "work", root / "model"
        self.candidate = self.work / "model"
        self.report, self.data = root / REPORT, root / DATA

    def claim(self, config: RewardModelConfig) -> None:
        """Notes the configuration in a new directory; in one that is begun it must be the same.

        Raises ConfigChanged with the difference.
        """
        asked = config.model_dump(mode="json", exclude=FREE)
        path = self.root / CONFIG
        if path.is_file():
            self._refuse_changes(path, asked)
        else:
            path.write_text(yaml.safe_dump(asked, sort_keys=False, allow_unicode=True), encoding="utf-8")

    def refuse_foreign(self) -> None:
        """Raises ConfigError for a directory of something else, before anything in it is touched."""
        if (self.root / CONFIG).is_file() or not self.root.is_dir():
            return
        if foreign := sorted(path.name for path in self.root.iterdir() if path.name != "LOCK"):
            what = "a run" if (self.root / OF_A_RUN).is_file() else f"{foreign[0]!r}"
            raise ConfigError(f"output_dir must be new, or of this training; {self.root} holds {what}. Choose another.")

    def _refuse_changes(self, path: Path, asked: Mapping[str, Any]) -> None:
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            found = None
        if not isinstance(found, dict) or "objective" not in found:
            raise ConfigError(
                f"output_dir must be new, or of this training; {path} is of something else. Choose another."
            )
        if changed := differences(found, asked):
            told = "; ".join(f"{name}: {old!r} there, {new!r} now" for name, (old, new) in changed.items())
            raise ConfigChanged(
                f"{self.root} was made with another configuration. {told}. Choose another output_dir, or remove it."
            )

    def publish(self) -> None:
        """Moves the trained model to its place, and removes what was needed to get there."""
        self.candidate.replace(self.model)
        shutil.rmtree(self.work, ignore_errors=True)
