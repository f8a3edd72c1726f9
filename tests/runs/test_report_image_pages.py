"""The page of a run of images in a browser: strips, the grid of rounds, the slider, one at large."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("playwright.sync_api")
from playwright.sync_api import Browser

from tests.injections import HOSTILE
from tests.runs import report_pages as pages
from tests.runs.report_image_pages import VOID, painted
from tests.runs.report_pages import SCREENS, Opened, written

pytestmark = [pytest.mark.slow, pytest.mark.skipif(pages.CHROMIUM is None, reason=pages.NO_BROWSER)]

UNHARMED = {"harmed": None, "elements": 0, "scripts": 2, "handlers": 0, "links": 0, "wide": 0}
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("page"), painted(), gallery=True)


@pytest.fixture
def opened(chromium: Browser, file: Path) -> Iterator[Opened]:
    with Opened(chromium, file) as page:
        yield page
        assert page.complaints == []
        assert page.requests == [file.as_uri()]


# -- candidates -------------------------------------------------------------------------------------------------------


def test_the_candidates_stand_side_by_side_as_images_with_star_score_rank_and_reason(opened: Opened) -> None:
    opened.go("#prompts?sample=0002/p1-0/001")
    assert opened.count("#prompts .card img") == 3
    first = opened.page.locator("#prompts .card").first
    assert first.locator("img").get_attribute("alt") == "Question 1?, candidate 1"
    assert first.inner_text().split("\n")[:3] == ["★", "5.00", "rank 1 of 3"]
    assert "best of its prompt" in first.inner_text()
    assert opened.page.evaluate(
        "[...document.querySelectorAll('#prompts .card img')].every(image => image.naturalWidth === 4)"
    )
    assert first.locator("img").evaluate("node => getComputedStyle(node).imageRendering") == "pixelated"


def test_a_sample_that_is_no_image_is_an_empty_frame_with_the_reason(opened: Opened) -> None:
    opened.go(f"#prompts?sample={VOID}")
    frame = opened.page.locator("#prompts .card").last
    assert frame.locator("img").count() == 0
    assert frame.locator(".void").get_attribute("aria-label") == "Question 0?, candidate 2: no image: not finite"
    assert "no image: not finite" in frame.inner_text()


def test_each_image_is_in_the_page_once(file: Path) -> None:
    words = file.read_text(encoding="utf-8")
    for picture in painted()["images"].values():
        assert words.count(picture["src"]) == 1


def test_enter_shows_an_image_at_large_with_all_that_is_known(opened: Opened) -> None:
    opened.go("#prompts?sample=0001/p0-0/001")
    opened.page.locator("#prompts .card .frame").first.focus()
    opened.press("Enter")
    words = opened.text("#viewer")
    found = painted()["prompts"]["items"][0]["samples"][1]
    for known in (found["seed"], found["completion"]["image"], found["reason"], "4 × 4 pixels", "polite", found["id"]):
        assert known in words
    assert "★ kept, weight 1" in words
    opened.press("ArrowRight")
    assert opened.text("#viewer h2") == "Round 1 · candidate 0"
    opened.press("3")  # other screens wait until it is closed
    assert opened.screen() == "prompts"
    opened.press("Escape")
    assert not opened.visible("#viewer")
    assert opened.page.evaluate("document.activeElement.className") == "frame"
    assert "rank 2 of 3" in opened.text('#prompts .card[aria-current="true"]')


def test_the_buttons_of_the_image_at_large_keep_the_focus(opened: Opened) -> None:
    opened.go("#prompts?sample=0002/p1-0/001&large=1")
    assert opened.page.evaluate("document.activeElement.textContent") == "Close"
    opened.page.get_by_text("Next →").click()
    opened.press("Enter")
    assert opened.text("#viewer h2") == "Round 2 · candidate 2"
    assert opened.page.evaluate("document.activeElement.textContent") == "Next →"


def test_an_image_that_is_not_in_the_page_is_reported_so(chromium: Browser, tmp_path: Path) -> None:
    with Opened(chromium, written(tmp_path, painted(images={})), "#prompts") as page:
        assert "this image is not in this page" in page.text("#prompts .card")
        for screen in SCREENS:
            page.go(f"#{screen}")
            assert page.probe("slips()") == []
        assert page.complaints == []


def test_the_search_finds_prompts_and_no_hashes(opened: Opened) -> None:
    opened.go("#prompts?q=question%202")
    assert opened.count("#prompts .rows li") == 2
    name = painted()["prompts"]["items"][0]["samples"][0]["completion"]["image"]
    opened.go(f"#prompts?q={name[:6]}")
    assert opened.text("#prompts .empty") == "No prompt matches the filters."


# -- rounds beside each other -----------------------------------------------------------------------------------------


def test_the_grid_has_a_row_for_each_prompt_and_seed_and_a_column_for_each_round(opened: Opened) -> None:
    opened.go("#compare")
    assert opened.text("#compare .grid-head").split() == ["round", "start", "1", "2", "★"]
    assert opened.count("#compare .rows > li") == 6
    alts = opened.page.locator("#compare .rows > li").first.locator("img").all()
    assert [image.get_attribute("alt") for image in alts] == [
        "Held out 0?, candidate 0, start, score 0.00",
        "Held out 0?, candidate 0, round 1, score −1.00",
        "Held out 0?, candidate 0, round 2, score −2.00",
    ]


def test_an_image_of_the_grid_leads_to_its_round_beside_the_start(opened: Opened) -> None:
    opened.go("#compare")
    opened.page.locator("#compare .rows > li").nth(3).locator(".cell").nth(1).click()
    assert opened.text("#compare .detail .asked") == "Held out 1?"
    assert opened.page.locator("#compare .pair h3").all_inner_texts() == ["Start", "Round 1"]
    assert opened.count("#compare .cell[data-chosen]") == 1
    assert opened.address() == "#compare?pair=q1-0%2F1&round=1"
    opened.press("]", "k")
    assert opened.page.locator("#compare .pair h3").all_inner_texts() == ["Start", "Round 2"]


def cut(page: Opened) -> str:
    return page.page.locator("#compare .slider input").input_value()


def test_the_slider_moves_by_arrow_keys_and_announces_its_position(opened: Opened) -> None:
    opened.go("#compare?round=2")
    field = opened.page.locator("#compare .slider input")
    field.focus()
    opened.press("ArrowLeft", "ArrowLeft")
    assert field.get_attribute("aria-valuetext") == "48 % start, 52 % round 2"
    clip = opened.page.locator("#compare .over").evaluate("node => getComputedStyle(node).clipPath")
    assert clip == "inset(0px 0px 0px 48%)"
    assert opened.address() == "#compare?round=2&cut=48"
    opened.press("j")  # the letters go on to mean what they do elsewhere
    assert cut(opened) == "48"
    assert opened.text("#compare .detail .eyebrow").startswith("Pair 2 of 6")


def test_the_slider_follows_the_pointer(opened: Opened) -> None:
    opened.go("#compare")
    box = opened.page.locator("#compare .stage").bounding_box()
    assert box is not None
    mouse, y = opened.page.mouse, box["y"] + box["height"] / 2
    mouse.move(box["x"] + box["width"] / 2, y)
    mouse.down()
    mouse.move(box["x"] + box["width"] / 4, y)
    assert cut(opened) == "25"
    mouse.move(box["x"] - 50, y)
    mouse.up()
    assert cut(opened) == "0"
    mouse.move(box["x"] + box["width"] / 2, y)
    assert cut(opened) == "0"


def test_the_slider_follows_a_finger(chromium: Browser, file: Path) -> None:
    with Opened(chromium, file, "#compare", viewport=PHONE, has_touch=True, is_mobile=True) as page:
        stage = page.page.locator("#compare .stage")
        stage.scroll_into_view_if_needed()
        box = stage.bounding_box()
        assert box is not None
        page.page.touchscreen.tap(box["x"] + box["width"] * 0.8, box["y"] + 20)
        assert cut(page) == "80"


def test_the_overview_shows_the_grid_before_anything_is_scrolled(opened: Opened) -> None:
    assert opened.count("#gallery .grid li") == 3
    assert opened.text("#gallery .grid .figure") == "0.00"
    picture = opened.page.locator("#gallery .cell").first
    box = picture.bounding_box()
    assert box is not None
    assert box["y"] + box["height"] < 900
    opened.page.locator("#gallery .cell").nth(1).click()
    assert opened.page.locator("#compare .pair h3").all_inner_texts() == ["Start", "Round 1"]


def test_rounds_that_are_left_out_are_reported(chromium: Browser, tmp_path: Path) -> None:
    found = painted(rounds=3)
    found["compare"] |= {"rounds": [0, 3], "of_rounds": 4}
    with Opened(chromium, written(tmp_path, found), "#compare") as page:
        assert "images of 2 of 4 rounds" in page.text("#compare .showing")
        assert page.text("#compare .grid-head").split() == ["round", "start", "3", "★"]


# -- learned from, alarms ---------------------------------------------------------------------------------------------


def test_training_rows_are_images_with_weight_and_origin(opened: Opened) -> None:
    opened.go("#learned?round=2")
    first = opened.page.locator("#learned .lesson").first
    assert first.locator("img").get_attribute("alt") == "Question 0?, candidate 1"
    assert "weight 1" in first.inner_text()
    assert "replayed from round 1" in first.inner_text()
    first.locator(".frame").click()
    assert opened.text("#viewer h2") == "Training row of round 2"
    opened.press("ArrowRight")
    assert "Question 1?" in opened.text("#viewer .asked")


@pytest.mark.parametrize("viewport", [{"width": 1400, "height": 900}, PHONE])
def test_an_alarm_shows_its_samples_as_images_that_lead_to_them(
    chromium: Browser, file: Path, viewport: dict[str, int]
) -> None:
    with Opened(chromium, file, viewport=viewport) as page:
        for number, focused in enumerate(("frame", "card")):
            page.go("#alarms")
            link = page.page.locator("#alarms .alarm").nth(number).locator(".evidence-samples a").first
            shown = link.locator("img, .void").first
            assert shown.is_visible()
            link.click()
            assert page.page.evaluate("document.activeElement.className") == focused
            assert page.probe("focused()")["seen"]


# -- how it looks, and what it bears ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read_and_all_that_can_be_used_has_a_name(chromium: Browser, file: Path, scheme: str) -> None:
    with Opened(chromium, file, color_scheme=scheme) as page:
        for view in (f"prompts?sample={VOID}", "compare?round=1", "learned", "alarms", "prompts?large=1"):
            page.go(f"#{view}")
            assert page.probe("contrast()")["ratio"] >= 4.5, (view, page.probe("contrast()"))
            assert page.probe("nameless()") == []


@pytest.mark.parametrize("which", range(2))
def test_hostile_text_beside_images_does_nothing_on_a_phone(chromium: Browser, tmp_path: Path, which: int) -> None:
    file = written(tmp_path, painted(rounds=9, prompts=2, text=" ".join(HOSTILE[which::2])), gallery=True)
    with Opened(chromium, file, viewport=PHONE) as page:
        for view in ("overview", "prompts", "compare", "alarms", "compare?large=3", "learned?row=0&large=1"):
            page.go(f"#{view}")
            assert page.probe("strangers()") == UNHARMED, view
        assert page.requests == [file.as_uri()]
        assert page.complaints == []
