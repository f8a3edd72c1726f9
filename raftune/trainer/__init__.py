"""TRL-style interface: RaftTrainer and RaftConfig."""

from __future__ import annotations

from raftune.trainer.config import RaftConfig
from raftune.trainer.trainer import RaftTrainer

__all__ = ["RaftConfig", "RaftTrainer"]
