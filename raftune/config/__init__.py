"""The configuration of a run: frozen pydantic models, one file for each section, without torch."""

from typing import TYPE_CHECKING

from raftune.lazy import exports

if TYPE_CHECKING:
    from raftune.config.base import ConfigSection
    from raftune.config.evaluation import EvaluationConfig
    from raftune.config.guards import GuardsConfig
    from raftune.config.load import load_config, options_of, read_yaml, validate
    from raftune.config.policy import AdapterConfig, CausalLMPolicy, CustomPolicy, TabularPolicy
    from raftune.config.rewards import RewardsConfig, RewardSpec
    from raftune.config.run import DataConfig, EngineConfig, RunConfig, StopConfig
    from raftune.config.sampling import SamplingConfig, TeacherConfig
    from raftune.config.selection import SelectionConfig
    from raftune.config.training import ReferenceConfig, TrainingConfig

__all__ = [
    "AdapterConfig",
    "CausalLMPolicy",
    "ConfigSection",
    "CustomPolicy",
    "DataConfig",
    "EngineConfig",
    "EvaluationConfig",
    "GuardsConfig",
    "ReferenceConfig",
    "RewardSpec",
    "RewardsConfig",
    "RunConfig",
    "SamplingConfig",
    "SelectionConfig",
    "StopConfig",
    "TabularPolicy",
    "TeacherConfig",
    "TrainingConfig",
    "load_config",
    "options_of",
    "read_yaml",
    "validate",
]

# On first use: a reward's own process starts in half the time without the rest.
__getattr__ = exports(
    __name__,
    {
        "ConfigSection": "raftune.config.base",
        "EvaluationConfig": "raftune.config.evaluation",
        "GuardsConfig": "raftune.config.guards",
        "load_config": "raftune.config.load",
        "options_of": "raftune.config.load",
        "read_yaml": "raftune.config.load",
        "validate": "raftune.config.load",
        "AdapterConfig": "raftune.config.policy",
        "CausalLMPolicy": "raftune.config.policy",
        "CustomPolicy": "raftune.config.policy",
        "TabularPolicy": "raftune.config.policy",
        "RewardsConfig": "raftune.config.rewards",
        "RewardSpec": "raftune.config.rewards",
        "DataConfig": "raftune.config.run",
        "EngineConfig": "raftune.config.run",
        "RunConfig": "raftune.config.run",
        "StopConfig": "raftune.config.run",
        "SamplingConfig": "raftune.config.sampling",
        "TeacherConfig": "raftune.config.sampling",
        "SelectionConfig": "raftune.config.selection",
        "ReferenceConfig": "raftune.config.training",
        "TrainingConfig": "raftune.config.training",
    },
)
