"""Records the calls of a scheduler while a pipeline generates."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

WATCHED = ("step", "scale_model_input")


@dataclass(frozen=True)
class SchedulerStep:
    """One step as the pipeline's loop sees it: `told`, what the denoiser was given; `output`, what arrived; `latents`,
    what came of it. All in the loop's own layout."""

    index: int
    time: torch.Tensor
    told: torch.Tensor
    output: torch.Tensor
    latents: torch.Tensor


@contextmanager
def watched(scheduler: Any, seen: Callable[[SchedulerStep], object]) -> Iterator[None]:
    """Within, every step of the scheduler is handed to `seen` once it is taken.

    Most loops scale what they give to the denoiser by scale_model_input; where one does not, it was given the sample.
    """
    step, scale = scheduler.step, getattr(scheduler, "scale_model_input", None)
    before = {name: value for name, value in vars(scheduler).items() if name in WATCHED}  # watched by somebody else
    scaled: list[torch.Tensor] = []
    count = 0

    @functools.wraps(step)  # pipelines look at its signature, to see which options it takes
    def watched_step(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kw: Any) -> Any:
        nonlocal count
        told = scaled.pop() if scaled else sample
        found = step(model_output, timestep, sample, *args, **kw)
        latents = found[0] if isinstance(found, tuple) else found.prev_sample
        seen(SchedulerStep(count, torch.as_tensor(timestep), told, model_output, latents))
        count += 1
        return found

    def watched_scale(*args: Any, **kw: Any) -> torch.Tensor:
        assert scale is not None
        scaled[:] = [scale(*args, **kw)]
        return scaled[0]

    scheduler.step = watched_step
    if scale is not None:
        scheduler.scale_model_input = watched_scale
    try:
        yield
    finally:
        for name in WATCHED:
            vars(scheduler).pop(name, None)
        vars(scheduler).update(before)
