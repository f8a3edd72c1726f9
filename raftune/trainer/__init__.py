"""TRL's face over the loop: a GRPO script becomes a RAFT script by changing two names.

RaftConfig     flat arguments, as GRPOConfig's: `config.py` maps them to the fields of a run's configuration
RaftTrainer    model, rewards and data as names or as Python objects: the same run, the same directory
"""

from __future__ import annotations

from raftune.trainer.config import RaftConfig
from raftune.trainer.trainer import RaftTrainer

__all__ = ["RaftConfig", "RaftTrainer"]
