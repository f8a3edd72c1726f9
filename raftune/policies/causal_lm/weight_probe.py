"""The weight probe: token ids with a trained model's log-probabilities, written beside its weights.

Training writes it from its own rows: the log-probability of each completion token from a plain forward of one row at a
time, by the trained model and by the model before. What is to generate (merged weights, a shared prefix, an inference
server) gives its own log-probabilities of the ids, and must come close to the trained model's. How close is measured in
nats per token, against the noise that the trained model itself shows when its rows share a batch.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from raftune.policies.causal_lm.likelihood import CompletionLogits, TokenizedCompletion, token_log_probs
from raftune.policies.causal_lm.loading import PROBE, arithmetic_of, evaluating, merged
from raftune.store.files import dump_json

ROWS, PROMPT_TOKENS, COMPLETION_TOKENS = 4, 256, 16  # of a probe, at most
COPIES, COPIES_IN_HALF = 2, 8  # of each row in the batch that noise is measured in: 16-bit kernels depend on its size
# Nats a token that are allowed in any case, and that are never exceeded, however noisy the model is.
LIMITS = {"float64": (1e-4, 1e-2), "float32": (1e-3, 1e-2)}
LIMITS_IN_HALF = (0.1, 0.4)
TIMES_NOISE = 4.0
LOST_IN_MERGING = 0.05  # of what an adapter learned, at most, where it is merged into 16-bit weights
SURE = 3.0  # standard errors between what is served and the middle between the weights before and after training
CANNOT_TELL = "it cannot be told"


@dataclass(frozen=True)
class WeightProbe:
    """Fixed ids, and the trained model's log-probabilities.

    `log_probs` are nats of each completion token; `before` the same under the model of the round before, None where
    there is none, empty where training started from another model. `noise` is the mean distance (nats a token) of the
    same model's log-probs when the rows share one padded batch. `merge` says whether an adapter may be merged for
    generation.
    """

    prompts: list[list[int]]
    completions: list[list[int]]
    log_probs: list[list[float]]
    noise: float
    dtype: str
    merge: bool = True
    before: list[list[float]] | None = None

    @property
    def ids(self) -> list[list[int]]:
        """The rows that a server is asked for: prompt and completion."""
        return [prompt + completion for prompt, completion in zip(self.prompts, self.completions, strict=True)]

    @property
    def allowed(self) -> float:
        """Nats a token by which generation may differ from the trained model."""
        return self._allowed(self.dtype)

    def _allowed(self, dtype: str) -> float:
        floor, ceiling = max(LIMITS.get(name, LIMITS_IN_HALF) for name in (dtype, self.dtype))
        return min(max(floor, TIMES_NOISE * self.noise), ceiling)

    def check(self, log_probs: Sequence[Sequence[float]], dtype: str) -> str:
        """Empty where a server that computes in `dtype` serves these weights; else the fault, with its distance.

        `log_probs`: for each row of `ids`, nats of its tokens, of which the last ones count, those of the completion.
        The noise of 16 bits can exceed what a round of training changes. So the served numbers are also placed on the
        line from the model before training (0) to the trained one (1), and must lie on the trained one's side by SURE
        standard errors. Where they lie on neither side, the fault begins with CANNOT_TELL: a server that was just
        started from this folder has these weights, any other has to be restarted.
        """
        counts = [len(row) for row in self.log_probs]
        if len(log_probs) != len(counts) or any(map(operator.lt, map(len, log_probs), counts)):
            return "it did not give a log-probability for each token of each row"
        served = np.array([nats for row, n in zip(log_probs, counts, strict=True) for nats in row[-n:]], np.float64)
        after, allowed = np.concatenate(self.log_probs), self._allowed(dtype)
        distance = float(np.abs(served - after).mean())
        fault = f"it differs from what training ended with by {distance:.2g} nats a token on the same tokens"
        if self.before == [] and distance <= allowed and {dtype, self.dtype} - LIMITS.keys():
            return f"{CANNOT_TELL} whether it serves this round's model or the one before: that is not in the probe"
        before = np.concatenate(self.before or self.log_probs)
        change, moved = after - before, served - before
        length = float(np.linalg.norm(change))
        if not length or not np.isfinite(distance):
            return "" if distance <= allowed else f"{fault}, and {allowed:.2g} are allowed"
        place = float(moved @ change) / length**2
        noise = max(float(np.sqrt(np.mean((moved - place * change) ** 2))), self.noise)
        if (0.5 - place) * length > SURE * noise:
            return (
                f"{fault}, and from the model before that training by {np.abs(moved).mean():.2g}: it is nearer to that"
            )
        if distance > allowed:
            return f"{fault}, and {allowed:.2g} are allowed"
        if (place - 0.5) * length <= SURE * noise:
            hidden = f"training changed them by {np.abs(change).mean():.2g} and rounding hides that"
            return f"{CANNOT_TELL} whether it serves this round's model or the one before: {fault[3:]}, {hidden}"
        return ""

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


def read_probe(folder: Path) -> WeightProbe | None:
    """The probe beside a round's weights; None for a model that was not trained here."""
    path = folder / PROBE
    return WeightProbe(**json.loads(path.read_text())) if path.is_file() else None


def rows_of_prompts(prompts: Sequence[Sequence[int]]) -> list[TokenizedCompletion]:
    """Rows for a model that has no completions yet: the last tokens of a prompt stand for one."""
    rows = []
    for prompt in prompts[:ROWS]:
        ids = list(prompt[-PROMPT_TOKENS:])
        ids = ids if len(ids) > 3 else ids * 4
        cut = min(8, len(ids) // 2)
        rows.append(TokenizedCompletion.of(ids[:-cut], ids[-cut:]))
    return rows


def measure(model: Any, rows: Sequence[TokenizedCompletion], pad_id: int) -> WeightProbe:
    """The probe of these rows under this model."""
    alone = plain_log_probs(model, rows, pad_id)
    dtype = arithmetic_of(model)
    copies = COPIES if dtype in LIMITS else COPIES_IN_HALF
    with evaluating(model):
        together = token_log_probs(CompletionLogits(model), [row for row in rows for _ in range(copies)], pad_id)
    noise = np.abs(together - np.concatenate([row for row in alone for _ in range(copies)])).mean()
    prompts = [row.ids[: row.start].tolist() for row in rows]
    completions = [row.ids[row.start :].tolist() for row in rows]
    return WeightProbe(prompts, completions, alone, float(noise), dtype)


def probe_rows(examples: Sequence[TokenizedCompletion]) -> list[TokenizedCompletion]:
    """The training rows for a probe: those with the longest completions and, of these, the shortest prompts, cut."""

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
    return list(rows.values())


def probe_of_fit(
    model: Any, rows: Sequence[TokenizedCompletion], before: list[list[float]] | None, pad_id: int
) -> WeightProbe:
    """The probe of a model that was just trained, on rows of its training; `before` are their log-probs under the model
    that the training started from. The model must be saved already: its adapter may be merged.
    """
    probe = replace(measure(model, rows, pad_id), before=before)
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
