"""The report's page in a browser: it opens from disk, does what it says, and nothing that a model wrote runs in it."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api")
from playwright.sync_api import Browser

from raftune.report import write_report
from raftune.runtime import run
from tests.injections import HOSTILE
from tests.runs import report_pages as pages
from tests.runs import tiny
from tests.runs.report_pages import SCREENS, Opened, document, written

pytestmark = [pytest.mark.slow, pytest.mark.skipif(pages.CHROMIUM is None, reason=pages.NO_BROWSER)]

UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff]")
UNHARMED = {"harmed": None, "elements": 0, "scripts": 2, "handlers": 0, "links": 0, "wide": 0}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("page"), document())


# -- it opens from disk -----------------------------------------------------------------------------------------------


def test_the_page_of_a_run_asks_for_nothing_but_itself(chromium: Browser, tmp_path: Path) -> None:
    run.run(tiny.config(tmp_path / "run"), tiny.objects())
    file = write_report(tmp_path / "run")
    with Opened(chromium, file) as page:
        for screen in SCREENS:
            page.go(f"#{screen}")
            assert page.screen() == screen
        page.go("#prompts")
        assert page.count("#prompts .card") == 4
        assert page.requests == [file.as_uri()]
        assert page.complaints == []


def test_the_policy_forbids_what_the_page_does_not_bring(opened: Opened) -> None:
    opened.page.evaluate(
        """() => {
            const script = document.createElement("script"), image = document.createElement("img");
            script.textContent = "window.harmed = 1";
            image.src = "https://example.invalid/x.png";
            document.body.append(script, image);
            document.body.setAttribute("onclick", "window.harmed = 1");
            document.body.click();
        }"""
    )
    opened.page.wait_for_timeout(50)
    assert opened.page.evaluate("window.harmed") is None
    assert len(opened.complaints) >= 3  # each was refused, and the browser said so
    assert all("Content Security Policy" in words for words in opened.complaints)
    opened.complaints.clear()


def test_no_script_of_the_page_makes_markup_from_text() -> None:
    folder = resources.files("raftune.report").joinpath("assets")
    sources = [path.read_text(encoding="utf-8") for path in folder.iterdir() if path.name.endswith(".js")]
    assert sources
    for source in sources:
        assert not re.search(
            r"(inner|outer|insertAdjacent)HTML|document\.write|\beval\b|new Function|DOMParser", source
        )


def test_without_scripts_the_overview_and_the_configuration_read(chromium: Browser, file: Path) -> None:
    with Opened(chromium, file, java_script_enabled=False) as page:
        assert "It rose." in page.text("#overview")
        assert "seed 0" in page.text("#configuration")
        assert "Scripts are off" in page.text("body")
        assert not any(page.visible(hidden) for hidden in ("#prompts", "#tab-prompts", "#theme"))


# -- keys, addresses, links -------------------------------------------------------------------------------------------


def candidate(page: Opened) -> str:
    return page.text('#prompts .card[aria-current="true"] .rank')


def compared(page: Opened) -> str:
    return page.text("#compare .card:last-child h3")


# What help says of a key: where to stand, what to press, and what is then to be seen, and was not before.
CLAIMS: dict[str, tuple[str, str, Callable[[Opened], Any], Any]] = {
    "next prompt or row": ("#prompts", "j", lambda p: p.text("#prompts .asked"), "Question 1?"),
    "previous prompt or row": (
        "#prompts?sample=0001/p2-0/001",
        "k",
        lambda p: p.text("#prompts .asked"),
        "Question 1?",
    ),
    "next sample of the prompt": ("#prompts", "l", candidate, "rank 2 of 3"),
    "previous sample of the prompt": ("#prompts?sample=0001/p0-0/002", "h", candidate, "rank 2 of 3"),
    "next round": ("#compare?round=1", "]", compared, "Round 2"),
    "previous round": ("#compare?round=2", "[", compared, "Round 1"),
    "search": ("#learned", "/", lambda p: p.page.evaluate("document.activeElement.type"), "search"),
    "theme: auto, light, dark": ("#overview", "t", lambda p: p.text("#theme"), "Theme: light"),
    "these keys": ("#overview", "?", lambda p: p.visible("#help"), True),
    "Overview": ("#prompts", "1", Opened.screen, "overview"),
    "Prompts": ("#overview", "2", Opened.screen, "prompts"),
    "Compare": ("#overview", "3", Opened.screen, "compare"),
    "Training samples": ("#overview", "4", Opened.screen, "learned"),
    "Alarms": ("#overview", "5", Opened.screen, "alarms"),
    "Configuration": ("#overview", "6", Opened.screen, "configuration"),
}


def test_every_key_does_what_the_help_says(opened: Opened) -> None:
    opened.press("?")
    rows = opened.page.locator("#help dl > div").all()
    said = {row.locator("dd").inner_text(): row.locator("kbd").first.inner_text() for row in rows}
    opened.press("Escape")
    assert not opened.visible("#help")
    assert said == {words: key for words, (_, key, _, _) in CLAIMS.items()}
    for words, (hash, key, look, expected) in CLAIMS.items():
        opened.go("#configuration?x")
        opened.go(hash)
        assert look(opened) != expected, words
        opened.press(key)
        assert look(opened) == expected, words
        opened.press("Escape")


def test_keys_are_left_alone_where_one_types_or_means_another(opened: Opened) -> None:
    opened.go("#prompts")
    opened.press("/", "j", "2", "?")
    assert opened.page.evaluate("document.activeElement.value") == "j2?"
    opened.press("Escape", "Control+3", "Alt+3")
    assert opened.screen() == "prompts"


def test_the_arrows_do_in_a_list_what_the_letters_do_anywhere(opened: Opened) -> None:
    opened.go("#prompts")
    opened.page.locator("#prompts .rows a").first.focus()
    opened.press("ArrowDown", "ArrowDown", "ArrowUp")
    assert opened.text("#prompts .asked") == "Question 1?"
    opened.page.locator("#prompts .card").first.focus()
    opened.press("ArrowRight")
    assert candidate(opened) == "rank 2 of 3"


def test_the_arrows_work_anywhere_on_a_screen_with_a_list_and_are_left_alone_elsewhere(opened: Opened) -> None:
    opened.go("#prompts")
    opened.press("ArrowDown")
    assert opened.text("#prompts .asked") == "Question 1?"
    opened.press("ArrowRight")
    assert candidate(opened) == "rank 2 of 3"
    opened.press("ArrowLeft", "ArrowUp")
    assert (candidate(opened), opened.text("#prompts .asked")) == ("rank 1 of 3", "Question 0?")
    opened.go("#overview")
    opened.press("ArrowDown", "ArrowRight")
    assert opened.screen() == "overview"


def test_on_a_phone_every_tab_is_in_sight(chromium: Browser, file: Path) -> None:
    with Opened(chromium, file, viewport={"width": 390, "height": 844}) as page:
        for screen in SCREENS:
            box = page.page.locator(f"#tab-{screen}").bounding_box()
            assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 390, screen


def test_a_mark_of_a_chart_says_its_number_where_it_is_touched(chromium: Browser, tmp_path: Path) -> None:
    run.run(tiny.config(tmp_path / "run"), tiny.objects())
    with Opened(chromium, write_report(tmp_path / "run")) as page:
        mark = page.page.locator("#reward svg .dot").first
        mark.scroll_into_view_if_needed()
        box = mark.bounding_box()
        assert box is not None and page.page.locator(".tip").is_hidden()
        x, y = box["x"] + box["width"] / 2 + 6, box["y"] + box["height"] / 2 + 6  # a finger is no needle
        page.page.evaluate(
            "([x, y]) => document.elementFromPoint(x, y).dispatchEvent("
            "new PointerEvent('pointerdown', {bubbles: true, clientX: x, clientY: y, pointerType: 'touch'}))",
            [x, y],
        )
        said = page.page.locator(".tip").inner_text()
        assert said.startswith("policy, round start: ") and said.endswith("n = 4")


def test_completions_that_share_little_are_shown_whole(chromium: Browser, tmp_path: Path) -> None:
    found = document()
    before, after = "one two three four five", "six seven eight nine five"
    for item in found["compare"]["items"]:
        item["answers"]["0"]["completion"], item["answers"]["2"]["completion"] = before, after
        item["answers"]["1"]["completion"] = "one two three four six"
    with Opened(chromium, written(tmp_path, found)) as page:
        page.go("#compare?round=2")
        assert page.count("#compare ins, #compare del") == 0
        assert "share few words" in page.text("#compare .detail .note")
        page.go("#compare?round=1")
        assert page.count("#compare ins, #compare del") == 2


def test_an_evaluation_offers_its_completions_and_no_screens_of_training(chromium: Browser, tmp_path: Path) -> None:
    run.run(tiny.config(tmp_path / "run", num_rounds=0), tiny.objects())
    with Opened(chromium, write_report(tmp_path / "run")) as page:
        shown = [screen for screen in SCREENS if page.page.locator(f"#tab-{screen}").is_visible()]
        assert shown == ["overview", "compare", "configuration"]
        page.go("#compare")
        assert page.count("#compare .card") == 1
        page.go("#prompts")
        assert "This is an evaluation" in page.text("#prompts .empty")
        assert page.complaints == []


def test_rounds_step_through_prompts_and_training_rows(opened: Opened) -> None:
    opened.go("#prompts")
    opened.press("]", "]")
    assert "Round 2" in opened.text("#prompts .detail .eyebrow")
    assert "3 of them match" in opened.text("#prompts .showing")
    opened.press("4", "]", "j")
    assert opened.address() == "#learned?round=1&row=0"


@pytest.mark.parametrize(
    ("hash", "keys"),
    [
        ("#prompts", ["]", "j", "l", "l", "t", "t"]),
        ("#prompts", ["/", *"question 2", "Escape", "j"]),
        ("#prompts?sort=-margin&alarm=0", ["l"]),
        ("#compare", ["[", "j", "l"]),
        ("#compare?sort=-held_out", ["j", "j", "t"]),
        ("#learned", ["]", "j", "j"]),
        ("#alarms?alarm=1", ["t"]),
    ],
)
def test_an_address_restores_the_view(chromium: Browser, opened: Opened, hash: str, keys: list[str]) -> None:
    opened.go(hash)
    opened.press(*keys)
    with Opened(chromium, opened.file, opened.address()) as again:
        assert again.probe("view()") == opened.probe("view()")


def test_back_returns_to_the_screen_before(opened: Opened) -> None:
    opened.go("#prompts?round=2")
    opened.press("5")
    opened.page.go_back()
    assert opened.screen() == "prompts"
    assert "Round 2" in opened.text("#prompts .detail .eyebrow")


@pytest.mark.parametrize(
    ("hash", "screen"),
    [
        ("#nowhere", "overview"),
        ("#%E0%A4%A", "overview"),
        ("#reward", "overview"),  # a place on a screen
        ("#prompts?round=99&sort=x&alarm=7&sample=none", "prompts"),
        ("#compare?round=-1&pair=/", "compare"),
        ("#learned?row=99999&from=nobody", "learned"),
    ],
)
def test_an_address_that_means_little_shows_what_it_can(chromium: Browser, file: Path, hash: str, screen: str) -> None:
    with Opened(chromium, file, hash) as page:
        assert page.screen() == screen
        assert page.complaints == []


@pytest.mark.parametrize("width", [1400, 390])
def test_every_alarm_leads_to_its_sample_in_view(chromium: Browser, file: Path, width: int) -> None:
    with Opened(chromium, file, viewport={"width": width, "height": 700}) as page:
        banner = page.page.locator("#banner a")
        assert banner.count() == 2
        for number in range(2):
            page.go("#overview")
            banner.nth(number).click()
            link = page.page.locator("#alarms .alarm").nth(number).locator(".evidence-samples li a")
            words = link.locator(".begins").inner_text()
            link.click()
            found = page.probe("focused()")
            assert words in found["text"]
            assert found["seen"]


def test_an_alarm_narrows_the_prompts_to_its_own(opened: Opened) -> None:
    opened.go("#alarms")
    opened.page.get_by_text("All their prompts").click()
    assert opened.count("#prompts .rows li") == 1
    assert "1 of them matches" in opened.text("#prompts .showing")


def test_the_focus_is_never_trapped(opened: Opened) -> None:
    opened.go("#prompts")
    opened.page.locator("#prompts input").focus()
    stops = []
    for _ in range(8):
        opened.press("Tab")
        stops.append(opened.page.evaluate("document.activeElement.tagName"))
    assert stops[3:5] == ["A", "LI"]  # past the fields: one stop in the list, one in the strip,
    assert "BODY" in stops  # and out at the page's end


# -- hostile text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", range(10))
def test_hostile_text_is_shown_and_does_nothing(chromium: Browser, tmp_path: Path, which: int) -> None:
    texts = HOSTILE[which::10]
    file = written(tmp_path, document(text=" ".join(texts)))
    with Opened(chromium, file, viewport={"width": 390, "height": 844}) as page:
        for number in "23456":
            page.press(number)
            assert page.probe("strangers()") == UNHARMED
        page.press("2")
        shown = page.page.locator("#prompts .asked").text_content() or ""
        assert not UNSEEN.search(shown)
        assert all(UNSEEN.split(text)[0].strip() in shown for text in texts)
        page.press("/")
        page.page.keyboard.insert_text(texts[0])
        page.page.locator("#tab-alarms").click()
        page.page.locator("#alarms .evidence-samples a").first.click()
        assert page.probe("focused()")["seen"]
        assert page.probe("strangers()") == UNHARMED
        assert page.requests == [file.as_uri()]
        assert page.complaints == []
