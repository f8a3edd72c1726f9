"""The configuration of a run: frozen pydantic models, one file for each section, without torch."""

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
