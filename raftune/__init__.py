"""Reward-ranked fine-tuning (RAFT): generate K samples for each prompt, keep the best, fine-tune on them, repeat.

raftune.run(config)                 a whole run from a configuration
raftune.RaftTrainer, RaftConfig     the same loop with TRL's interface
raftune.raft_iteration              one round on a table of logits
"""

import logging
from typing import TYPE_CHECKING

from raftune.lazy import exports

__version__ = "0.2.0"

# peft imports bitsandbytes where it is installed, which then warns of a kernel that nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

if TYPE_CHECKING:
    from raftune.config import RunConfig
    from raftune.policies.tabular.raft_iteration import raft_iteration
    from raftune.runtime.run import resume, run
    from raftune.trainer import RaftConfig, RaftTrainer

__all__ = ["RaftConfig", "RaftTrainer", "RunConfig", "raft_iteration", "resume", "run"]

# On first use, so that importing raftune imports no torch.
__getattr__ = exports(
    __name__,
    {
        "RaftConfig": "raftune.trainer",
        "RaftTrainer": "raftune.trainer",
        "RunConfig": "raftune.config",
        "raft_iteration": "raftune.policies.tabular.raft_iteration",
        "resume": "raftune.runtime.run",
        "run": "raftune.runtime.run",
    },
)
