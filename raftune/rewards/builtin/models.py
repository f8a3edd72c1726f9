"""Common parts of rewards that are models: options, weights that are read when needed, and their hashes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from raftune.errors import RewardError
from raftune.rewards import fingerprint
from raftune.rewards.registry import BuiltInReward

Dtype = Annotated[Literal["float32", "bfloat16", "float16"], Field(description="Precision of the model's weights.")]
Revision = Annotated[str | None, Field(description="Branch, tag or commit of a hub model.")]
ImageBatch = Annotated[int, Field(description="Images in a forward pass.")]


class HeldWeights(ABC):
    """A model whose weights are read by `prepare` or the first use; one given as an object stays its owner's."""

    has_weights = True
    config: Any
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

    @abstractmethod
    def _unreadable(self, part: str, source: str, error: Exception) -> RewardError: ...

    def _read(self, part: str, reader: Any, source: str, **options: Any) -> Any:
        """What `reader.from_pretrained` reads. Raises RewardError that names the part."""
        from raftune.training.quiet import quiet

        try:
            with quiet():
                return reader.from_pretrained(source, **options)
        except Exception as error:
            raise self._unreadable(part, source, error) from None

    def _read_weights(self, reader: Any, source: str, dtype: str, label: str, **options: Any) -> Any:
        """The model with all its weights, on the CPU. Raises RewardError."""
        import torch

        options |= {"config": self.config, "dtype": getattr(torch, dtype), "use_safetensors": True}
        model, info = self._read("weights", reader, source, output_loading_info=True, **options)
        if missing := sorted(info["missing_keys"]):
            raise RewardError(
                f"{label}: its files lack {missing[0]!r}; its numbers would be random. Fetch the model again."
            )
        return model


class ClipReward(BuiltInReward):
    """A reward of images by the vectors of a ClipModel, which `load` reads."""

    has_weights = True
    clip_model: Any

    def prepare(self) -> None:
        self.clip_model.prepare()

    @property
    def nbytes(self) -> int:
        return int(self.clip_model.nbytes)

    def release(self) -> None:
        self.clip_model.release()


def weights_fingerprint(source: str, config: Any, revision: str | None, model: Any = None) -> str:
    """The hash of a folder's files, a hub model's name and commit, or of the numbers of a model given as an object."""
    if model is not None:
        import torch

        hashes = []
        for key, tensor in sorted(model.state_dict().items()):
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            hashes.append([key, fingerprint.of_bytes(data)])
        return fingerprint.digest(hashes)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return fingerprint.of_folder(folder)
    return f"{source}@{getattr(config, '_commit_hash', None) or revision}"
