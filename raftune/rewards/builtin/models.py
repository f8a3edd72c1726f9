"""Helpers of rewards that are models: weights read when needed, and their hashes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch

from raftune.rewards import fingerprint


class HeldWeights(ABC):
    """A model whose weights are read by `prepare` or the first use; one given as an object stays its owner's."""

    _given: Any
    _model: Any = None

    def prepare(self) -> None:
        """Reads the weights, unless they are here: may take longer than a call is given."""
        if self._model is None:
            self._model = (self._read_model() if self._given is None else self._given).eval()

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that are held now; 0 before they are read."""
        return 0 if self._model is None else sum(weight.nbytes for weight in self._model.parameters())

    def release(self) -> None:
        """Frees the weights; the next call reads them again."""
        self._model = None

    @abstractmethod
    def _read_model(self) -> Any: ...


def weights_fingerprint(source: str, config: Any, revision: str | None, model: Any = None) -> str:
    """The hash of a folder's files, a hub model's name and commit, or of the numbers of a model given as an object."""
    if model is not None:
        state = sorted(model.state_dict().items())
        return fingerprint.digest([[key, fingerprint.of_bytes(_bytes(tensor))] for key, tensor in state])
    folder = Path(source).expanduser()
    if folder.is_dir():
        return fingerprint.of_folder(folder)
    return f"{source}@{getattr(config, '_commit_hash', None) or revision}"


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
