"""Client of an OpenAI-compatible chat endpoint. Every reply is cached on disk."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raftune.clients.url import ResponseTooLarge, is_local, post, web_url
from raftune.config.secrets import expanded, masked, redacted
from raftune.sanitize import one_line
from raftune.store.files import sha256_hex, write_json

if TYPE_CHECKING:
    import httpx2

ChatMessage = dict[str, str]

MOST_BYTES = 32 * 2**20  # of a reply
EXCERPT = 160  # characters of a failed reply that are kept
IN_A_ROW = 24  # requests that fail one after another before the rest is given up
LONGEST_WAIT = 30.0  # seconds between two tries
BUSY = frozenset({408, 425, 429})  # besides every 5xx: worth another try


@dataclass(frozen=True, slots=True)
class ChatReply:
    """A reply: the text, or None with the kind of failure and its message."""

    text: str | None
    failure: str = ""
    detail: str = ""
    cached: bool = False


@dataclass(frozen=True)
class ChatEndpoint:
    """A chat model at `url`; `parameters` go into every request beside model and messages.

    timeout: seconds for one whole reply. A server that is busy or broken (429, 5xx, a connection that breaks off) is
    asked up to `retries` times more, after `backoff` seconds, doubled each time, or its Retry-After. Replies are cached
    under `cache` by the hash of URL, model, messages and parameters. The key is sent, and neither shown nor kept.
    """

    url: str
    model: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    timeout: float = 60.0
    concurrency: int = 8
    retries: int = 3
    cache: Path | None = None
    key: str | None = field(default=None, repr=False)
    backoff: float = 0.5

    def ask(self, questions: Sequence[list[ChatMessage]], tell: Callable[[], None] = lambda: None) -> list[ChatReply]:
        """A reply for each question, in order; equal questions are asked once. `tell` is called after each reply.

        Works where an event loop is running already, as in a notebook. Failures are replies, not exceptions.
        """
        requests = dict(map(self._request, questions))
        replies = {name: reply for name in requests if (reply := self._cached(name)) is not None}
        missing = {name: body for name, body in requests.items() if name not in replies}
        if missing:
            with contextlib.closing(asyncio.new_event_loop()) as loop, ThreadPoolExecutor(1) as pool:
                task = loop.create_task(self._ask_all(missing, tell))
                try:
                    replies |= pool.submit(loop.run_until_complete, task).result()
                except BaseException:  # interrupted: the pool waits until the task has ended
                    loop.call_soon_threadsafe(task.cancel)
                    raise
        return [replies[self._request(messages)[0]] for messages in questions]

    def unanswered(self, questions: Sequence[list[ChatMessage]]) -> int:
        """How many different questions have no cached reply."""
        return sum(self._cached(name) is None for name in dict(map(self._request, questions)))

    def _request(self, messages: list[ChatMessage]) -> tuple[str, dict[str, Any]]:
        """The hash under which the reply is cached, and the body; a parameter that is None is left out."""
        parameters = {name: value for name, value in self.parameters.items() if value is not None}
        body = {"model": self.model, "messages": messages, **parameters}
        keyed = {"url": redacted(self.url, references=False), **body}
        return sha256_hex([json.dumps(keyed, sort_keys=True, ensure_ascii=False)]), body

    async def _ask_all(self, bodies: Mapping[str, dict[str, Any]], tell: Callable[[], None]) -> dict[str, ChatReply]:
        """The replies by name, with at most `concurrency` requests at once."""
        import httpx2

        queue, replies = iter(bodies.items()), dict[str, ChatReply]()
        failed_in_a_row = 0

        async def work() -> None:
            nonlocal failed_in_a_row
            for name, body in queue:  # shared by all: each takes the next one
                if failed_in_a_row >= max(IN_A_ROW, 3 * self.concurrency):
                    reason = f"{failed_in_a_row} questions before it failed in a row"
                    replies[name] = ChatReply(None, "not asked", reason)
                    continue
                replies[name] = reply = await self._ask(client, body)
                failed_in_a_row = 0 if reply.text is not None else failed_in_a_row + 1
                if self.cache is not None and reply.text is not None:
                    record = {"url": redacted(self.url, references=False), "request": body, "reply": reply.text}
                    write_json(self.cache / "tmp", self.cache / name[:2] / f"{name}.json", record)
                tell()

        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        # Proxies of the environment are for the world outside; a server on this machine is asked directly.
        async with (
            httpx2.AsyncClient(timeout=None, trust_env=not is_local(self.url), headers=headers) as client,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(min(self.concurrency, len(bodies))):
                group.create_task(work())
        return replies

    async def _ask(self, client: httpx2.AsyncClient, body: Mapping[str, Any]) -> ChatReply:
        """The reply, after as many tries as needed or allowed; the key is blotted out where the server repeats it."""
        for attempt in range(self.retries + 1):
            reply, wait = await self._try(client, body)
            if wait is None or attempt == self.retries:
                break
            await asyncio.sleep(min(max(wait, self.backoff * 2**attempt), LONGEST_WAIT))
        detail = masked(reply.detail.replace(self.key, "***") if self.key else reply.detail)
        return ChatReply(reply.text, reply.failure, one_line(detail, EXCERPT))

    async def _try(self, client: httpx2.AsyncClient, body: Mapping[str, Any]) -> tuple[ChatReply, float | None]:
        """One try, and the least seconds to wait before another; None where another would not help."""
        import httpx2

        try:
            async with asyncio.timeout(self.timeout):  # of the whole reply: one that trickles in must end, too
                response = await post(client, self.url, MOST_BYTES, json=body)
        except (TimeoutError, httpx2.TimeoutException):
            return ChatReply(None, "timed out", f"no answer within {self.timeout:g} s"), None
        except httpx2.ConnectError as error:
            return ChatReply(None, "refused", str(error) or "no connection"), None
        except ResponseTooLarge as error:
            return ChatReply(None, "too long", str(error)), None
        except httpx2.HTTPError as error:  # such as a connection that the server closed while it was idle
            return ChatReply(None, "broke off", str(error) or type(error).__name__), 0.0
        if not response.is_success:
            wait = None
            if response.status_code in BUSY or response.status_code >= 500:
                wait = 0.0
                with contextlib.suppress(ValueError):  # a date
                    wait = max(0.0, float(response.headers.get("retry-after") or 0))
            return ChatReply(None, f"HTTP {response.status_code}", response.text or response.reason_phrase), wait
        try:
            text = response.json()["choices"][0]["message"]["content"]
        except (ValueError, TypeError, KeyError, IndexError):
            text = None
        if not isinstance(text, str):
            return ChatReply(None, "no chat completion", response.text or "an empty body"), None
        return ChatReply(text), None

    def _cached(self, name: str) -> ChatReply | None:
        """The cached reply; None where there is none that can be read."""
        if self.cache is None:
            return None
        try:
            text = json.loads((self.cache / name[:2] / f"{name}.json").read_bytes())["reply"]
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return ChatReply(text, cached=True) if isinstance(text, str) else None


def chat_url(url: str, flag: str = "--judge") -> str:
    """The address of /chat/completions that the URL means. Raises ConfigError that names `flag`.

    `http://host:8000`, `http://host:8000/v1` and the whole address all do; a query stays. `${NAME}` in it is the value
    of that environment variable.
    """
    parsed = web_url(expanded(url, flag), flag, "Write http://127.0.0.1:8000/v1, for example.", "--judge-key-env")
    path = parsed.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path = f"{path or '/v1'}/chat/completions"
    return str(parsed.copy_with(path=path))
