"""Client of an OpenAI-compatible chat endpoint. Every reply is cached on disk."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from raftune.clients.url import ResponseTooLarge, is_local, post, web_url
from raftune.config.secrets import expanded, masked, redacted
from raftune.sanitize import one_line
from raftune.store.files import write_json

if TYPE_CHECKING:
    import httpx2

ChatMessage = dict[str, str]
T = TypeVar("T")

MOST_BYTES = 32 * 2**20  # of an answer
EXCERPT = 160  # characters of a failed answer that are kept
IN_A_ROW = 24  # questions that fail one after another before the rest is given up
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

    timeout: seconds a question may take. A server that is busy or broken (429, 5xx, a connection that breaks off) is
    asked again up to `retries` times: after `backoff` seconds, then twice as many, or after what it asks for. Replies
    are kept under `cache`, by the hash of address, model, messages and parameters: what was answered once is not asked
    again. The key is sent, and neither shown nor kept.
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
        """A reply for each question, in order; equal questions are asked once. `tell` is called as one is answered.

        Works where an event loop is running already, as in a notebook. Failures are replies, not exceptions.
        """
        bodies = [self.body(messages) for messages in questions]
        names = [self.name_of(body) for body in bodies]
        found = {name: reply for name in dict.fromkeys(names) if (reply := self._kept(name)) is not None}
        missing = {name: body for name, body in zip(names, bodies, strict=True) if name not in found}
        if missing:
            found |= apart(lambda: self._ask_all(missing, tell))
        return [found[name] for name in names]

    def unanswered(self, questions: Sequence[list[ChatMessage]]) -> int:
        """How many different questions would be asked, because no reply to them is kept."""
        names = {self.name_of(self.body(messages)) for messages in questions}
        return sum(self._kept(name) is None for name in names)

    def body(self, messages: list[ChatMessage]) -> dict[str, Any]:
        """The request as the endpoint reads it; a parameter that is None is left out."""
        given = {name: value for name, value in self.parameters.items() if value is not None}
        return {"model": self.model, "messages": messages, **given}

    def name_of(self, body: Mapping[str, Any]) -> str:
        """The hash under which the reply to this request is kept."""
        canonical = json.dumps(
            {"url": redacted(self.url, references=False), **body}, sort_keys=True, ensure_ascii=False
        )
        return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()

    async def _ask_all(self, bodies: Mapping[str, dict[str, Any]], tell: Callable[[], None]) -> dict[str, ChatReply]:
        """The replies by name; so many questions are under way at once as `concurrency` says."""
        import httpx2

        queue, found = iter(bodies.items()), dict[str, ChatReply]()
        failed_in_a_row = 0

        async def work() -> None:
            nonlocal failed_in_a_row
            for name, body in queue:  # shared by all: each takes the next one
                if failed_in_a_row >= max(IN_A_ROW, 3 * self.concurrency):
                    found[name] = ChatReply(None, "not asked", f"{failed_in_a_row} questions before it failed in a row")
                    continue
                found[name] = reply = await self._ask(client, body)
                failed_in_a_row = 0 if reply.text is not None else failed_in_a_row + 1
                self._keep(name, body, reply)
                tell()

        # Proxies of the environment are for the world outside; a server on this machine is asked directly.
        async with (
            httpx2.AsyncClient(timeout=None, trust_env=not is_local(self.url), headers=self._headers()) as client,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(min(self.concurrency, len(bodies))):
                group.create_task(work())
        return found

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    async def _ask(self, client: httpx2.AsyncClient, body: Mapping[str, Any]) -> ChatReply:
        """The reply, after as many tries as it takes or is allowed."""
        for attempt in range(self.retries + 1):
            reply, wait = await self._try(client, body)
            if wait is None or attempt == self.retries:
                break
            await asyncio.sleep(min(max(wait, self.backoff * 2**attempt), LONGEST_WAIT))
        return ChatReply(reply.text, reply.failure, self._masked(reply.detail))

    async def _try(self, client: httpx2.AsyncClient, body: Mapping[str, Any]) -> tuple[ChatReply, float | None]:
        """One try, and the seconds to wait before another at least; None where another would not help."""
        import httpx2

        try:
            async with asyncio.timeout(self.timeout):  # of the whole answer: one that trickles in must end, too
                response = await post(client, self.url, MOST_BYTES, json=body)
        except (TimeoutError, httpx2.TimeoutException):
            return ChatReply(None, "timed out", f"no answer within {self.timeout:g} s"), None
        except httpx2.ConnectError as error:
            return ChatReply(None, "refused", str(error) or "no connection"), None
        except ResponseTooLarge as error:
            return ChatReply(None, "too long", str(error)), None
        except httpx2.HTTPError as error:  # such as a connection that the server closed while it was idle
            return ChatReply(None, "broke off", str(error) or type(error).__name__), 0.0
        if response.status_code in BUSY or response.status_code >= 500:
            return read_reply(response), seconds_asked_for(response.headers.get("retry-after"))
        return read_reply(response), None

    def _masked(self, detail: str) -> str:
        """What a server said, on one line, the key blotted out where it was repeated."""
        return one_line(masked(detail.replace(self.key, "***") if self.key else detail), EXCERPT)

    def _place(self, name: str) -> Path:
        assert self.cache is not None
        return self.cache / name[:2] / f"{name}.json"

    def _kept(self, name: str) -> ChatReply | None:
        """The reply of an earlier time; None where there is none that can be read."""
        if self.cache is None:
            return None
        try:
            text = json.loads(self._place(name).read_bytes())["reply"]
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return ChatReply(text, cached=True) if isinstance(text, str) else None

    def _keep(self, name: str, body: Mapping[str, Any], reply: ChatReply) -> None:
        """Writes a reply down, whole or not at all; failures are asked again another time."""
        if self.cache is not None and reply.text is not None:
            kept = {"url": redacted(self.url, references=False), "request": dict(body), "reply": reply.text}
            write_json(self.cache / "tmp", self._place(name), kept)


def read_reply(response: httpx2.Response) -> ChatReply:
    """The text of the first choice; a failure for any other status than 2xx, and for what is no chat completion."""
    if not response.is_success:
        return ChatReply(None, f"HTTP {response.status_code}", response.text or response.reason_phrase)
    try:
        text = response.json()["choices"][0]["message"]["content"]
    except (ValueError, TypeError, KeyError, IndexError):
        return ChatReply(None, "no chat completion", response.text or "an empty body")
    return ChatReply(text) if isinstance(text, str) else ChatReply(None, "no chat completion", response.text)


def seconds_asked_for(header: str | None) -> float:
    """The seconds of a Retry-After header; 0 where there is none, or where it is a date."""
    try:
        return max(0.0, float(header or 0))
    except ValueError:
        return 0.0


def chat_url(url: str, flag: str = "--judge") -> str:
    """The address of /chat/completions that the given URL means. Raises ConfigError that names `flag`.

    `http://host:8000`, `http://host:8000/v1` and the whole address all do; a query stays. `${NAME}` in it is the value
    of that environment variable.
    """
    given = web_url(expanded(url, flag), flag, "Write http://127.0.0.1:8000/v1, for example.", "--judge-key-env")
    path = given.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path = f"{path or '/v1'}/chat/completions"
    return str(given.copy_with(path=path))


def apart(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """The result of a coroutine, run on a loop and a thread of its own; it is cancelled when we are interrupted."""
    began = threading.Event()
    at: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = []

    async def noted() -> T:
        task = asyncio.current_task()
        assert task is not None
        at.append((asyncio.get_running_loop(), task))
        began.set()
        return await work()

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(asyncio.run, noted())
        try:
            return future.result()
        except BaseException:
            if not future.done() and began.wait(1):
                loop, task = at[0]
                loop.call_soon_threadsafe(task.cancel)
            raise
