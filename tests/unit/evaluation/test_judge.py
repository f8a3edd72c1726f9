"""A judge that is asked in both orders, behind real servers on this machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raftune.clients.chat import ChatEndpoint, ChatReply, chat_url
from raftune.errors import ConfigError, RewardError
from raftune.evaluation.judge import FIRST, PLACES, TEMPLATE, check_template, judge, question, read_verdict
from tests.unit.clients.servers import Answer, chat, closed_url, question_of, serving

SHORT = "{prompt}|{answer_a}|{answer_b}"
PAIRS = [
    ("name a fruit", "a pear", "no"),
    ("name a town", "no", "a town on the sea"),
    ("name a tree", "an oak", "an oak"),
]


def endpoint(url: str, **changes: Any) -> ChatEndpoint:
    return ChatEndpoint(chat_url(url), "judge", **{"timeout": 5.0, "backoff": 0.01, **changes})


def longer(body: dict[str, Any]) -> Answer:
    """A judge who prefers the longer answer, and reasons before the verdict."""
    _, first, second = question_of(body).split("|")
    return chat(f"[[A]] has {len(first)} letters. So: [[{'A' if len(first) > len(second) else 'B'}]]")


# -- verdicts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("[[A]]", "A"),
        ("The first one, so [[ b ]].", "B"),
        ("[[tie]]", "tie"),
        ("[[C]]", "tie"),
        ("Answer A says [[B]], which is a trick. [[A]]", "A"),
        ("A", "A"),
        (" b.\n", "B"),
        ("**Tie**", "tie"),
        ("Answer: B", "B"),
        ("Verdict: [A]", "A"),
        ("", None),
        ("Answer A is better.", None),
        ("A and B", None),
        ("Apple", None),
        ("[[D]]", None),
    ],
)
def test_a_verdict_is_read_where_there_is_one_beyond_doubt(text: str, meant: str | None) -> None:
    assert read_verdict(ChatReply(text)) == meant


def test_a_question_that_failed_has_no_verdict() -> None:
    assert read_verdict(ChatReply(None, "timed out", "[[A]]")) is None


def test_both_orders_are_asked_and_an_identical_pair_is_not() -> None:
    with serving(longer) as server:
        found = judge(endpoint(server.url), PAIRS, SHORT)
    contents = sorted(question_of(body) for body in server.requests)
    assert contents == sorted(
        [
            "name a fruit|a pear|no",
            "name a fruit|no|a pear",
            "name a town|no|a town on the sea",
            "name a town|a town on the sea|no",
        ]
    )
    assert found.outcomes.tolist() == [1.0, -1.0, 0.0]
    assert (found.questions, found.identical, found.inconsistent, found.first, found.failures) == (4, 1, 0.0, 0.5, {})


@pytest.mark.parametrize(("always", "first"), [("A", 1.0), ("B", 0.0)])
def test_a_judge_who_looks_at_the_place_alone_gives_ties_and_is_detected(always: str, first: float) -> None:
    with serving(lambda body: chat(f"[[{always}]]")) as server:
        found = judge(endpoint(server.url), PAIRS[:2])
    assert found.outcomes.tolist() == [0.0, 0.0]
    assert (found.inconsistent, found.first) == (1.0, first)


def test_a_verdict_in_one_order_and_a_tie_in_the_other_disagree() -> None:
    with serving(
        lambda body: chat("[[A]]" if question_of(body).startswith("name a fruit|a pear") else "[[tie]]")
    ) as server:
        found = judge(endpoint(server.url), PAIRS[:2], SHORT)
    assert found.outcomes.tolist() == [0.0, 0.0]
    assert found.inconsistent == 0.5


# -- failures ----------------------------------------------------------------------------------------------------------


def test_a_failure_is_counted_by_its_kind_and_is_no_tie() -> None:
    def unreliable(body: dict[str, Any]) -> Answer:
        if question_of(body).startswith("name a fruit|a pear"):
            return chat("I like pears.")
        return (400, {}, b"no") if question_of(body).startswith("name a town|no") else longer(body)

    with serving(unreliable) as server:
        found = judge(endpoint(server.url), PAIRS, SHORT)
    np.testing.assert_array_equal(found.outcomes, [np.nan, np.nan, 0.0])
    assert found.failures == {"nonsense": 1, "HTTP 400": 1}
    assert found.inconsistent is None  # no pair has two verdicts


def test_more_failures_than_verdicts_are_an_error_with_examples() -> None:
    with (
        serving(lambda body: chat("Who can say?") if "|a" in question_of(body) else longer(body)) as server,
        pytest.raises(RewardError) as refused,
    ):
        judge(endpoint(server.url), [("x", "a b", "a c"), ("y", "a d", "e")], SHORT)
    assert str(refused.value).startswith("the judge gave no verdict on 4 of 4 questions (4 nonsense).")
    assert "  nonsense: 'Who can say?'" in str(refused.value)
    assert "--judge-prompt" in str(refused.value)


def test_a_judge_who_starts_with_nonsense_alone_is_not_asked_to_the_end() -> None:
    pairs = [(str(i), "a", "b") for i in range(50)]
    said = re.escape(
        f"no verdict on {FIRST} of {FIRST} questions ({FIRST} nonsense); the other {100 - FIRST} were not asked."
    )
    with serving(lambda body: chat("mu")) as server, pytest.raises(RewardError, match=said):
        judge(endpoint(server.url), pairs)
    assert len(server.requests) == FIRST


@pytest.mark.parametrize(
    ("status", "advice"),
    [(401, "Check the key"), (404, "--judge-model"), (429, "--judge-concurrency"), (500, "--judge-parameters")],
)
def test_the_error_says_what_to_do(status: int, advice: str) -> None:
    with serving(lambda body: (status, {}, b"no")) as server, pytest.raises(RewardError, match=advice):
        judge(endpoint(server.url, retries=0), PAIRS)


def test_a_judge_who_is_not_there_is_named() -> None:
    url = closed_url()
    with pytest.raises(RewardError, match=re.escape(f"Is a server running at {chat_url(url)}?")):
        judge(endpoint(url), PAIRS)


# -- the template ------------------------------------------------------------------------------------------------------


def test_what_completions_hold_is_never_taken_for_a_place() -> None:
    [message] = question(SHORT, "{answer_b}", "{prompt}{answer_a}", " spaced \n")
    assert message["content"] == "{answer_b}|{prompt}{answer_a}|spaced"


def test_of_messages_every_one_is_shown_with_its_role() -> None:
    several = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    assert question("{prompt}", several, "", "")[0]["content"] == "system: be kind\n\nuser: hi"
    assert question("{prompt}", several[1:], "", "")[0]["content"] == "hi"


def test_a_template_that_lacks_a_place_is_refused() -> None:
    assert check_template(TEMPLATE, "ours") == TEMPLATE
    for place in PLACES:
        with pytest.raises(ConfigError, match=re.escape(f"{place} is missing from mine.txt")):
            check_template(TEMPLATE.replace(place, ""), "mine.txt")


def test_a_second_judgement_asks_nothing(tmp_path: Path) -> None:
    with serving(longer) as server:
        client = endpoint(server.url, cache=tmp_path)
        told: list[tuple[int, int]] = []
        first, second = (judge(client, PAIRS, SHORT, lambda done, of: told.append((done, of))) for _ in range(2))
    assert len(server.requests) == 4
    assert sorted(told) == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert first.outcomes.tolist() == second.outcomes.tolist()
    assert (first.cached, second.cached) == (0, 4)
