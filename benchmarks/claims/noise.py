"""A reward that is nothing but noise: added to another one, it makes that one unreliable."""

from __future__ import annotations

import hashlib
from statistics import NormalDist
from typing import Any


def noise(prompts: list[str], completions: list[str], *, sigma: float, seed: int, **columns: Any) -> list[float]:
    """Gaussian, of this standard deviation; the same completion of the same prompt always gets the same."""
    return [sigma * _gaussian(f"{seed}\0{p}\0{c}") for p, c in zip(prompts, completions, strict=True)]


def _gaussian(text: str) -> float:
    bits = int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
    return NormalDist().inv_cdf((bits + 0.5) / 2**64)
