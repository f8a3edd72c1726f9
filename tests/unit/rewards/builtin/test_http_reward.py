"""A judge behind HTTP: what is sent, what is read, and what comes of nonsense, on a real server."""

from __future__ import annotations

import datetime
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from raftune.config.rewards import RewardsConfig, RewardSpec
from raftune.errors import ConfigError
from raftune.records import ScoreStatus
from raftune.rewards import RewardBatch, load_reward, load_rewards
from raftune.rewards.check import example_images
from tests.runs.http_judge import judging


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with judging() as url:
        yield url


def scores_from(url: str, batch: RewardBatch, timeout: float = 10.0, retries: int = 0, **options: Any) -> list[Any]:
    spec = RewardSpec(spec="http", options={"url": url, **options})
    with load_rewards(RewardsConfig(reward_funcs=(spec,), timeout=timeout, retries=retries)) as rewards:
        return [(score.value, score.status, score.parts["http"].detail) for score in rewards.score(batch)]


def texts(size: int = 5) -> RewardBatch:
    return RewardBatch([f"q{i}" for i in range(size)], ["word " * i for i in range(size)], {"topic": list(range(size))})


def test_texts_are_sent_with_prompts_and_columns_in_requests_of_the_given_size(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    before = len(httpx2.get(f"{server}/seen").json())
    found = scores_from(f"{server}/words", texts(), batch_size=2, key_env="JUDGE_KEY")
    assert [value for value, _, _ in found] == [None, 1.0, 2.0, 3.0, 4.0]
    assert found[0][1] is ScoreStatus.NOT_APPLICABLE
    bodies = sorted(httpx2.get(f"{server}/seen").json()[before:], key=lambda body: str(body["prompts"]))
    assert [body["prompts"] for body in bodies] == [["q0", "q1"], ["q2", "q3"], ["q4"]]
    assert bodies[1]["completions"] == ["word word ", "word word word "]
    assert bodies[1]["columns"] == {"topic": [2, 3]}
    assert {(body["media"], body["authorization"]) for body in bodies} == {("text", "Bearer secret")}


def test_images_arrive_as_they_are(server: str) -> None:
    import numpy as np

    batch = example_images(mixed_sizes=True)
    expected = [float(np.asarray(picture, np.float64).mean()) for picture in batch.completions]
    assert [value for value, _, _ in scores_from(f"{server}/brightness", batch, batch_size=5)] == pytest.approx(
        expected
    )


NONSENSE = {
    "nan": (ScoreStatus.INVALID, "returned nan, not a finite number"),
    "strings": (ScoreStatus.INVALID, "returned str 'good', not a number"),
    "short": (ScoreStatus.ERROR, "4 scores for 5 completions; there must be one for each"),
    "html": (ScoreStatus.ERROR, 'the answer must be {"scores": […]}; got <html>It works!</html>'),
    "empty": (ScoreStatus.ERROR, 'the answer must be {"scores": […]}; got {}'),
    "500": (ScoreStatus.ERROR, "HTTP 500: out of ⏎ memory"),
    "elsewhere": (ScoreStatus.ERROR, "HTTP 307"),
    "nowhere": (ScoreStatus.ERROR, "HTTP 404"),
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_nonsense_is_a_status_with_what_was_said(server: str, kind: str) -> None:
    status, words = NONSENSE[kind]
    for value, found, detail in scores_from(f"{server}/{kind}", texts()):
        assert (value, found) == (None, status)
        assert words in detail


def test_a_judge_that_takes_too_long_costs_its_limit(server: str) -> None:
    began = time.monotonic()
    found = scores_from(f"{server}/slow", texts(2), timeout=0.5)
    assert {(value, status) for value, status, _ in found} == {(None, ScoreStatus.TIMEOUT)}
    assert time.monotonic() - began < 15


def test_a_server_that_is_not_there_is_an_error(server: str) -> None:
    found = scores_from("http://127.0.0.1:9/", texts(1))[0]
    assert found[1] is ScoreStatus.ERROR
    assert "http://127.0.0.1:9/: " in found[2]


def test_a_redirect_is_not_followed(server: str) -> None:
    before = len(httpx2.get(f"{server}/seen").json())
    scores_from(f"{server}/elsewhere", texts(1))
    assert len(httpx2.get(f"{server}/seen").json()) == before


def test_a_key_that_the_server_repeats_is_not_shown(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    detail = scores_from(f"{server}/unknown", texts(1), key_env="JUDGE_KEY")[0][2]
    assert detail.endswith("HTTP 401: do not know Bearer ***")


def test_columns_can_be_chosen_and_must_be_there(server: str) -> None:
    day = datetime.date(2020, 1, 1)
    batch = RewardBatch(["q"], ["a b"], {"day": [day], "topic": [1]})
    assert "cannot be sent as JSON" in scores_from(f"{server}/words", batch)[0][2]
    assert scores_from(f"{server}/words", batch, columns=["topic"])[0][0] == 2.0
    assert (
        "names 'colour', which the prompts lack; there are: day, topic"
        in (scores_from(f"{server}/words", batch, columns=["colour"])[0][2])
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "ftp://x/y"}, "options.url must be a URL that begins with http:// or https://; got 'ftp://x/y'"),
        ({"url": "http://me:word@x/"}, "must hold no password.*options.key_env"),
        ({"url": "http://x/", "batch_size": 0}, "options.batch_size must be 1 or more; got 0"),
        ({"url": "http://x/", "key_env": "NOT_SET_ANYWHERE"}, "'NOT_SET_ANYWHERE', which is not set"),
        ({}, r"url.*field required"),
    ],
)
def test_wrong_options_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_reward(RewardSpec(spec="http", options=options))


@pytest.mark.slow
@pytest.mark.parametrize("path", ["endless", "bomb"])
def test_an_endless_reply_is_cut_off_long_before_the_time_limit(server: str, path: str) -> None:
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ((_, status, detail),) = scores_from(f"{server}/{path}", texts(1), timeout=30.0)
    assert (status, detail) == (
        ScoreStatus.ERROR,
        f"RewardError: {server}/{path}: the answer is longer than 4,194,304 bytes; it was broken off",
    )
    assert time.monotonic() - began < 10
    if sys.platform == "linux" and path == "endless":
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB
