"""The teacher: a second model of the policy's family, which generates and is not trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from raftune.config.run import RunConfig
from raftune.errors import ModelError
from raftune.policies.registry import Family, make_relative

# Of `policy` what is the policy's own.
OWN: Final[dict[str, Any]] = {
    "adapter": None,
    "tokenizer": None,
    "revision": None,
    "variant": None,
    "pipeline_init_kwargs": {},
}


def start_teacher(family: Family, config: RunConfig, out: Path) -> None:
    """Writes down the teacher as a family writes its start; faults are said of the teacher's own field."""
    try:
        family.start(teacher_config(config), out)
        make_relative(out, config.sampling.teacher.model if config.sampling.teacher is not None else None)
    except ModelError as error:
        raise type(error)(str(error).replace("policy.model", "sampling.teacher.model")) from error


def teacher_config(config: RunConfig) -> RunConfig:
    """The configuration with the teacher in the policy's place: the same family and options, no adapter, and no rounds.

    It is never trained, so it need not be of a kind that can be.
    """
    assert config.sampling.teacher is not None
    changes: dict[str, Any] = {"model": config.sampling.teacher.model}
    changes |= {name: value for name, value in OWN.items() if hasattr(config.policy, name)}
    return config.model_copy(update={"policy": config.policy.model_copy(update=changes), "num_rounds": 0})
