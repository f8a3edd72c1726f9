"""Client of /v1/completions with token ids in and out, as vLLM and SGLang speak it.

Requests go to several servers at once, each at most so many at a time, and replies come in the order in which they end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from raftune.clients.url import ResponseTooLarge, is_local, post, web_url
from raftune.config.secrets import expanded, masked
from raftune.errors import EngineError
from raftune.sanitize import one_line
from raftune.store.interruption import raise_if_asked

if TYPE_CHECKING:
    import httpx2

MOST_BYTES = 64 * 2**20  # of a reply
EXCERPT = 300  # characters of a server's words that are shown
BACKOFF, LONGEST_WAIT = 0.5, 15.0  # seconds before the second try, doubled for each further one
TICK = 0.5  # seconds between two looks at whether the run was asked to stop
AGAIN = frozenset({408, 425, 429})  # besides every 5xx: worth another try


class ServerLost(EngineError):
    """A server does not answer any more: no connection, an error of its own, or no answer in time, also when tried
    again. Starting it again may help."""


class ServerRefused(EngineError):
    """A server refuses a request, or its answers are not what they have to be: trying again would not help."""


@dataclass(frozen=True)
class ServedCompletion:
    """A server's completion: its ids with a log-probability for each (nats); `echoed` are those of the prompt's ids but
    the first, where they were requested. `finish` is the server's own word."""

    ids: list[int]
    log_probs: list[float]
    finish: str
    echoed: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class CompletionsServer:
    """A server at `url`, which ends in /v1. `timeout`: seconds for a reply. The key is never shown or kept."""

    url: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 600.0
    retries: int = 3
    concurrency: int = 256

    def get(self, path: str, timeout: float | None = None) -> Any:
        """The JSON that a GET of this path gives. `..` in it leaves /v1. Raises ServerLost, ServerRefused."""
        return self._once("GET", path, None, timeout)

    def post(self, path: str, body: Mapping[str, Any], timeout: float | None = None) -> Any:
        """The JSON that a POST gives, None where the answer is none; it is not tried again."""
        return self._once("POST", path, body, timeout)

    def _once(self, method: str, path: str, body: Mapping[str, Any] | None, timeout: float | None) -> Any:
        import httpx2

        url = self.url.removesuffix("/v1") + path.removeprefix("..") if path.startswith("..") else self.url + path
        try:
            with httpx2.Client(timeout=timeout or self.timeout, **self.options) as http:
                response = http.request(method, url, json=body)
        except httpx2.TimeoutException:
            raise ServerLost(f"{self.shown} gave no answer within {timeout or self.timeout:g} s") from None
        except httpx2.HTTPError as error:
            raise ServerLost(f"{self.shown} cannot be reached: {str(error) or type(error).__name__}") from None
        if not response.is_success:
            kind = ServerLost if response.status_code >= 500 else ServerRefused
            raise kind(f"{self.shown} answered {path.removeprefix('..')} with {self.words(response)}")
        try:
            return response.json()
        except ValueError:
            return None

    @property
    def options(self) -> dict[str, Any]:
        """The options of an HTTP client for this server."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        # Proxies of the environment are for the world outside; a server on this machine is asked directly. Certificates
        # are read only where there are some: that takes as long as a few completions.
        return {"headers": headers, "trust_env": not is_local(self.url), "verify": self.url.startswith("https:")}

    @property
    def shown(self) -> str:
        """The address, without what is secret in it."""
        return masked(self.url)

    def words(self, response: httpx2.Response) -> str:
        """The status of a failed reply and the server's message, in a line; the key is blotted out in it."""
        text = response.text
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
            error = json.loads(text)
            error = error.get("error", error)
            text = str(error.get("message") or error.get("detail") or text) if isinstance(error, dict) else str(error)
        text = masked(text.replace(self.key, "***") if self.key else text)
        return one_line(f"HTTP {response.status_code}: {text or response.reason_phrase}", EXCERPT)


def completions_url(url: str, field: str) -> str:
    """The address in front of /completions that the URL means; `http://host:8000` and `…/v1` both do."""
    parsed = web_url(
        expanded(url, field), field, "Write http://127.0.0.1:8000, for example.", "sampling.backend.key_env"
    )
    path = parsed.path.rstrip("/").removesuffix("/completions")
    return str(parsed.copy_with(path=path if path.endswith("/v1") else f"{path}/v1"))


def complete(
    servers: Sequence[CompletionsServer], requests: Mapping[int, tuple[int, Mapping[str, Any]]]
) -> Iterator[tuple[int, ServedCompletion]]:
    """The completions, by the requests' numbers, in the order in which they end; requests[i] is the number of its
    server and the body.

    The requests run in a thread of their own; where the iterator is left early, they are broken off. Raises ServerLost,
    ServerRefused for the first request that fails for good; those under way are broken off then.
    """
    done: SimpleQueue[tuple[int, ServedCompletion] | None] = SimpleQueue()
    with contextlib.closing(asyncio.new_event_loop()) as loop, ThreadPoolExecutor(1) as pool:
        task = loop.create_task(_complete_all(servers, requests, done))
        future = pool.submit(loop.run_until_complete, task)
        future.add_done_callback(lambda _: done.put(None))
        try:
            while True:
                try:
                    item = done.get(timeout=TICK)
                except Empty:
                    raise_if_asked()  # a server that hangs must not keep a user waiting
                    continue
                if item is None:
                    break
                yield item
            future.result()
        except BaseExceptionGroup as group:
            raise first_of(group) from None
        finally:
            if not future.done():
                loop.call_soon_threadsafe(task.cancel)


def first_of(group: BaseExceptionGroup[Any]) -> BaseException:
    """The first error inside the group."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _complete_all(
    servers: Sequence[CompletionsServer],
    requests: Mapping[int, tuple[int, Mapping[str, Any]]],
    done: SimpleQueue[tuple[int, ServedCompletion] | None],
) -> None:
    import httpx2

    async def work(server: CompletionsServer, client: httpx2.AsyncClient, queue: Iterator[int]) -> None:
        for number in queue:  # shared by all workers of a server: each takes the next one
            done.put((number, await _complete(server, client, requests[number][1])))

    async with contextlib.AsyncExitStack() as clients, asyncio.TaskGroup() as group:
        for place, server in enumerate(servers):
            mine = [number for number, (at, _) in requests.items() if at == place]
            workers = min(server.concurrency, len(mine))
            limits = httpx2.Limits(max_connections=workers, max_keepalive_connections=workers)
            client = httpx2.AsyncClient(timeout=None, limits=limits, **server.options)
            await clients.enter_async_context(client)
            queue = iter(mine)
            for _ in range(workers):
                group.create_task(work(server, client, queue))


async def _complete(server: CompletionsServer, client: httpx2.AsyncClient, body: Mapping[str, Any]) -> ServedCompletion:
    """The completion, after as many tries as are needed or allowed."""
    import httpx2

    for attempt in range(server.retries + 1):
        if attempt:
            await asyncio.sleep(min(BACKOFF * 2 ** (attempt - 1), LONGEST_WAIT))
        try:
            async with asyncio.timeout(server.timeout):
                response = await post(client, f"{server.url}/completions", MOST_BYTES, json=body)
        except (TimeoutError, httpx2.TimeoutException):
            failure = f"gave no answer within {server.timeout:g} s"
            continue
        except ResponseTooLarge as error:
            raise ServerRefused(f"{server.shown}: {error}") from None
        except httpx2.HTTPError as error:
            failure = f"broke off: {str(error) or type(error).__name__}"
            continue
        if response.is_success:
            return read_completion(server.shown, response.content, body)
        failure = f"answered {server.words(response)}"
        if response.status_code not in AGAIN and response.status_code < 500:
            raise ServerRefused(f"{server.shown} {failure}")
    raise ServerLost(f"{server.shown} {failure} ({server.retries + 1} tries)")


def read_completion(server: str, content: bytes, body: Mapping[str, Any]) -> ServedCompletion:
    """The completion in a reply of this server. Raises ServerRefused for anything but exactly one completion of 1 to
    max_tokens token ids with as many finite log-probabilities."""
    try:
        reply = json.loads(content)
        choices = reply["choices"]
    except (ValueError, TypeError, KeyError):
        raise ServerRefused(
            f"{server} gave no completion: {one_line(content.decode(errors='replace'), EXCERPT)}"
        ) from None
    if not isinstance(choices, list) or len(choices) != 1:
        raise ServerRefused(f"{server} must give one completion a request; got {len(choices)}: it ignores `n`")
    choice = choices[0] if isinstance(choices[0], dict) else {}
    ids, given = choice.get("token_ids"), choice.get("logprobs")
    numbers = given.get("token_logprobs") if isinstance(given, dict) else None
    if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
        raise ServerRefused(
            f"{server} must give the token ids of a completion (`return_token_ids`); got none. vLLM does from 0.10.2 on"
        )
    if not isinstance(numbers, list):
        raise ServerRefused(f"{server} must give the log-probabilities of a completion (`logprobs`); got none")
    echoed: list[Any] = []
    if body.get("echo"):
        given = choice.get("prompt_token_ids")
        if given is not None and given != list(body["prompt"]):
            raise ServerRefused(f"{server} must take the prompt's token ids as they are; it echoed others")
        size = len(body["prompt"])
        echoed, numbers = numbers[1:size], numbers[size : size + len(ids)]
        if len(echoed) != size - 1:
            raise ServerRefused(f"{server} must echo the log-probabilities of a prompt (`echo`); got too few")
    if not 0 < len(ids) <= body["max_tokens"]:
        raise ServerRefused(f"{server} must give 1 to {body['max_tokens']} token ids (`max_tokens`); got {len(ids)}")
    if len(numbers) != len(ids):
        raise ServerRefused(f"{server} must give a log-probability for each token; got {len(numbers)} for {len(ids)}")
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in [*numbers, *echoed]):
        raise ServerRefused(f"{server} must give finite log-probabilities; got one that is not")
    return ServedCompletion(
        ids, [float(n) for n in numbers], str(choice.get("finish_reason")), [float(n) for n in echoed]
    )
