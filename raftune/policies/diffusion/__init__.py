"""The diffusion family: `Diffusion`, and beneath it loading, bindings, drawing, tuning and saving."""

from __future__ import annotations

from importlib.util import find_spec

from raftune.errors import ConfigError

for _module, _name in (("diffusers", "diffusers"), ("PIL", "Pillow")):
    if find_spec(_module) is None:
        raise ConfigError(
            f'policy.family diffusion needs {_name}, which is not installed. Run: pip install "raftune[images]"'
        )

from raftune.policies.diffusion.policy import Diffusion  # noqa: E402 (what is missing is said first)

__all__ = ["Diffusion"]
