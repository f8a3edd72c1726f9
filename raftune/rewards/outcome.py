"""The outcome of a reward call: a value or a failure status for each sample; counts of failures."""

from __future__ import annotations

import asyncio
import errno
import inspect
import itertools
import math
import numbers
import os
import re
import sysconfig
import traceback
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from types import GeneratorType
from typing import Any

import numpy as np

from raftune.config.secrets import masked
from raftune.data.classifier_inputs import text_of
from raftune.records import RewardPart, ScoreStatus
from raftune.rewards.batch import RewardBatch, RewardLog, is_image, keywords
from raftune.store.interruption import interrupting

# Code that is not the user's: raftune's own, the standard library's, what is installed.
FOLDERS = (str(Path(__file__).parents[1]), *map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib")))
NOT_OF_USERS = ("<", *(f"{folder}{os.sep}" for folder in FOLDERS))
LONGEST_DETAIL = 300
REAL = (numbers.Real, Decimal)
LISTS = (Sequence, deque, GeneratorType, map)  # what gives its values in the order in which they were made
FAILED = frozenset({ScoreStatus.ERROR, ScoreStatus.TIMEOUT, ScoreStatus.INVALID})
LACKS = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO}


@dataclass(frozen=True, slots=True)
class RewardOutcome:
    """One part per sample, and what the reward logged."""

    parts: list[RewardPart]
    log: RewardLog = field(default_factory=RewardLog)
    returned: int | None = None  # how many values came back, where they could be counted

    @property
    def failed(self) -> bool:
        """True where the call as a whole came to nothing, so that another call may help."""
        return any(part.status in (ScoreStatus.ERROR, ScoreStatus.TIMEOUT) for part in self.parts)

    def as_dict(self) -> dict[str, Any]:
        """The outcome as JSON has it; `from_dict` gives it back."""
        parts = [[p.value, p.status.value, p.detail.encode("utf-8", "replace").decode()] for p in self.parts]
        return {"parts": parts, "log": [self.log.metrics, self.log.columns], "returned": self.returned}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> RewardOutcome:
        log = RewardLog()
        log.metrics, log.columns = plain["log"]
        parts = [RewardPart(value, ScoreStatus(status), detail) for value, status, detail in plain["parts"]]
        return cls(parts, log, plain["returned"])


def same_for_all(status: ScoreStatus, detail: str, size: int, returned: int | None = None) -> RewardOutcome:
    """The same part for every sample of the call."""
    return RewardOutcome([RewardPart(None, status, detail)] * size, returned=returned)


def one_line(error: BaseException) -> str:
    """Type and message of an error in one line, without memory addresses: equal failures read equal."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # an error of a person's own whose text cannot be made
        text = ""
    text = masked(f"{type(error).__name__}: {text}" if text else type(error).__name__)
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", text)
    return text if len(text) <= LONGEST_DETAIL else text[: LONGEST_DETAIL - 1] + "…"


def hub_error(error: BaseException) -> str:
    """Why a hub name did not load, in one line: transformers itself writes a page about connections and tokens."""
    text = one_line(error)
    if "connect" in text or "offline" in text.lower():
        return "the hub cannot be reached, and its cache has no such model"
    if "valid model identifier" in text:
        return "the hub has no such model"
    return text.rstrip(".")


def location(error: BaseException) -> str:
    """File and line of the user's code that the error came out of, in brackets; empty where it met none."""
    text = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        if not frame.f_code.co_filename.startswith(NOT_OF_USERS):
            text = f" ({Path(frame.f_code.co_filename).name}, line {line})"
    return text


def judge(output: Any, size: int, log: RewardLog) -> RewardOutcome:
    """The parts that a reward's return value stands for; its values are numbers, or None for "not applicable"."""
    values = _as_list(output, size)
    if values is None:
        hint = ": is a `return` missing?" if output is None else ""
        kind = "None" if output is None else f"{type(output).__name__} {_shown(output)}"
        return same_for_all(ScoreStatus.INVALID, f"returned {kind}, not a list of {size} numbers{hint}", size)
    if len(values) != size:
        more = "more than " if isinstance(output, GeneratorType | map) and len(values) > size else ""
        count = size if more else len(values)
        return same_for_all(
            ScoreStatus.INVALID, f"returned {more}{count} values for {size} completions", size, len(values)
        )
    return RewardOutcome([_part(value) for value in values], log, len(values))


def attempt(reward: Any, batch: RewardBatch, *, main_thread: bool = False) -> RewardOutcome:
    """The outcome of one call in this thread; whatever the reward raises, SystemExit included, becomes a status.

    main_thread: a built-in reward model, on the main thread of a run, where Python delivers signals; KeyboardInterrupt,
    SystemExit and what a signal handler raised are raised again there, also if code turned them into another error.
    """
    log = RewardLog()
    try:
        output = reward(**keywords(batch, log))
        if inspect.isawaitable(output):
            output = asyncio.run(_awaited(output))
        return judge(output, len(batch), log)
    except BaseException as error:
        if main_thread and (stop := interrupting(error)) is not None:
            if stop is not error and isinstance(stop, KeyboardInterrupt | SystemExit):
                raise KeyboardInterrupt from error
            raise stop from stop.__cause__
        return failure(error, len(batch), main_thread)


async def attempt_async(reward: Any, batch: RewardBatch) -> RewardOutcome:
    """As `attempt`, for a reward that is awaited."""
    log = RewardLog()
    try:
        return judge(await reward(**keywords(batch, log)), len(batch), log)
    except BaseException as error:
        return failure(error, len(batch))


async def _awaited(output: Any) -> Any:
    return await output


def failure(error: BaseException, size: int, main_thread: bool = False) -> RewardOutcome:
    """The outcome of a call that raised this error, which is raised again if the machine failed: a full disk, no more
    files or processes. A lack of memory counts only in a built-in reward model: a user's own code may ask for more than
    there is, again and again."""
    lacks_memory = isinstance(error, MemoryError) or type(error).__name__ in ("OutOfMemoryError", "AcceleratorError")
    if (isinstance(error, OSError) and error.errno in LACKS) or (main_thread and lacks_memory):
        raise error
    return same_for_all(ScoreStatus.ERROR, one_line(error) + location(error), size)


def _as_list(output: Any, size: int) -> list[Any] | None:
    """The values of a list, tuple or other sequence, of a generator, and of what has one dimension: an array or tensor
    (also as one column), a Series of pandas or polars, an Arrow array. None for all else, a set and a dict above all.
    """
    try:
        for reader in ("to_pylist", "to_list"):  # Arrow; polars and pandas
            if callable(read := getattr(output, reader, None)) and not isinstance(output, type):
                values = read()
                return values if isinstance(values, list) else None
        if hasattr(output, "tolist") and hasattr(output, "shape"):
            if _is_time(output) or tuple(output.shape[1:]) not in ((), (1,)) or not output.shape:
                return None
            values = output.tolist()
            if len(output.shape) == 2:
                values = [row[0] for row in values]
            if isinstance(output, np.ma.MaskedArray):  # the numbers beneath a mask are anything
                mask = np.ma.getmaskarray(output).reshape(-1).tolist()
                values = [np.ma.masked if hidden else value for value, hidden in zip(values, mask, strict=True)]
            return list(values)
    except (TypeError, ValueError, RuntimeError, NotImplementedError):  # such as of a sparse tensor
        return None
    if isinstance(output, str | bytes | bytearray | memoryview) or not isinstance(output, LISTS):
        return None
    if isinstance(output, GeneratorType | map):
        return list(itertools.islice(output, size + 1))  # it may have no end
    return list(output)


def _is_time(value: Any) -> bool:
    """True of numpy's dates and durations, which turn into integers when they are read."""
    return getattr(getattr(value, "dtype", None), "kind", "") in ("m", "M")


def _part(value: Any) -> RewardPart:
    """Booleans count as 0 and 1; numpy and torch scalars, and tensors of one element, as their number."""
    if value is None:
        return RewardPart(None, ScoreStatus.NOT_APPLICABLE)
    number = value
    if _is_time(value) or (isinstance(value, np.ma.MaskedArray) and np.ma.getmaskarray(value).any()):
        number = None
    elif not isinstance(value, REAL) and hasattr(value, "item") and getattr(value, "size", None) != 0:
        try:
            number = value.item()
        except (ValueError, RuntimeError, TypeError):
            number = None
    if not isinstance(number, REAL):
        return RewardPart(None, ScoreStatus.INVALID, f"returned {type(value).__name__} {_shown(value)}, not a number")
    try:
        number = float(number)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        return RewardPart(None, ScoreStatus.INVALID, f"returned {number}, not a finite number")
    return RewardPart(number, ScoreStatus.OK)


def _shown(value: Any) -> str:
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", masked(" ".join(repr(value).split())))
    return text if len(text) <= 60 else text[:59] + "…"


def excerpt(content: Any, length: int = 80) -> str:
    """The beginning of a text or of the last message, in one line; of an image its size."""
    if is_image(content):
        return f"an image of {content.width} x {content.height} pixels"
    if isinstance(content, list):
        content = text_of(content[-1:])
    flat = " ".join((content if isinstance(content, str) else repr(content)).split())
    return flat if len(flat) <= length else flat[: length - 1] + "…"
