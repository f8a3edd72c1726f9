"""What a model wrote cannot steer a terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from raftune.sanitize import harmless, one_line, shell_command


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("bell\x07 back\x08 del\x7f", r"bell\x07 back\x08 del\x7f"),
        ("\x9b31m", r"\x9b31m"),
        ("safe\u202eevil", r"safe\u202eevil"),
        ("\u2066x\u2069", r"\u2066x\u2069"),
        ("line\u2028line", r"line\u2028line"),
        ("lone \ud800 surrogate", r"lone \ud800 surrogate"),
        ("over\rwritten", r"over\x0dwritten"),
    ],
)
def test_what_steers_a_terminal_is_shown_as_an_escape(text: str, shown: str) -> None:
    assert harmless(text) == shown
    harmless(text).encode("utf-8")


@pytest.mark.parametrize("text", ["plain", "Naïve — 東京 🙂", "[bold]markup[/bold]", "two\nlines", "👩‍👧 family"])
def test_ordinary_text_stays_as_it_is(text: str) -> None:
    assert harmless(text) == text


def test_tabs_become_blanks() -> None:
    assert harmless("a\tb") == "a    b"


def test_one_line_shows_line_ends_and_cuts_with_an_ellipsis() -> None:
    assert one_line(" a\nb \r\n c ") == "a ⏎ b  ⏎  c"
    assert one_line("abcdef", 4) == "abc…"
    assert one_line("abcd", 4) == "abcd"


def test_a_path_that_starts_like_a_flag_is_no_flag() -> None:
    assert (
        shell_command("raftune", "resume", Path("-a b"), "--from", "generate")
        == "raftune resume './-a b' --from generate"
    )
