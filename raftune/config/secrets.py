"""Secrets in a configuration: read from the environment; never shown, hashed or published.

`${NAME}` (capitals, digits, _) in an option is the value of that environment variable when the reward is loaded;
`$${NAME}` is the text itself. Everywhere else it stays `${NAME}`. A secret that was written in plain is hidden wherever
a configuration is shown.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from raftune.errors import ConfigError

HIDDEN = "***"
REFERENCE = re.compile(r"\$(\$?)\{([A-Z][A-Z0-9_]*)\}")
NAMES = re.compile(
    r"(?:^|[_\-.])(?:api[_-]?key|apikey|access[_-]?key|secret[_-]?key|private[_-]?key|auth[_-]?key|(?:access|auth|api|hf|hub|"
    r"bearer|refresh|id|session)[_-]?token|secret|password|passwd|passphrase|authorization|credentials?|bearer)$"
    r"|^(?:key|token|auth|x-api-key|sig|signature)$",
    re.IGNORECASE,
)
VALUES = re.compile(
    r"^(?:sk-|hf_|gh[pousr]_|github_pat_|glpat-|xox[a-z]-|AKIA|AIza|eyJ[A-Za-z0-9_-]{10,}\.|Bearer |Basic )\S{8,}"
)
QUERY = re.compile(r"([?&]([^=&#\s]+)=)([^&#\s]*)")
PASSWORD = re.compile(r"(\w+://[^/\s:@]*:)([^/\s@]+)(@)")
SHORTEST = 8  # characters of a secret; shorter texts, such as "</s>", are none

_KNOWN: dict[str, str] = {}  # the secrets of this process, each with the text that is shown for it


def expanded(value: Any, field: str) -> Any:
    """The value with `${NAME}` replaced, at any depth. Raises ConfigError for a variable that is not set."""
    if isinstance(value, dict):
        return {name: expanded(inner, f"{field}.{name}") for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [expanded(inner, field) for inner in value]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        escaped, name = match.groups()
        if escaped:
            return match.group()[1:]
        secret = os.environ.get(name)
        if not secret:
            raise ConfigError(
                f"{field} names the environment variable {name!r}, which is not set. Set it, or write $${{{name}}} for "
                "the text itself."
            )
        if len(secret) >= SHORTEST:
            _KNOWN[secret] = f"${{{name}}}"
        return secret

    text = REFERENCE.sub(replace, value)
    keys = [(key, part) for _, key, part in QUERY.findall(text)] if "://" in text else []
    for name, part in [(field.rsplit(".", 1)[-1], text), *keys]:
        if is_secret(name, part):
            _KNOWN.setdefault(part, HIDDEN)
    return text


def masked(text: str) -> str:
    """The text without the secrets that `expanded` has read: servers and errors repeat them."""
    for value, name in _KNOWN.items():
        text = text.replace(value, name)
    return text


def is_secret(name: str, value: Any) -> bool:
    """Whether a value looks like a key or password, by its name or its form."""
    if not isinstance(value, str) or len(value) < SHORTEST or name.endswith("_env"):
        return False
    return bool(VALUES.match(value) or (NAMES.search(name) and not re.search(r"\s", value.removeprefix("Bearer "))))


def redacted(value: Any, name: str = "", references: bool = True) -> Any:
    """The value, at any depth, with *** for what looks like a secret, also in the query of a URL.

    `references`: `${NAME}` stays, because it reveals nothing. False hides it too, so that every way to write a key
    gives the same.
    """
    if isinstance(value, dict):
        return {key: redacted(inner, str(key), references) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(inner, name, references) for inner in value]
    if not isinstance(value, str):
        return value
    refers = REFERENCE.search(value) is not None
    if is_secret(name, value) or (refers and NAMES.search(name)):
        return value if refers and references else HIDDEN
    if "://" not in value:
        return value

    def hide(match: re.Match[str]) -> str:
        start, key, part = match.groups()
        hidden = part and (NAMES.search(key) or VALUES.match(part))
        return start + HIDDEN if hidden and not (references and REFERENCE.search(part)) else match.group()

    return PASSWORD.sub(rf"\1{HIDDEN}\3", QUERY.sub(hide, value))


def plain_secrets(value: Any, name: str = "") -> Iterator[str]:
    """The dotted fields that hold what looks like a secret, written in plain."""
    if isinstance(value, dict | list | tuple):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from plain_secrets(inner, f"{name}.{key}" if name else str(key))
    elif redacted(value, name.rsplit(".", 1)[-1]) != value:
        yield name


def advice(fields: list[str]) -> str:
    """The warning for secrets that were written in plain."""
    variable = "MY_" + (re.sub(r"\W+", "_", fields[0].rsplit(".", 1)[-1]).upper() or "KEY")
    return (
        f"{', '.join(fields)} looks like a key or password, written in plain: it is in the run's config.yaml. Write "
        f"${{{variable}}} there and set this environment variable; scores stay as they are."
    )
