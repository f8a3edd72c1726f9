"""The engines that `engine.kind` names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from raftune.config.extensions import load_extension
from raftune.config.run import EngineConfig
from raftune.engines.local import local_engine
from raftune.engines.ray import ray_engine
from raftune.store.job import Engine

ENGINES: dict[str, Callable[[EngineConfig, Path], Engine]] = {"local": local_engine, "ray": ray_engine}
METHODS = {"run": ("job", "stage", "chunks"), "rest": (), "close": ()}  # of a custom engine, with their arguments


def make_engine(config: EngineConfig, root: Path) -> Engine:
    """The configured engine. Raises ConfigError if a custom one does not exist or lacks a method."""
    if config.kind in ENGINES:
        return ENGINES[config.kind](config, root)

    def build(cls: type[Any]) -> Any:
        return cls(config, root)

    engine: Engine = load_extension(
        config.kind, "engine.kind", {}, "engine.options", methods=METHODS, attributes=("failed",), made_by=build
    )
    return engine
