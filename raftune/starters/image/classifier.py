"""The network of the image judge: one classification head for each attribute."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from raftune.arrays import IntArray
from raftune.starters.image.images import ATTRIBUTES, Pixels

COUNTS = tuple(len(words) for words in ATTRIBUTES.values())


class SceneClassifier(nn.Module):
    """Three strided convolutions and a linear layer: (N, 3, 32, 32) in -1…1 to (N, 19) logits, 8 + 4 + 4 + 3."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, width, 3, 2, 1), nn.GroupNorm(4, width), nn.SiLU()),
            *(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.GroupNorm(4, 2 * width), nn.SiLU()),
            *(nn.Conv2d(2 * width, 2 * width, 3, 2, 1), nn.GroupNorm(4, 2 * width), nn.SiLU()),
        )
        self.heads = nn.Linear(2 * width * 16, sum(COUNTS))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.heads(self.body(pixels).flatten(1))
        return logits

    @torch.no_grad()
    def labels(self, pixels_NHW3: Pixels) -> IntArray:
        """(N, 4): the index of the likeliest word of each attribute, for pictures of 32 x 32 in 0…1."""
        x = torch.from_numpy(np.ascontiguousarray(pixels_NHW3)).permute(0, 3, 1, 2) * 2 - 1
        logits = torch.cat([self(part) for part in torch.split(x, 512)])
        return np.stack([part.argmax(1).numpy() for part in torch.split(logits, list(COUNTS), 1)], axis=1)

    @classmethod
    def load(cls, folder: Path) -> "SceneClassifier":
        model = cls(json.loads((folder / "config.json").read_text())["width"])
        model.load_state_dict({name: value.float() for name, value in load_file(folder / "model.safetensors").items()})
        return model.eval()
