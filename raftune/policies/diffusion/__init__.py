"""The diffusion family."""

from __future__ import annotations

from importlib.util import find_spec

from raftune.errors import ConfigError
from raftune.training.quiet import quiet

for _module, _name in (("diffusers", "diffusers"), ("PIL", "Pillow")):
    if find_spec(_module) is None:
        raise ConfigError(
            f'policy.family diffusion needs {_name}, which is not installed. Run: pip install "raftune[images]"'
        )

with quiet():  # transformers tells of every image processor that falls back to Pillow
    from raftune.policies.diffusion.policy import Diffusion

__all__ = ["Diffusion"]
