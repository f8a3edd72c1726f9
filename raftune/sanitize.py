"""Removes control characters from untrusted text."""

from __future__ import annotations

import difflib
import os
import shlex
import subprocess
import unicodedata
from collections.abc import Iterable
from pathlib import PurePath

_BIDI = frozenset(map(chr, (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))))


def harmless(text: str) -> str:
    """The text with control characters, direction overrides and lone surrogates as visible escapes; tabs as blanks."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_visible, text))


def one_line(text: str, width: int | None = None) -> str:
    """The text on one line, line ends as ⏎; cut to `width` characters, the last of them an ellipsis."""
    flat = harmless(text.strip().replace("\r\n", "\n").replace("\n", " ⏎ "))
    return flat if width is None or len(flat) <= width else flat[: max(width - 1, 0)] + "…"


def first_line(error: BaseException) -> str:
    """An error's first line, which is all that a message to the user has room for."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def shell_command(*words: object) -> str:
    """The words as a command line that can be pasted into a shell, quoted where they need it."""
    # a path that begins like a flag would be taken for one
    texts = [f"./{word}" if isinstance(word, PurePath) and str(word).startswith("-") else str(word) for word in words]
    return subprocess.list2cmdline(texts) if os.name == "nt" else shlex.join(texts)


def counted(number: int, noun: str, nouns: str | None = None) -> str:
    """The number with its noun: 1 prompt, 12,800 prompts."""
    return f"{number:,} {noun if number == 1 else nouns or f'{noun}s'}"


def _visible(char: str) -> str:
    if char == "\n":
        return char
    if char == "\t":
        return "    "
    if char in _BIDI or unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp"):
        return f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}"
    return char


def percent(share: float, digits: int = 0) -> str:
    """A share in per cent: 82 %, or 81.9 % with one digit."""
    return f"{100 * share:.{digits}f} %"


def duration(seconds: float) -> str:
    """Seconds in the chunk that a person would use: 0.8 s, 42 s, 3 min 10 s, 2 h 05 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def megabytes(size: float) -> str:
    """A number of bytes in the chunk that a person would use."""
    for chunk in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {chunk}" if chunk == "bytes" or size >= 100 else f"{size:.1f} {chunk}"
        size /= 1000
    return f"{size:.1f} TB"


def did_you_mean(name: str, names: Iterable[str], otherwise: str, cutoff: float = 0.6) -> str:
    """The question after the name that was probably meant; `otherwise` if none is similar."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)
    return f"did you mean {close[0]!r}?" if close else otherwise
