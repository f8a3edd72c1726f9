"""Log-probabilities of completions: teacher-forced, on exact ids, with the head at completion positions only.

Legend: B rows, L columns, T completion tokens of all rows together, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from raftune.arrays import FloatArray
from raftune.errors import OutOfMemory
from raftune.policies.causal_lm.loading import base_of, device_of, evaluating
from raftune.store import partial
from raftune.training.devices import is_out_of_memory, upload

# Logits held in float32 at once while scoring: 64 Mi numbers, a quarter of a GiB.
LOGITS_AT_ONCE = 1 << 26


@dataclass(frozen=True)
class TokenizedCompletion:
    """A prompt with a completion: ids of both (int32), of which the first `start` are the prompt's."""

    ids: npt.NDArray[np.int32]
    start: int

    @classmethod
    def of(cls, prompt: Sequence[int], completion: Sequence[int]) -> TokenizedCompletion:
        return cls(np.array([*prompt, *completion], dtype=np.int32), len(prompt))

    @property
    def tokens(self) -> int:
        """How many tokens the completion has."""
        return len(self.ids) - self.start


class CompletionLogits:
    """Gives the logits that predict completion tokens, without computing those of prompts and padding.

    Where backbone and head of the model can be told apart, and together give bit for bit what the whole model gives on
    a probe, the head sees the T wanted positions only; else the whole model runs and the logits are picked from it.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        inner = base_of(model)
        backbone, head = getattr(inner, "base_model", inner), inner.get_output_embeddings()
        self.parts = (backbone, head) if backbone is not inner and head is not None else None
        if self.parts is None:
            return
        ids_BL = torch.arange(8, device=device_of(model)).reshape(2, 4) % model.config.get_text_config().vocab_size
        inputs = {"input_ids": ids_BL, "attention_mask": torch.ones_like(ids_BL), "use_cache": False}
        try:
            with torch.no_grad(), evaluating(model):
                agree = torch.equal(head(backbone(**inputs)[0]), model(**inputs).logits)
        except (TypeError, RuntimeError, AttributeError, IndexError):
            agree = False
        if not agree:
            self.parts = None

    def hidden(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(T, D) states that predict the completion tokens, or (T, V) logits where the parts cannot be told apart."""
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
        return self.states(**inputs).flatten(0, 1)[batch["positions"]]

    def states(self, **inputs: Any) -> torch.Tensor:
        """(B, L, D) outputs of the backbone, or (B, L, V) logits where the parts cannot be told apart."""
        states: torch.Tensor = self.parts[0](**inputs)[0] if self.parts else self.model(**inputs).logits
        return states

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(T, V) in float32."""
        logits: torch.Tensor = self.parts[1](hidden) if self.parts else hidden
        return logits.float()

    def log_probs(self, hidden_TD: torch.Tensor, targets_T: torch.Tensor) -> FloatArray:
        """(T,) nats, the head applied to a bounded number of positions at a time."""
        at_once = max(1, LOGITS_AT_ONCE // self.model.config.get_text_config().vocab_size)
        losses = [
            F.cross_entropy(self.logits(hidden_TD[i : i + at_once]), targets_T[i : i + at_once], reduction="none")
            for i in range(0, len(targets_T), at_once)
        ]
        return -torch.cat(losses).double().cpu().numpy()


def collate(examples: Sequence[TokenizedCompletion], pad_id: int) -> dict[str, torch.Tensor]:
    """The batch, padded on the right: ids and mask (B, L); each completion token's id and the position before it."""
    width = max(len(e.ids) for e in examples)
    ids_BL = np.full((len(examples), width), pad_id, dtype=np.int64)
    mask_BL = np.zeros((len(examples), width), dtype=np.int64)
    for row, example in enumerate(examples):
        ids_BL[row, : len(example.ids)] = example.ids
        mask_BL[row, : len(example.ids)] = 1
    positions_T = np.concatenate(
        [np.arange(e.start - 1, len(e.ids) - 1) + row * width for row, e in enumerate(examples)]
    )
    targets_T = ids_BL.reshape(-1)[positions_T + 1]
    arrays = {"input_ids": ids_BL, "attention_mask": mask_BL, "positions": positions_T, "targets": targets_T}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def log_probs(model: Any, examples: Sequence[TokenizedCompletion], batch_size: int, pad_id: int) -> FloatArray:
    """(N,) nats: the log-probability of each completion under the model, EOS included, untempered.

    Rows of like length share a batch of `batch_size`; softmax in float32, sums in float64. Raises OutOfMemory.
    """
    reader = CompletionLogits(model)
    order = np.argsort([-len(e.ids) for e in examples], kind="stable").tolist()
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    return summed(model, examples, batches, lambda rows: token_log_probs(reader, rows, pad_id), "log_probs", batch_size)


@torch.no_grad()
def token_log_probs(reader: CompletionLogits, rows: Sequence[TokenizedCompletion], pad_id: int) -> FloatArray:
    """(T,) nats of each completion token of a batch."""
    device = device_of(reader.model)
    batch = {name: upload(tensor, device) for name, tensor in collate(rows, pad_id).items()}
    return reader.log_probs(reader.hidden(batch), batch["targets"])


def summed(
    model: Any,
    examples: Sequence[TokenizedCompletion],
    batches: Sequence[Sequence[int]],
    score: Callable[[Sequence[TokenizedCompletion]], FloatArray],
    kind: str,
    batch_size: int,
) -> FloatArray:
    """(N,) nats of each example. `batches` are indices of examples; `score` gives the nats of a batch's tokens.

    `kind` names the unfinished work, so that one way of scoring never continues another's. Raises OutOfMemory.
    """
    order = [index for batch in batches for index in batch]
    sums = np.zeros(len(examples), dtype=np.float64)
    with evaluating(model), partial.current(kind).work() as part:
        ready = last = 0
        if (path := part.find()) is not None:
            saved = np.load(path)
            sums[order[: len(saved)]] = saved
            ready = len(saved)
        for batch in batches:
            last += len(batch)
            if last <= ready:
                continue
            rows = [examples[i] for i in batch]
            try:
                scores_T = score(rows)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise OutOfMemory(
                    f"sampling.batch_size must fit into the memory of {device_of(model)}; {batch_size} rows did not "
                    "when scored.",
                    batch_size,
                ) from error
            owners_T = np.repeat(np.arange(len(rows)), [row.tokens for row in rows])
            sums[batch] = np.bincount(owners_T, weights=scores_T, minlength=len(rows))

            def save(path: Path, scored: FloatArray = sums[order[:last]]) -> None:
                with path.open("wb") as file:  # np.save would add a suffix to a name
                    np.save(file, scored)

            part.step(save, done=(last, len(order), "samples"))
    return sums
