"""A custom policy family: a conditional autoencoder that generates digits; its initial model saw wrong labels."""

from __future__ import annotations

import math
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from pydantic import Field
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import Linear, ReLU, Sequential
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot

from raftune.config import ConfigSection, RunConfig, options_of
from raftune.data.images import image_of, png_of, sha256_of_png, why_invalid
from raftune.errors import DataError
from raftune.policies.unsupported import all_but, refuse_unused
from raftune.protocols import Chunk, TrainReport
from raftune.records import Prompt, Sample

FILE, Z = "model.safetensors", 8  # so many numbers stand for an image
DRAW = ("num_generations", "temperature", "batch_size", "chunk_size", "candidate_columns")
FIT = ("learning_rate", "num_train_epochs", "per_device_train_batch_size", "start_from", "replay_rounds", "reference")


class Options(ConfigSection):  # what `policy.options` may hold
    wrong_labels: float = Field(0.3, ge=0, le=1, description="Share of labels that are replaced by random ones.")


class Digits:
    """p(image | digit), through a latent z ~ N(0, 1)."""

    media = "image"
    payload = pa.schema([("completion", pa.binary()), ("image_sha256", pa.string()), ("invalid", pa.string())])

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.config, self.folder = config, folder

    @classmethod
    def start(cls, config: RunConfig, out: Path, model: Any = None, tokenizer: Any = None) -> None:
        """Trains the initial model, or copies it from `policy.model`, the model/ of some round. Raises ConfigError."""
        options = options_of(config, Options)
        unread = all_but(config.sampling, "sampling", DRAW) + all_but(config.training, "training", FIT)
        refuse_unused(config, "digits", unread)
        if config.policy.model is not None:
            shutil.copy(Path(config.policy.model) / FILE, out / FILE)
            return
        (pixels, labels), rng = load_digits(return_X_y=True), np.random.default_rng(0)
        labels = np.where(rng.random(len(labels)) < options.wrong_labels, rng.integers(0, 10, len(labels)), labels)
        x, net = torch.tensor(pixels / 16).float(), Net()
        fit(net, x, torch.tensor(labels), torch.ones(len(x)), epochs=60, batch=64, rate=2e-3, seed=0)
        save_file(net.state_dict(), out / FILE)

    @classmethod
    def load(cls, config: RunConfig, folder: Path, start: Path) -> Digits:
        return cls(config, folder)

    @classmethod
    def verify(cls, start: Path) -> None:
        """The weights are part of the run, whose manifest covers them."""

    @cached_property
    def net(self) -> Net:
        net = Net()  # read when it is first needed
        net.load_state_dict(load_file(self.folder / FILE))
        return net

    @property
    def nbytes(self) -> int:
        return sum(w.nbytes for w in self.net.parameters()) if "net" in self.__dict__ else 0

    def generate(self, chunk: Chunk) -> list[Sample]:
        """One image per seed, which determines z; generated one by one, so that it does not depend on the batch."""
        samples = []
        for prompt, seeds in zip(chunk.prompts, chunk.seeds, strict=True):
            for k, seed in enumerate(seeds):
                p = self.encode_completion(prompt, self.image(prompt, seed), "policy")
                name = chunk.sample_id(prompt, k)
                samples.append(Sample(name, prompt.id, k, "policy", seed, chunk.version, p.pop("completion"), p))
        return samples

    @torch.no_grad()
    def image(self, prompt: Prompt, seed: int) -> Image.Image:
        if prompt.content not in range(10):
            raise DataError(f"a prompt of the digits must be a label in 0 … 9; got {prompt.content!r}.")
        z = torch.randn(1, Z, generator=torch.Generator().manual_seed(seed)) * self.config.sampling.temperature
        levels = torch.sigmoid(self.net.decoder(with_label(z, torch.tensor([prompt.content])))) * 255
        return Image.fromarray(levels.round().reshape(8, 8).numpy().astype(np.uint8))

    def encode_completion(self, prompt: Prompt, answer: Any, source: str) -> dict[str, Any]:
        """The payload of an image, generated or given: a PIL image, or the bytes of a PNG."""
        image = image_of(answer) if isinstance(answer, bytes) else answer
        if image.size != (8, 8):
            raise DataError(f"an image of prompt {prompt.id} must have 8x8 pixels; got {image.size} ({source}).")
        png = png_of(image)
        return {"completion": png, "image_sha256": sha256_of_png(png), "invalid": why_invalid(image)}

    def train(self, rows: Path, work: Path, out: Path) -> TrainReport:
        """Trains on the rows. The training is short, so it saves no checkpoints in `work`."""
        table, training = pq.read_table(rows, columns=["prompt", "weight", "completion"]), self.config.training
        pixels = [np.asarray(image_of(png).convert("L")).reshape(64) for png in table["completion"].to_pylist()]
        x = torch.tensor(np.stack(pixels) / 255).float()
        y, w = (torch.tensor(table[name].to_numpy()) for name in ("prompt", "weight"))
        how = {"epochs": training.num_train_epochs, "rate": training.learning_rate}
        losses = fit(self.net, x, y, w, batch=training.per_device_train_batch_size, seed=self.config.seed, **how)
        save_file(self.net.state_dict(), out / FILE)
        return TrainReport(rows=len(x), steps=len(losses), losses=tuple(losses))

    def notes(self) -> tuple[str, ...]:
        return ()


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Sequential(Linear(64 + 10, 128), ReLU(), Linear(128, 2 * Z))
        self.decoder = Sequential(Linear(Z + 10, 128), ReLU(), Linear(128, 64))
        for seed, weight in enumerate(self.parameters()):
            torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(seed))


def with_label(values: Tensor, labels: Tensor) -> Tensor:
    return torch.cat([values, one_hot(labels, 10)], 1)


def fit(net: Net, x: Tensor, y: Tensor, w: Tensor, *, epochs: float, batch: int, rate: float, seed: int) -> list[float]:
    """Maximises the weighted evidence lower bound; the loss of each step, nats an image."""
    generator = torch.Generator().manual_seed(seed)
    optimizer, losses = torch.optim.Adam(net.parameters(), lr=rate), []
    for _ in range(math.ceil(epochs * len(x) / batch)):
        rows = torch.multinomial(w, batch, replacement=True, generator=generator)
        mean, log_sd = net.encoder(with_label(x[rows], y[rows])).chunk(2, 1)
        z = mean + log_sd.exp() * torch.randn(mean.shape, generator=generator)
        missed = binary_cross_entropy_with_logits(net.decoder(with_label(z, y[rows])), x[rows], reduction="sum")
        loss = (missed + (mean**2 / 2 + (2 * log_sd).exp() / 2 - log_sd - 0.5).sum()) / batch
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return losses
