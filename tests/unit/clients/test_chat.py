"""The client of a chat endpoint, against real servers on this machine that behave and misbehave."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from raftune.clients.chat import IN_A_ROW, ChatEndpoint, ChatReply, chat_url
from raftune.clients.url import is_local
from raftune.errors import ConfigError
from tests.unit.clients.servers import HANG_UP, Answer, chat, closed_url, question_of, serving, silent

QUICK: dict[str, Any] = {"timeout": 5.0, "backoff": 0.01}


def endpoint(url: str, **changes: Any) -> ChatEndpoint:
    return ChatEndpoint(chat_url(url), "judge", **{**QUICK, **changes})


def user_message(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def echo(body: dict[str, Any]) -> Answer:
    return chat(f"echo {question_of(body)}")


# -- replies -----------------------------------------------------------------------------------------------------------


def test_replies_come_in_the_order_of_the_questions() -> None:
    def late(body: dict[str, Any]) -> Answer:
        time.sleep(0.05 if question_of(body) == "0" else 0)
        return echo(body)

    with serving(late) as server:
        replies = endpoint(server.url, parameters={"temperature": 0}).ask([user_message(str(i)) for i in range(6)])
    assert [reply.text for reply in replies] == [f"echo {i}" for i in range(6)]
    assert {"model": "judge", "messages": user_message("3"), "temperature": 0} in server.requests
    assert set(server.paths) == {"/v1/chat/completions"}


def test_a_parameter_that_is_none_is_left_out() -> None:
    with serving(echo) as server:
        endpoint(server.url, parameters={"temperature": 0, "max_tokens": None}).ask([user_message("a")])
    assert server.requests == [{"model": "judge", "messages": user_message("a"), "temperature": 0}]


def test_no_more_questions_are_under_way_than_allowed() -> None:
    def slow(body: dict[str, Any]) -> Answer:
        time.sleep(0.03)
        return echo(body)

    with serving(slow) as server:
        endpoint(server.url, concurrency=3).ask([user_message(str(i)) for i in range(12)])
    assert server.most_at_once == 3


def test_equal_questions_are_sent_once_and_progress_is_reported() -> None:
    told: list[int] = []
    with serving(echo) as server:
        replies = endpoint(server.url).ask(
            [user_message("a"), user_message("a"), user_message("b")], lambda: told.append(1)
        )
    assert [reply.text for reply in replies] == ["echo a", "echo a", "echo b"]
    assert len(server.requests) == len(told) == 2


def test_it_can_be_asked_where_an_event_loop_is_running() -> None:
    async def cell() -> list[ChatReply]:
        return endpoint(server.url).ask([user_message("a")])

    with serving(echo) as server:
        assert [reply.text for reply in asyncio.run(cell())] == ["echo a"]


def test_an_interruption_ends_it_at_once() -> None:
    with silent() as url:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            endpoint(url, timeout=60).ask([user_message(str(i)) for i in range(20)])
    assert time.monotonic() - began < 30


# -- failures ----------------------------------------------------------------------------------------------------------


def test_a_closed_port_refuses() -> None:
    [reply] = endpoint(closed_url()).ask([user_message("a")])
    assert (reply.text, reply.failure) == (None, "refused")


@pytest.mark.parametrize("drip", [b"", b" "], ids=["silent", "trickling"])
def test_a_reply_that_does_not_end_in_time_is_timed_out(drip: bytes) -> None:
    with silent(drip) as url:
        began = time.monotonic()
        [reply] = endpoint(url, timeout=0.3).ask([user_message("a")])
    assert (reply.failure, reply.detail) == ("timed out", "no answer within 0.3 s")
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_or_broken_server_is_retried(status: int) -> None:
    answers = iter([(status, {}, b"later"), (status, {}, b"later"), chat("now")])
    with serving(lambda body: next(answers)) as server:
        [reply] = endpoint(server.url, retries=2).ask([user_message("a")])
    assert reply.text == "now"
    assert len(server.requests) == 3


def test_after_the_last_try_the_status_is_the_failure() -> None:
    with serving(lambda body: (500, {}, b"out of\nmemory")) as server:
        [reply] = endpoint(server.url, retries=1).ask([user_message("a")])
    assert (reply.failure, reply.detail) == ("HTTP 500", "out of ⏎ memory")
    assert len(server.requests) == 2


def test_a_server_that_names_its_pause_gets_it() -> None:
    answers = iter([(429, {"Retry-After": "0.4"}, b""), chat("now")])
    with serving(lambda body: next(answers)) as server:
        began = time.monotonic()
        [reply] = endpoint(server.url).ask([user_message("a")])
    assert reply.text == "now"
    assert time.monotonic() - began >= 0.4


@pytest.mark.parametrize("status", [301, 400, 401, 404])
def test_what_another_try_would_not_fix_is_tried_once(status: int) -> None:
    with serving(lambda body: (status, {"Location": "/elsewhere"}, b"no such model")) as server:
        [reply] = endpoint(server.url).ask([user_message("a")])
    assert (reply.failure, reply.detail) == (f"HTTP {status}", "no such model")
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "content",
    [b"", b"<html>", b"[]", b"{}", b'{"choices": []}', b"\xff", b'{"choices": [{"message": {"content": null}}]}'],
)
def test_what_is_no_chat_completion_is_reported_to_be_none(content: bytes) -> None:
    with serving(lambda body: (200, {}, content)) as server:
        [reply] = endpoint(server.url).ask([user_message("a")])
    assert (reply.text, reply.failure) == (None, "no chat completion")


def test_a_connection_that_breaks_off_is_tried_again_and_then_a_failure() -> None:
    answers = iter([(HANG_UP, {}, b""), chat("now")])
    with serving(lambda body: next(answers)) as server:
        assert endpoint(server.url).ask([user_message("a")])[0].text == "now"
    with serving(lambda body: (HANG_UP, {}, b"")) as server:
        [reply] = endpoint(server.url, retries=1).ask([user_message("a")])
    assert (reply.text, reply.failure) == (None, "broke off")
    assert len(server.requests) == 2


def test_an_endpoint_that_keeps_failing_is_not_asked_to_the_end() -> None:
    with serving(lambda body: (400, {}, b"no")) as server:
        replies = endpoint(server.url, concurrency=2).ask([user_message(str(i)) for i in range(100)])
    assert IN_A_ROW <= len(server.requests) < IN_A_ROW + 2
    assert {reply.failure for reply in replies} == {"HTTP 400", "not asked"}


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_a_second_run_asks_nothing(tmp_path: Path) -> None:
    questions = [user_message("a"), user_message("ü 東京 🙂")]
    with serving(echo) as server:
        client = endpoint(server.url, cache=tmp_path)
        assert client.unanswered(questions) == 2
        first, second = client.ask(questions), client.ask(questions)
    assert len(server.requests) == 2
    assert [reply.text for reply in first] == [reply.text for reply in second]
    assert [reply.cached for reply in (*first, *second)] == [False, False, True, True]
    assert client.unanswered(questions) == 0


@pytest.mark.parametrize("change", [{"parameters": {"temperature": 1}}, {"model": "other"}, {"url": "query"}])
def test_another_model_address_or_parameter_is_asked_anew(tmp_path: Path, change: dict[str, Any]) -> None:
    with serving(echo) as server:
        address = chat_url(server.url)
        ChatEndpoint(address, "judge", cache=tmp_path).ask([user_message("a")])
        given = {"url": address, "model": "judge", **change}
        given["url"] = f"{address}?version=2" if given["url"] == "query" else address
        ChatEndpoint(**given, cache=tmp_path).ask([user_message("a")])
    assert len(server.requests) == 2


def test_a_failure_is_retried_another_time(tmp_path: Path) -> None:
    answers = iter([(400, {}, b"no"), chat("yes")])
    with serving(lambda body: next(answers)) as server:
        client = endpoint(server.url, cache=tmp_path)
        assert [client.ask([user_message("a")])[0].text for _ in range(2)] == [None, "yes"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"reply": 3}'])
def test_a_damaged_file_is_as_good_as_none(tmp_path: Path, content: bytes) -> None:
    with serving(echo) as server:
        client = endpoint(server.url, cache=tmp_path)
        client.ask([user_message("a")])
        [file] = tmp_path.rglob("*.json")
        file.write_bytes(content)
        assert client.ask([user_message("a")]) == [ChatReply("echo a")]
    assert json.loads(file.read_bytes())["reply"] == "echo a"


def test_the_key_is_sent_and_neither_shown_nor_kept(tmp_path: Path) -> None:
    key = "sk-very-secret"
    with serving(
        lambda body: chat("hm") if question_of(body) == "fine" else (401, {}, f"bad key {key}".encode())
    ) as server:
        client = endpoint(server.url, cache=tmp_path, key=key)
        replies = client.ask([user_message("fine"), user_message("bad")])
    assert {headers["authorization"] for headers in server.headers} == {f"Bearer {key}"}
    assert replies[1].detail == "bad key ***"
    assert key not in repr(client)
    assert [path for path in tmp_path.rglob("*") if path.is_file() and key.encode() in path.read_bytes()] == []


def test_without_a_key_no_header_is_sent() -> None:
    with serving(echo) as server:
        endpoint(server.url).ask([user_message("a")])
    assert "authorization" not in server.headers[0]


def test_a_proxy_of_the_environment_is_not_asked_about_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, closed_url())
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with serving(echo) as server:
        assert endpoint(server.url).ask([user_message("a")])[0].text == "echo a"


# -- addresses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1/chat/completions"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1/chat/completions"),
        ("https://host/v1/", "https://host/v1/chat/completions"),
        ("https://host/deep/path?api-version=1", "https://host/deep/path/chat/completions?api-version=1"),
        ("https://host/v1/chat/completions", "https://host/v1/chat/completions"),
    ],
)
def test_an_address_may_be_written_in_several_ways(given: str, meant: str) -> None:
    assert chat_url(given) == meant


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("127.0.0.1:8000", "must be a URL that begins with http:// or https://; got '127.0.0.1:8000'."),
        ("ftp://host", "must be a URL that begins with http:// or https://"),
        ("http://", "must be a URL that begins with http:// or https://"),
        ("http://host:port", "must be the URL of an endpoint; got 'http://host:port'"),
        ("http://me:secret@host/v1", "must hold no password"),
    ],
)
def test_what_is_no_address_is_refused(given: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as refused:
        chat_url(given)
    assert "secret" not in str(refused.value)


def test_this_machine_is_known_by_its_names() -> None:
    local = ["http://127.0.0.1:1/v1", "http://localhost/v1", "http://[::1]:8000/v1", "http://127.9.9.9/"]
    assert [is_local(url) for url in [*local, "https://example.org/v1", "http://10.0.0.1/"]] == [True] * 4 + [False] * 2
