"""Pages to test the report's front end on: a document made to measure, and a browser that tells what happens in it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Dialog, Page, sync_playwright

from raftune.report.page import page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NO_BROWSER = "no browser here: install Debian's package chromium (.ci/run does) to test the report's page"
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
SCREENS = ("overview", "prompts", "compare", "learned", "alarms", "configuration")
OVERVIEW = (
    '<section class="block" id="reward"><h2>Reward</h2><p class="lead">It rose.</p><p class="note">x</p></section>'
)
CONFIGURATION = '<section class="block"><h2>Configuration</h2><p>seed 0</p></section>'
PROBES = Path(__file__).with_name("report_probes.js").read_text(encoding="utf-8")


@contextmanager
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


class Opened:
    """A page opened from disk, with all that it asked for and complained of."""

    def __init__(self, browser: Browser, file: Path, hash: str = "", **context: Any) -> None:
        self.file = file
        self.context = browser.new_context(**{"viewport": {"width": 1400, "height": 900}, **context})
        self.page: Page = self.context.new_page()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", self.refuse)
        self.page.goto(file.as_uri() + hash)

    def refuse(self, dialog: Dialog) -> None:
        self.complaints.append(f"a dialog: {dialog.message}")
        dialog.dismiss()

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *error: object) -> None:
        self.context.close()

    def go(self, hash: str) -> None:
        """Brings the page to this address, as one typed into the address bar would."""
        self.page.evaluate("hash => { location.hash = hash }", hash)
        self.page.evaluate("() => new Promise(done => requestAnimationFrame(() => setTimeout(done)))")

    def address(self) -> str:
        """The address, once it is in step with the view: the page writes it at leisure."""
        self.page.wait_for_timeout(200)
        return str(self.page.evaluate("location.hash"))

    def probe(self, call: str) -> Any:
        """What a function of report_probes.js says of the page."""
        return self.page.evaluate(f"() => {{ {PROBES}\n return {call}; }}")

    def text(self, selector: str) -> str:
        return self.page.locator(selector).first.inner_text()

    def count(self, selector: str) -> int:
        return self.page.locator(selector).count()

    def visible(self, selector: str) -> bool:
        return self.page.locator(selector).first.is_visible()

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def screen(self) -> str:
        return str(self.page.locator("main > section:visible").get_attribute("id"))


def written(folder: Path, document: dict[str, Any], *, gallery: bool = False) -> Path:
    """The file of the document's page, with or without the place of the grid of images."""
    file = folder / "report.html"
    overview = OVERVIEW + ('<section class="block needs-script" id="gallery"></section>' if gallery else "")
    file.write_text(page(document, overview, CONFIGURATION), encoding="utf-8")
    return file


def document(rounds: int = 2, prompts: int = 3, text: str = "", **changes: Any) -> dict[str, Any]:
    """A run of so many rounds with K = 3; `text` is added to all that a model, a user or a data set may write."""
    shown = [prompt(round_, number, text) for round_ in range(1, rounds + 1) for number in range(prompts)]
    pairs = [pair(number, k, rounds, text) for number in range(prompts) for k in range(2)]
    rows = [row(item) for item in shown]
    alarms = [
        alarm("length_drifts", 1, shown[1]["samples"][2]["id"], text),
        alarm("held_out_falls", 2, pairs[3]["answers"]["2"]["id"], text),
    ]
    found = {
        "version": 1,
        "run": run(rounds, text),
        "rewards": [f"polite{text}"],
        "judges": [f"judge{text}"],
        "prompts": {"shown": len(shown), "of": 12_800, "chosen_by": f"hash{text}", "items": shown},
        "compare": {"shown": len(pairs), "of": len(pairs), "chosen_by": "hash", "items": pairs},
        "learned": {"shown": len(rows), "of": 900, "chosen_by": "hash", "items": rows},
        "alarms": alarms,
        "guarded": list(range(1, rounds + 1)),
        "missing": [],
    }
    return found | changes


def run(rounds: int, text: str) -> dict[str, Any]:
    return {
        "name": f"demo{text}",
        "status": "finished",
        "status_words": f"finished: all {rounds} rounds are done",
        "media": "text",
        "rounds": list(range(rounds + 1)),
        "best": rounds,
        "best_by": "reward",
    }


def prompt(round_: int, number: int, text: str) -> dict[str, Any]:
    return {
        "round": round_,
        "id": f"p{number}-0",
        "prompt": f"Question {number}?{text}",
        "margin": 2.0 + number,
        "reason": None,
        "samples": [sample(round_, number, k, text) for k in range(3)],
    }


def sample(round_: int, number: int, k: int, text: str) -> dict[str, Any]:
    score = [0.5, 4.0 + number, -1.5][k]
    return {
        "id": f"{round_:04d}/p{number}-0/{k:03d}{text}",
        "k": k,
        "source": "policy" if k else f"column:human{text}",
        "completion": f" Answer {k} to question {number} in round {round_}.{text}",
        "score": score,
        "parts": {f"polite{text}": score, "short": None},
        "status": "ok",
        "detail": text,
        "rank": [2, 1, 3][k],
        "weight": float(k == 1),
        "reason": ["a better one was kept", "best of its prompt"][k == 1] + text,
        "seed": "9223372036854775807",
        "tokens": 12,
        "finish": "length" if k == 2 else "eos",
    }


def pair(number: int, k: int, rounds: int, text: str) -> dict[str, Any]:
    answers = {
        str(round_): {
            "id": f"{round_:04d}e/q{number}-0/{k:03d}{text}",
            "completion": f" The cat {['sat', 'lay', 'slept'][round_ % 3]} on the mat, {k}.{text}",
            "score": round_ * (number - 1.0),
            "held_out": 3.0 - round_ * number,
            "parts": {f"polite{text}": round_ * (number - 1.0)},
            "tokens": 9,
            "finish": "eos",
        }
        for round_ in range(rounds + 1)
    }
    return {
        "prompt_id": f"q{number}-0",
        "prompt": f"Held out {number}?{text}",
        "k": k,
        "seed": "17",
        "answers": answers,
    }


def row(item: dict[str, Any]) -> dict[str, Any]:
    winner = item["samples"][1]
    named = {name: winner[name] for name in ("source", "completion", "weight", "score", "reason")}
    return named | {
        "round": item["round"],
        "origin": "round-0001",
        "sample_id": winner["id"],
        "prompt_id": item["id"],
        "prompt": item["prompt"],
    }


def alarm(kind: str, round_: int, sample_id: str, text: str) -> dict[str, Any]:
    return {
        "alarm": kind,
        "round": round_,
        "title": f"Something to see{text}",
        "evidence": f"From 26.5 to 37.1 tokens.{text}",
        "numbers": {
            f"length{text}": 37.125,
            "samples": 12,
            "judge": {"mean": -0.80626, "low": -1, "high": -0.5, "n": 48},
            "shares": {"help": 0.924948, f"form{text}": 0.075},
        },
        "samples": [{"sample_id": sample_id, "why": f"the longest{text}"}],
    }
