"""How every bundled model is trained: AdamW, a short warm-up, a cosine. Needs torch."""

import math

import numpy as np
import torch


def emit(line: str) -> None:
    print(line, flush=True)


class Optimizer:
    """AdamW on one model, with a short warm-up and a cosine down to a fiftieth of the rate; says how the loss falls."""

    def __init__(self, name: str, model: torch.nn.Module, rate: float, steps: int) -> None:
        self.name, self.model = name, model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: rate_factor(step, steps))
        self.step = 0
        self.recent: list[float] = []

    def advance(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        self.recent.append(loss.item())
        if self.step % 100 == 0:
            emit(f"{self.name} step {self.step}: loss {np.mean(self.recent):.4f}")
            self.recent.clear()


def rate_factor(step: int, steps: int) -> float:
    """The share of the full rate at a step."""
    warm = max(1, min(100, steps // 10))
    progress = min(1.0, max(0, step - warm) / max(1, steps - warm))
    return min((step + 1) / warm, 0.02 + 0.49 * (1 + math.cos(math.pi * progress)))
