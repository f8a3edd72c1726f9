"""Combines document, overview and configuration into one HTML file."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from raftune.report.markup import text

SCRIPTS = (
    "dom.js",
    "state.js",
    "diff.js",
    "lists.js",
    "samples.js",
    "images.js",
    "prompts.js",
    "compare.js",
    "grid.js",
    "learned.js",
    "alarms.js",
    "app.js",
)
STYLES = ("style.css", "images.css")
_SLOT = re.compile(r"\{\{(\w+)\}\}")
# What could end the element that the document stands in, what JavaScript takes for line ends, and half characters,
# which no file can hold. JSON allows each of them as an escape.
_RISKY = re.compile("[<>&\u2028\u2029\ud800-\udfff]")


def page(document: Mapping[str, Any], overview: str, configuration: str) -> str:
    """The whole page; `overview` and `configuration` are HTML without scripts, styles or handlers."""
    style, script = ("\n".join(asset(name) for name in names) for names in (STYLES, SCRIPTS))
    assert "</style" not in style.lower() and "</script" not in script.lower()
    slots = {
        "csp": policy(style, script),
        "name": text(document["run"]["name"]),
        "status": text(document["run"]["status_words"]),
        "style": style,
        "overview": overview,
        "configuration": configuration,
        "document": embedded(document),
        "script": script,
    }
    return _SLOT.sub(lambda slot: slots[slot[1]], asset("page.html"))  # one pass: data that looks like a slot stays


def policy(style: str, script: str) -> str:
    """The content security policy under which nothing is loaded and nothing runs but this style and this script."""
    return (
        f"default-src 'none'; style-src '{digest(style)}'; script-src '{digest(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def digest(content: str) -> str:
    """The content's hash as a policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def embedded(document: Any) -> str:
    """The document, or a part of it, as JSON in which no character can end its element."""
    return _RISKY.sub(lambda match: f"\\u{ord(match[0]):04x}", as_json(document))


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


@cache
def asset(name: str) -> str:
    return resources.files("raftune.report").joinpath("assets", name).read_text(encoding="utf-8")
