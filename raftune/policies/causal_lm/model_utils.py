"""Helpers for models that may be wrapped by peft."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache


def base_of(model: Any) -> Any:
    """The transformers model inside a peft model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def device_of(model: Any) -> torch.device:
    """Where token ids go."""
    device: torch.device = model.get_input_embeddings().weight.device
    return device


def context_of(model: nn.Module) -> int | None:
    """The most tokens, prompt and completion together, that the model was made for; None where it does not say."""
    limit = getattr(base_of(model).config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def is_recurrent(model: nn.Module) -> bool:
    """True where a layer carries a state from token to token, or may: padding on the left would enter it."""
    base = base_of(model)
    if getattr(base, "_is_stateful", False):
        return True
    try:
        return any(DynamicCache(config=base.config).is_linear)
    except (AttributeError, KeyError, TypeError, ValueError):
        return True


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards every module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
