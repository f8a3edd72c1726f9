"""Parity check: compares a backend's log-probabilities with those of the weight probe.

A model that is loaded to generate replays the probe's ids through the code that generates (merged weights, shared
prefix, batches) and must come close to the trained model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from raftune.arrays import IntArray
from raftune.errors import ModelError
from raftune.policies.causal_lm.sampling.completions import CompletionBatch
from raftune.policies.causal_lm.sampling.token_choice import SamplingParams
from raftune.policies.causal_lm.weight_probe import WeightProbe

COPIES = 2  # rows of each prompt in a replay: they share the prompt's keys, or a batch that holds equal rows


class TokenReplay(CompletionBatch):
    """Rows that take the probe's ids, whatever the logits say, and record their log-probabilities."""

    def __init__(self, probe: WeightProbe, pad_id: int, rows: int) -> None:
        longest = max(map(len, probe.completions))
        settings = SamplingParams(max_completion_length=longest, pad_id=pad_id, batch_size=rows)
        super().__init__(None, probe.prompts, [[0] * COPIES for _ in probe.prompts], settings, None)
        self.limits = np.array([len(ids) for ids in probe.completions])[self.prompt_of]
        self._replayed = probe.completions

    def _pick(
        self, rows: IntArray, ahead: int, logits: Tensor, noise: Tensor, seen: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        at = self._lengths[rows] + ahead
        ids = [self._replayed[self.prompt_of[row]][column] for row, column in zip(rows, at, strict=True)]
        tokens = torch.tensor(ids, device=logits.device)
        return tokens, logits.float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]


def check_parity(probe: WeightProbe, log_probs: Sequence[Sequence[float]], how: str) -> None:
    """Raises ModelError where these are not the log-probs of the trained model; `how` says where they come from."""
    distance = probe.distance(log_probs)
    if distance > probe.allowed:
        raise ModelError(
            f"what generates must be the model that was trained; {how}, it differs from what training ended with by "
            f"{distance:.2g} nats a token on the same tokens, and {probe.allowed:.2g} are allowed. Nothing was "
            "generated: try policy.dtype float32, other policy.adapter.target_modules or no adapter, and report the "
            "architecture."
        )
