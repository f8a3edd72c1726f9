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
    loggers = [transformers_logging]
    if "diffusers" in sys.modules:
        loggers.append(sys.modules["diffusers"].utils.logging)
    levels = [(logger, logger.get_verbosity(), logger.is_progress_bar_enabled()) for logger in loggers]
    for logger in loggers:
        logger.set_verbosity_error()
        logger.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level, bars in levels:
            logger.set_verbosity(level)
            if bars:
                logger.enable_progress_bar()
