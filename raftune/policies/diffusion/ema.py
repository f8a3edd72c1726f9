"""Exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

FILE = "average.safetensors"
STEPS = "steps"


class MovingAverage:
    """An exponential moving average of named weights, in float32: bfloat16 would round its small moves away.

    Step n mixes in 1 - d of the weights, d = min(decay, n / (n + 9)) and 0 at the first: an average over a fit's own
    steps, and not over where it began, however few they are. The rule is that of diffusers' EMAModel.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.shadow = {name: weight.detach().float().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def follow(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Moves towards the weights after an optimizer step."""
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 9)) if self.steps > 1 else 0.0
        for name, weight in weights.items():
            self.shadow[name].lerp_(weight.float(), 1 - decay)

    @torch.no_grad()
    def publish(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Puts the average in the place of the weights."""
        for name, weight in weights.items():
            weight.copy_(self.shadow[name])

    def write(self, folder: Path) -> None:
        """Into a checkpoint, before it is sealed."""
        tensors = {name: tensor.contiguous() for name, tensor in self.shadow.items()}
        save_file(tensors | {STEPS: torch.tensor(self.steps)}, folder / FILE, metadata={"format": "pt"})

    def read(self, folder: Path) -> None:
        """Out of a checkpoint that verified."""
        tensors = load_file(folder / FILE)
        self.steps = int(tensors.pop(STEPS))
        for name, shadow in self.shadow.items():
            shadow.copy_(tensors[name])
