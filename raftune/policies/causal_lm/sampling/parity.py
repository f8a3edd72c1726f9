"""Parity check: compares a backend's log-probabilities with a forward pass of the model.

Training writes a probe beside the weights: token ids from its own rows with the trained model's log-probability of each
completion token, from a plain forward of one row at a time. A model that is loaded to generate replays the probe's ids
through the code that generates (merged weights, shared prefix, batches) and must come close. How close is measured in
nats per token, against the noise that the trained model itself shows when its rows share a batch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from raftune.arrays import BoolArray, IntArray
from raftune.errors import ModelError
from raftune.policies.causal_lm.likelihood import CompletionLogits, TokenizedCompletion, token_log_probs
from raftune.policies.causal_lm.loading import PROBE, evaluating, merged
from raftune.policies.causal_lm.sampling.completions import CompletionBatch
from raftune.policies.causal_lm.sampling.token_choice import SamplingParams
from raftune.store.files import dump_json

ROWS, PROMPT_TOKENS, COMPLETION_TOKENS = 4, 256, 16  # of a probe, at most
COPIES = 2  # rows of each prompt in a replay: they share the prompt's keys, or a batch that holds equal rows
COPIES_IN_HALF = 8  # of each row in the batch that noise is measured in: 16-bit kernels change with the batch's size
# Nats a token that are allowed in any case, and that are never exceeded, however noisy the model is.
LIMITS = {"float64": (1e-4, 1e-2), "float32": (1e-3, 1e-2)}
LIMITS_IN_HALF = (0.1, 0.4)
TIMES_NOISE = 4.0
LOST_IN_MERGING = 0.05  # of what an adapter learned, at most, where it is merged into 16-bit weights


@dataclass(frozen=True)
class ParityProbe:
    """Fixed ids, and the trained model's log-probabilities.

    `log_probs` are nats of each completion token. `noise` is the mean distance (nats a token) of the same model's
    log-probs when the rows share one padded batch. `merge` says whether an adapter may be merged for generation.
    """

    prompts: list[list[int]]
    completions: list[list[int]]
    log_probs: list[list[float]]
    noise: float
    dtype: str
    merge: bool = True

    @property
    def allowed(self) -> float:
        """Nats a token by which generation may differ from the trained model."""
        floor, ceiling = LIMITS.get(self.dtype, LIMITS_IN_HALF)
        return min(max(floor, TIMES_NOISE * self.noise), ceiling)

    def distance(self, log_probs: Sequence[Sequence[float]]) -> float:
        """Mean absolute difference in nats a token of the worst copy; rows are prompt by prompt, copies side by side.

        Infinite where a log-probability is not a number.
        """
        copies, expected = len(log_probs) // len(self.log_probs), np.concatenate(self.log_probs)
        means = [float(np.abs(np.concatenate(log_probs[copy::copies]) - expected).mean()) for copy in range(copies)]
        return max(mean if np.isfinite(mean) else float("inf") for mean in means)

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        dump_json(folder / PROBE, asdict(self))

    @property
    def examples(self) -> list[TokenizedCompletion]:
        return [TokenizedCompletion.of(*row) for row in zip(self.prompts, self.completions, strict=True)]


def read_probe(folder: Path) -> ParityProbe | None:
    """The probe beside a round's weights; None for a model that was not trained here."""
    path = folder / PROBE
    return ParityProbe(**json.loads(path.read_text())) if path.is_file() else None


def rows_of_prompts(prompts: Sequence[Sequence[int]]) -> list[TokenizedCompletion]:
    """Rows for a model that has no completions yet: the last tokens of a prompt stand for one."""
    rows = []
    for prompt in prompts[:ROWS]:
        ids = list(prompt[-PROMPT_TOKENS:])
        ids = ids if len(ids) > 3 else ids * 4
        cut = min(8, len(ids) // 2)
        rows.append(TokenizedCompletion.of(ids[:-cut], ids[-cut:]))
    return rows


def measure(model: Any, rows: Sequence[TokenizedCompletion], pad_id: int) -> ParityProbe:
    """The probe of these rows under this model."""
    alone = plain_log_probs(model, rows, pad_id)
    dtype = str(model.dtype).removeprefix("torch.")
    copies = COPIES if dtype in LIMITS else COPIES_IN_HALF
    with evaluating(model):
        together = token_log_probs(CompletionLogits(model), [row for row in rows for _ in range(copies)], pad_id)
    noise = np.abs(together - np.concatenate([row for row in alone for _ in range(copies)])).mean()
    prompts = [row.ids[: row.start].tolist() for row in rows]
    completions = [row.ids[row.start :].tolist() for row in rows]
    return ParityProbe(prompts, completions, alone, float(noise), dtype)


def probe_of_fit(model: Any, examples: Sequence[TokenizedCompletion], pad_id: int) -> ParityProbe:
    """The probe of a model that was just trained on these rows. It must be saved already: its adapter may be merged.

    Its rows have bounded length: those with the longest completions and, of these, the shortest prompts.
    """

    def order(index: int) -> tuple[int, int, int]:
        return -min(examples[index].tokens, COMPLETION_TOKENS), examples[index].start, index

    rows: dict[tuple[int, ...], TokenizedCompletion] = {}
    for index in sorted(range(len(examples)), key=order):
        start = examples[index].start
        first = max(0, start - PROMPT_TOKENS)
        ids = examples[index].ids[first : start + COMPLETION_TOKENS]
        rows.setdefault(tuple(ids.tolist()), TokenizedCompletion(ids, start - first))
        if len(rows) == ROWS:
            break
    probe = measure(model, list(rows.values()), pad_id)
    if not isinstance(model, PeftModel) or probe.dtype in LIMITS:
        return probe
    merge = adapter_survives_merging(model)
    if merge:
        merge = probe.distance(plain_log_probs(merged(model), probe.examples, pad_id)) <= probe.allowed / 2
    return replace(probe, merge=merge)


@torch.no_grad()
def adapter_survives_merging(model: Any) -> bool:
    """Whether 16-bit weights can hold what the adapter learned.

    A change below half a unit in the last place of the weight that it is added to is rounded away. Over all adapted
    layers, the rounded sum must hold the adapter's change at its full length, along its own direction.
    """
    kept = total = 0.0
    for layer in model.modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        weight = getattr(layer.get_base_layer(), "weight", None)
        if weight is None or not hasattr(layer, "get_delta_weight"):
            return False
        if weight.dtype not in (torch.bfloat16, torch.float16):
            return False
        for name in layer.active_adapters:
            delta = layer.get_delta_weight(name).float()
            change = (weight.float() + delta).to(weight.dtype).float() - weight.float()
            kept, total = kept + float((change * delta).sum()), total + float((delta * delta).sum())
    return total > 0 and abs(kept / total - 1) <= LOST_IN_MERGING


def plain_log_probs(model: Any, rows: Sequence[TokenizedCompletion], pad_id: int) -> list[list[float]]:
    """Nats of each completion token, from a forward of one row at a time without any cache."""
    with evaluating(model):
        reader = CompletionLogits(model)
        return [token_log_probs(reader, [row], pad_id).tolist() for row in rows]


class TokenReplay(CompletionBatch):
    """Rows that take the probe's ids, whatever the logits say, and record their log-probabilities."""

    def __init__(self, probe: ParityProbe, pad_id: int, rows: int) -> None:
        longest = max(map(len, probe.completions))
        settings = SamplingParams(max_completion_length=longest, pad_id=pad_id, batch_size=rows)
        super().__init__(None, probe.prompts, [[0] * COPIES for _ in probe.prompts], settings, None)
        self.limits = np.array([len(ids) for ids in probe.completions])[self.prompt_of]
        self._replayed = probe.completions

    def extend(self, rows: IntArray, logits: Tensor) -> tuple[Tensor, BoolArray]:
        at = self._lengths[rows]
        ids = [self._replayed[self.prompt_of[row]][column] for row, column in zip(rows, at, strict=True)]
        tokens = torch.tensor(ids, device=logits.device)
        log_probs = logits.float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        self._write(rows, tokens.cpu().numpy(), log_probs.cpu().numpy())
        return tokens, self._finish[rows] != 0


def check_parity(probe: ParityProbe, log_probs: Sequence[Sequence[float]], how: str) -> None:
    """Raises ModelError where these are not the log-probs of the trained model; `how` says where they come from."""
    distance = probe.distance(log_probs)
    if distance > probe.allowed:
        raise ModelError(
            f"what generates must be the model that was trained; {how}, it differs from what training ended with by "
            f"{distance:.2g} nats a token on the same tokens, and {probe.allowed:.2g} are allowed. Nothing was "
            "generated: try policy.dtype float32, other policy.adapter.target_modules or no adapter, and report the "
            "architecture."
        )
