"""Measures the effect of training: denoising loss and weight change, by noise level.

The trained and the initial denoiser get some of the training rows at the middle of each quarter of the noise range,
with the same noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from raftune.policies.diffusion.loss import DenoisingLoss
from raftune.policies.diffusion.pipelines.base import PipelineAdapter
from raftune.policies.diffusion.rows import ImageRow
from raftune.records import derive_seed

ROWS = 8
QUARTERS = 4

Said = torch.Tensor  # (R * 4, C, h, w) float32 on the CPU: row by row, its quarters in order


@dataclass(frozen=True)
class DenoisingProbe:
    """R rows at four levels: x_t, t and the targets, (R * 4, ...), and which prompts were asked."""

    denoising: DenoisingLoss
    x_t: torch.Tensor
    t: torch.Tensor
    target: torch.Tensor
    asked: torch.Tensor

    @classmethod
    def of(cls, rows: Sequence[ImageRow], denoising: DenoisingLoss) -> DenoisingProbe:
        """Rows spread evenly over the fit's."""
        chosen = [rows[i * len(rows) // min(ROWS, len(rows))] for i in range(min(ROWS, len(rows)))]
        x0 = torch.stack([row.x0 for row in chosen]).repeat_interleave(QUARTERS, 0)
        generators = [torch.Generator().manual_seed(derive_seed(denoising.seed, "probe", row.number)) for row in chosen]
        noise = torch.cat([torch.randn((QUARTERS, *x0.shape[1:]), generator=one) for one in generators])
        low, high = denoising.config.noise_range
        shares = low + (high - low) * (torch.arange(QUARTERS, dtype=torch.float64) + 0.5) / QUARTERS
        schedule = denoising.schedule
        t = schedule.times(shares).repeat(len(chosen))
        asked = torch.tensor([row.prompt for row in chosen]).repeat_interleave(QUARTERS)
        return cls(denoising, schedule.noised(x0, noise, t), t, schedule.target(x0, noise, t), asked)

    @torch.no_grad()
    def said_by(self, binding: PipelineAdapter, rows: int) -> Said:
        """What the binding's denoiser says, so many rows at a time."""
        device = next(binding.denoiser.parameters()).device
        denoising = self.denoising.over(binding)
        batches = [slice(first, first + rows) for first in range(0, len(self.t), rows)]
        said = [denoising.predict(self.x_t[b].to(device), self.t[b].to(device), self.asked[b]).cpu() for b in batches]
        return torch.cat(said)


def evidence(probe: DenoisingProbe, before: Said, after: Said) -> dict[str, Any]:
    """The mean squared error by quarter of the noise range, now and at the start, and the drift.

    drift: the mean squared change of what the denoiser says, over the mean square of what the start says; None where
    the start says nothing at all.
    """
    moved, size = by_quarter(after - before), by_quarter(before)
    return {
        "loss_by_quarter": by_quarter(after - probe.target).tolist(),
        "start_loss_by_quarter": by_quarter(before - probe.target).tolist(),
        "drift": ratio(moved.sum(), size.sum()),
        "drift_by_quarter": [ratio(one, whole) for one, whole in zip(moved, size, strict=True)],
        "probed": len(before) // QUARTERS,
    }


def by_quarter(difference: torch.Tensor) -> torch.Tensor:
    """(4,) the mean square in each quarter of the noise range, from the clean end on."""
    return difference.double().square().flatten(1).mean(1).reshape(-1, QUARTERS).mean(0)


def ratio(part: torch.Tensor, whole: torch.Tensor) -> float | None:
    return float(part / whole) if whole > 0 else None
