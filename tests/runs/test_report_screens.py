"""What the screens of the report show, how they look, and how large a run they bear."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest

pytest.importorskip("playwright.sync_api")
from playwright.sync_api import Browser

from tests.runs import report_pages as pages
from tests.runs.report_pages import SCREENS, Opened, document, written

pytestmark = [pytest.mark.slow, pytest.mark.skipif(pages.CHROMIUM is None, reason=pages.NO_BROWSER)]

DIFFERENCE = resources.files("raftune.report").joinpath("assets", "diff.js").read_text(encoding="utf-8")
Pieces = list[tuple[str, bool]]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("page"), document())


# -- what they show ---------------------------------------------------------------------------------------------------


def test_the_kept_one_comes_first_beside_the_mean_with_its_reason(opened: Opened) -> None:
    opened.go("#prompts?sample=0002/p1-0/001")
    cards = opened.page.locator("#prompts .card")
    assert [words.split("\n")[0] for words in cards.all_inner_texts()] == ["★", "0.500", "−1.500"]
    assert "best of its prompt" in cards.first.inner_text()
    assert "★ kept at 5.00; the mean of 3 candidates is 1.33: a margin of +3.00." in opened.text("#prompts .verdict")
    assert "cut off" in cards.last.inner_text()
    assert "9223372036854775807" in opened.text("#prompts .detail")


def test_what_is_left_out_is_reported_on_every_list(opened: Opened) -> None:
    for screen, words in [
        ("prompts", "Showing 6 of 12,800, chosen by hash"),
        ("compare", "Showing all 6 pairs of prompt and seed (3 prompts)"),
        ("learned", "Showing 6 of 900, chosen by hash"),
    ]:
        opened.go(f"#{screen}")
        assert opened.text(f"#{screen} .showing") == words


def test_words_that_differ_are_marked_and_gains_are_shown_by_sign(opened: Opened) -> None:
    opened.go("#compare?round=1&pair=q2-0/0")
    assert opened.page.locator("#compare del").all_inner_texts() == ["sat"]
    assert opened.page.locator("#compare ins").all_inner_texts() == ["lay"]
    assert "+1.00" in opened.text("#compare .card:last-child .head")
    assert "−2.00" in opened.text("#compare .card:last-child .head")
    line = "node => getComputedStyle(node).textDecorationLine"
    assert opened.page.locator("#compare del").evaluate(line) == "line-through"
    assert opened.page.locator("#compare ins").evaluate(line) == "underline"


@pytest.mark.parametrize(
    ("sort", "first"),
    [
        ("score", "Held out 2?"),
        ("-score", "Held out 0?"),
        ("held_out", "Held out 0?"),
        ("-held_out", "Held out 2?"),
    ],
)
def test_comparisons_sort_by_gain_and_by_loss(opened: Opened, sort: str, first: str) -> None:
    opened.go(f"#compare?sort={sort}")
    assert opened.text("#compare .rows .line") == first


def test_training_rows_give_their_origin_and_link_to_the_other_candidates(opened: Opened) -> None:
    opened.go("#learned?round=2")
    assert opened.count("#learned .lesson") == 3
    assert "replayed from round 1" in opened.text("#learned .about")
    opened.page.locator("#learned .about a").first.click()
    assert opened.text('#prompts .card[aria-current="true"] .rank') == "rank 1 of 3"


def test_no_alarm_is_reported_in_words(chromium: Browser, tmp_path: Path) -> None:
    with Opened(chromium, written(tmp_path, document(alarms=[])), "#alarms") as page:
        assert page.text("#alarms") == "No alarm was raised in the 2 rounds that guards checked."
        assert not page.visible("#banner")


def test_the_numbers_of_an_alarm_read_as_numbers_and_intervals(opened: Opened) -> None:
    opened.go("#alarms")
    words = opened.page.locator("#alarms .alarm").first.locator(".numbers dd").all_inner_texts()
    assert words == ["37.13", "12", "−0.8063 [−1, −0.5], n 48", "help 0.9249, form 0.075"]


def test_where_no_guard_looked_no_silence_is_claimed(chromium: Browser, tmp_path: Path) -> None:
    with Opened(chromium, written(tmp_path, document(alarms=[], guarded=[])), "#alarms") as page:
        assert page.text("#alarms") == "No guards checked this run."


def test_missing_parts_are_named_and_the_rest_is_shown(chromium: Browser, tmp_path: Path) -> None:
    found = document(missing=["round 2, select: verdicts.parquet is damaged"])
    unknown = {"rank": None, "weight": None, "reason": None, "score": None, "parts": {}}
    for sample in found["prompts"]["items"][0]["samples"]:
        sample |= {**unknown, "status": "error", "detail": "it raised"}
    found["prompts"]["items"][0]["margin"] = None
    del found["compare"]["items"][0]["answers"]["0"]
    found["learned"] = {"shown": 0, "of": 0, "chosen_by": "", "items": []}
    with Opened(chromium, written(tmp_path, found)) as page:
        page.page.locator("#missing summary").click()
        assert "verdicts.parquet is damaged" in page.text("#missing")
        page.go("#prompts")
        assert "the reward failed: it raised" in page.text("#prompts .card")
        page.go("#compare")
        assert "This completion is not in this page." in page.text("#compare .card")
        page.go("#learned")
        assert "There is no training row in this page yet." in page.text("#learned")
        for screen in SCREENS:
            page.go(f"#{screen}")
            assert page.probe("slips()") == []
        assert page.complaints == []


def test_a_prompt_without_kept_samples_says_why(chromium: Browser, tmp_path: Path) -> None:
    found = document()
    found["prompts"]["items"][0]["reason"] = "all scores are equal"
    with Opened(chromium, written(tmp_path, found), "#prompts") as page:
        assert page.text("#prompts .verdict") == "Nothing was kept of this prompt: all scores are equal."


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("#prompts?sample=0009/gone/000", "Sample 0009/gone/000 is not in this page."),
        (
            "#prompts?sample=0002/p1-0/001&q=nothing%20like%20it",
            "Sample 0002/p1-0/001 does not match the filters.",
        ),
        ("#compare?sample=0009/gone/000", "Sample 0009/gone/000 is not in this page."),
        ("#compare?pair=gone/0", "Prompt gone/0 is not in this page."),
    ],
)
def test_an_address_of_something_not_shown_says_so(opened: Opened, address: str, words: str) -> None:
    opened.go(address)
    assert words in opened.text(f"{address.split('?')[0]} .notice")


def test_an_address_that_names_what_is_shown_brings_no_notice(opened: Opened) -> None:
    opened.go("#prompts?sample=0002/p1-0/001")
    assert opened.count("#prompts .notice") == 0
    opened.go("#compare")
    assert opened.count("#compare .notice") == 0


def test_conversations_read_turn_by_turn(chromium: Browser, tmp_path: Path) -> None:
    found = document()
    item = found["prompts"]["items"][0]
    item["prompt"] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    item["samples"][1]["completion"] = [{"role": "assistant", "content": "Hello."}]
    with Opened(chromium, written(tmp_path, found), "#prompts") as page:
        assert page.text("#prompts .asked").split() == ["system", "Be", "brief.", "user", "Hi"]
        assert page.text("#prompts .card .answer").split() == ["assistant", "Hello."]


# -- how they look ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "paper"), [("light", "rgb(251, 250, 246)"), ("dark", "rgb(23, 24, 26)")])
def test_all_text_can_be_read(chromium: Browser, file: Path, scheme: str, paper: str) -> None:
    with Opened(chromium, file, color_scheme=scheme) as page:
        for view in [*SCREENS, "prompts?q=answer", "compare?round=2", "learned?row=1"]:
            page.go(f"#{view}")
            found = page.probe("contrast()")
            assert found["seen"] > 10
            assert found["ratio"] >= 4.5, (view, found)
            assert page.probe("view()")["paper"] == paper


def test_nothing_is_wider_than_a_phone(chromium: Browser, tmp_path: Path) -> None:
    wide = document(rounds=12, text=" " + "m" * 400)
    with Opened(chromium, written(tmp_path, wide), viewport={"width": 390, "height": 844}) as page:
        for screen in SCREENS:
            page.go(f"#{screen}")
            assert page.page.evaluate("document.documentElement.scrollWidth") <= 390, screen


def test_paper_shows_what_is_chosen_and_no_controls(opened: Opened) -> None:
    opened.go("#prompts?theme=dark")
    opened.page.emulate_media(media="print")
    assert not opened.visible(".tabs")
    assert not opened.visible("#prompts .rows")
    assert opened.visible("#prompts .card")
    assert opened.page.evaluate("getComputedStyle(document.documentElement).color") == "rgb(35, 33, 29)"


def test_everything_that_can_be_used_has_a_name(opened: Opened) -> None:
    for screen in SCREENS:
        opened.go(f"#{screen}")
        assert opened.probe("nameless()") == []
        assert opened.count('[role=tab][aria-selected="true"]') == 1
        ids = opened.page.evaluate("[...document.querySelectorAll('[id]')].map(node => node.id)")
        assert len(ids) == len(set(ids))


# -- how much they bear -----------------------------------------------------------------------------------------------


def test_five_megabytes_are_no_burden(chromium: Browser, tmp_path: Path) -> None:
    large = document(rounds=8, prompts=260, text=" An answer goes on for some words before it ends." * 3)
    file = written(tmp_path, large)
    assert file.stat().st_size > 5_000_000
    with Opened(chromium, file, "#prompts") as page:
        page.page.wait_for_selector("#prompts .card")
        painted = page.page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        assert painted < 15_000  # milliseconds; a third of a second on an idle core
        for screen in ("prompts", "compare", "learned"):
            page.go(f"#{screen}")
            assert page.page.evaluate("document.querySelectorAll('*').length") < 6_000
            assert page.probe("presses('j', 10)") < 5_000  # milliseconds; a tenth of a second on an idle core
        page.go("#learned?row=2000")  # a row far down is reached by its address
        assert page.page.locator(".lesson[aria-current]").get_attribute("data-row") == "2000"


# -- the difference of two texts --------------------------------------------------------------------------------------


def difference(page: Opened, before: str, after: str) -> tuple[Pieces, Pieces]:
    found = page.page.evaluate(f"([a, b]) => {{ {DIFFERENCE}\n return difference(a, b); }}", [before, after])
    return [(text, changed) for text, changed in found["before"]], [(t, changed) for t, changed in found["after"]]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", ""),
        ("", "a b"),
        ("one two three", "one too three"),
        ("the same words", "the same words"),
        ("a\n\nb  c", "b c\nd"),
        ("日本語 text, 'quoted' e\u0301", "日本 text; 'quoted' é"),
        ("x " * 50 + "end", "y " * 60 + "end"),
    ],
)
def test_a_difference_keeps_both_texts_and_agrees_on_what_is_shared(opened: Opened, before: str, after: str) -> None:
    old, new = difference(opened, before, after)
    assert "".join(piece for piece, _ in old) == before
    assert "".join(piece for piece, _ in new) == after
    shared = ["".join(word for piece, changed in side if not changed for word in piece.split()) for side in (old, new)]
    assert shared[0] == shared[1]


def test_a_difference_is_the_smallest_one(opened: Opened) -> None:
    old, new = difference(opened, "the cat sat on the old mat", "the big cat sat on a mat")
    assert [piece for piece, changed in old if changed] == ["the old"]
    assert [piece for piece, changed in new if changed] == ["big", "a"]


def test_the_difference_of_very_long_texts_marks_all_between_their_common_ends(opened: Opened) -> None:
    old, new = difference(opened, "same " + "a b c " * 20_000 + "end", "same " + "b c d " * 20_000 + "end")
    assert [changed for _, changed in old] == [changed for _, changed in new] == [False, True, False]
    assert old[0] == new[0] == ("same ", False)
