"""Fills the report's templates and combines document, overview and configuration into one HTML file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from raftune.report.collect import number
from raftune.report.samples import embedded
from raftune.sanitize import harmless

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


@cache
def asset(name: str) -> str:
    return resources.files("raftune.report").joinpath("assets", name).read_text(encoding="utf-8")


@cache
def environment() -> Environment:
    """The templates: all text is escaped, and its control and direction characters are made visible."""
    templates = Environment(
        loader=FunctionLoader(asset),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: harmless(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"number": number, "at": lambda value: f"{value:.1f}"}
    return templates


def render(template: str, **values: Any) -> Markup:
    """The template's HTML with these values."""
    return Markup(environment().get_template(template).render(values))


def page(document: Mapping[str, Any], overview: str, configuration: str) -> str:
    """The whole page; `overview` and `configuration` are HTML without scripts, styles or handlers."""
    style, script = ("\n".join(asset(name) for name in names) for names in (STYLES, SCRIPTS))
    assert "</style" not in style.lower() and "</script" not in script.lower()
    filled = render(
        "page.html",
        style_hash=digest(style),
        script_hash=digest(script),
        run=document["run"],
        style=Markup(style),
        overview=Markup(overview),
        configuration=Markup(configuration),
        document=Markup(embedded(document)),
        script=Markup(script),
    )
    return f"{filled}\n"


def digest(content: str) -> str:
    """The content's hash as a content security policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
