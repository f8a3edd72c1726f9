"""Silences the output of libraries."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator

from transformers.utils import logging as transformers_logging


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within, transformers, peft and diffusers draw no progress bars and print no warnings; restored afterwards."""
    speakers = [transformers_logging]
    if "diffusers" in sys.modules:  # in use: then it is heard too
        speakers.append(sys.modules["diffusers"].utils.logging)
    levels = [(one, one.get_verbosity(), one.is_progress_bar_enabled()) for one in speakers]
    for one in speakers:
        one.set_verbosity_error()
        one.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level, bars in levels:
            one.set_verbosity(level)
            if bars:
                one.enable_progress_bar()
