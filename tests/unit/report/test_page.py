"""The page is one file that asks for nothing, and whatever is written into it stays text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from typing import Any

import pytest
from jinja2 import UndefinedError

from raftune.report.collect import number
from raftune.report.page import SCRIPTS, asset, environment, page
from raftune.report.samples import embedded
from tests.injections import HOSTILE
from tests.markup import Seen

EMPTY = {"shown": 0, "of": 0, "chosen_by": "", "items": []}


def document(words: str = "demo") -> dict[str, Any]:
    """A document that holds these words wherever somebody else's words may stand."""
    sample = {"id": words, "completion": words, "parts": {words: 1.0}, "reason": words, "detail": words}
    item = {"round": 1, "id": words, "prompt": [{"role": words, "content": words}], "samples": [sample]}
    return {
        "version": 1,
        "run": {"name": words, "status": "finished", "status_words": words, "media": "text", "rounds": [0, 1]},
        "rewards": [words],
        "judges": [words],
        "prompts": {"shown": 1, "of": 1, "chosen_by": words, "items": [item]},
        "compare": EMPTY,
        "learned": EMPTY,
        "alarms": [],
        "missing": [words],
    }


def sha(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def test_the_policy_allows_this_style_and_this_script_and_nothing_else() -> None:
    seen = Seen(page(document(), "", ""))
    (policy,) = (v for tag, name, v in seen.attributes if (tag, name) == ("meta", "content") and "default-src" in v)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules.pop("default-src") == rules.pop("base-uri") == rules.pop("form-action") == "'none'"
    assert rules.pop("style-src") == f"'{sha(seen.texts['style'][0])}'"
    assert rules.pop("script-src") == f"'{sha(seen.texts['script'][1])}'"
    assert rules.pop("img-src") == "data:"
    assert rules == {}


def test_nothing_in_the_page_names_a_place_on_the_network() -> None:
    html = page(document(), "", "")
    named = {v for _, name, v in Seen(html).attributes if name in ("src", "href", "action", "srcset", "poster")}
    assert all(value.startswith("#") or value == "data:," for value in named)
    assert not re.search(r"\w+://", html)
    assert not re.search(r"\b(?:fetch|XMLHttpRequest|WebSocket|EventSource|sendBeacon|importScripts)\b", html)
    assert not re.search(r"@import|url\(", asset("style.css"))


def test_every_slot_is_filled_and_once() -> None:
    slots = re.findall(r"\{\{ ([\w.]+) \}\}", asset("page.html"))
    assert {"style_hash", "script_hash", "run.name", "run.status_words"} <= set(slots)
    assert all(slots.count(name) == 1 for name in ("style", "script", "overview", "configuration", "document"))
    html = page(document(), "{{ style }}", "{% raw %}")
    assert "{{ style }}" in html and "{% raw %}" in html, "what fills a slot is not read as a template"
    assert not any(f"{{{{ {name} }}}}" in page(document(), "", "") for name in slots)


def test_a_value_that_a_template_misses_is_our_own_bug() -> None:
    with pytest.raises(UndefinedError):
        environment().from_string("{{ nothing }}").render()


@pytest.mark.parametrize("words", HOSTILE)
def test_hostile_words_change_no_element_and_come_back_as_they_were(words: str) -> None:
    harmless, hostile = Seen(page(document(), "", "")), Seen(page(document(words), "", ""))
    assert hostile.tags == harmless.tags
    assert [a[:2] for a in hostile.attributes] == [a[:2] for a in harmless.attributes]
    assert json.loads(hostile.texts["script"][0]) == document(words)
    assert hostile.texts["script"][1] == harmless.texts["script"][1]


def filled(words: str) -> str:
    """A block with a figure, a table, a folded part and a hash, of these words wherever words may stand."""
    template = """{% from "macros.html" import block, facts, folded, short, table %}
        {% call block(words, words) %}{{ facts([figure]) }}{{ table([words, [words, words]], [[words, words]], words) }}
        {% call folded(words) %}{{ short(words) }}{% endcall %}{% endcall %}"""
    figure = {"name": words, "value": words, "small": words, "href": ""}
    return environment().from_string(template).render(words=words, figure=figure)


@pytest.mark.parametrize("words", HOSTILE)
def test_hostile_words_in_tables_and_figures_are_text(words: str) -> None:
    seen, plain = Seen(filled(words)), Seen(filled("x"))
    assert seen.tags == plain.tags
    assert [a[:2] for a in seen.attributes] == [a[:2] for a in plain.attributes]


def test_what_cannot_be_seen_or_turns_the_line_is_written_out() -> None:
    shown = environment().from_string("{{ words }}").render(words="a\u202eb\x00c\x1b[31m")
    assert shown == "a\\u202eb\\x00c\\x1b[31m"


def test_the_document_holds_no_character_that_could_end_it() -> None:
    plain = embedded({"x": "<>&\u2028\u2029\ud800 日本"})
    assert not re.search("[<>&\u2028\u2029\ud800-\udfff]", plain)
    assert json.loads(plain) == {"x": "<>&\u2028\u2029\ud800 日本"}
    plain.encode()


def test_a_number_that_json_does_not_know_is_our_own_bug() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        embedded({"x": float("nan")})


def test_the_scripts_are_those_of_the_assets() -> None:
    assert len({asset(name) for name in SCRIPTS}) == len(SCRIPTS)


@pytest.mark.parametrize(
    ("value", "written"),
    [(None, "–"), (0.0, "0.000"), (-2.25, "−2.250"), (34.276, "34.28"), (181.6, "181.6"), (12_800.0, "12,800")],
)
def test_numbers_are_written_for_people(value: float | None, written: str) -> None:
    assert number(value) == written


def test_very_large_and_very_small_numbers_keep_their_size() -> None:
    assert number(3.2e7) == "3.20e+07"
    assert number(0.00002) == "2.00e−05"
