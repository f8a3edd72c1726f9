"""Reward `http`: a server that scores samples."""

from __future__ import annotations

import asyncio
import base64
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from raftune.clients.url import ResponseTooLarge, is_local, post, web_url
from raftune.config.secrets import masked, redacted
from raftune.data.images import png_of
from raftune.errors import ConfigError, RewardError
from raftune.rewards.batch import RESERVED
from raftune.rewards.fingerprint import digest
from raftune.rewards.media import is_image
from raftune.rewards.registry import BuiltInReward, builtin
from raftune.sanitize import one_line

if TYPE_CHECKING:
    import httpx2

EXCERPT = 160  # characters of a wrong answer that are shown
MOST_BYTES = 4 * 2**20  # of an answer: numbers for a few samples, and whatever else the server says


@builtin("http", media=("text", "messages", "image"), example={"url": "http://127.0.0.1:8000/score"})
@dataclass
class HttpReward(BuiltInReward):
    """The scores of a server: one number or null per sample, in order.

    Each request is a POST of {"prompts": […], "completions": […], "media": "text" or "image", "columns": {name: […]}},
    images as PNG in base64. The response is {"scores": […]}. Redirects, errors of the server and other responses are
    errors of that call. rewards.timeout limits its time, and rewards.retries repeats it.
    """

    url: Annotated[str, Field(description="The server's address.")]
    batch_size: Annotated[int, Field(description="Samples in a request.")] = 16
    concurrency: Annotated[int, Field(description="Concurrent requests.")] = 4
    columns: Annotated[
        list[str] | None, Field(description="Columns of the data that are sent with the samples; null: all.")
    ] = None
    key_env: Annotated[
        str | None, Field(description="Environment variable whose value is sent as the bearer token.")
    ] = None
    headers: Annotated[
        dict[str, str] | None, Field(description="Further headers of each request, such as X-Api-Key: ${MY_KEY}.")
    ] = None
    is_async = True

    def __post_init__(self) -> None:
        web_url(
            self.url, "http: options.url", "Write http://127.0.0.1:8000/score, for example.", "options.key_env: MY_KEY"
        )
        for dial in ("batch_size", "concurrency"):
            if getattr(self, dial) < 1:
                raise ConfigError(f"http: options.{dial} must be 1 or more; got {getattr(self, dial)}.")
        if self.key_env is not None and not os.environ.get(self.key_env):
            raise ConfigError(
                f"http: options.key_env names the environment variable {self.key_env!r}, which is not set. Set it to "
                "the key, or leave out key_env."
            )
        self.fingerprint = digest(
            "http", 1, redacted(masked(self.url), references=False), self.batch_size, self.columns
        )

    @property
    def shown(self) -> str:
        """The address without keys."""
        return str(redacted(masked(self.url)))

    async def __call__(self, *, prompts: list[Any], completions: list[Any], **columns: Any) -> list[Any]:
        """The numbers as the server gave them. Raises RewardError for what is no answer."""
        import httpx2

        sent = self._columns(columns, len(completions))
        gate = asyncio.Semaphore(self.concurrency)
        # Proxies of the environment are for the world outside; a server on this machine is asked directly.
        client = httpx2.AsyncClient(timeout=None, trust_env=not is_local(self.url), headers=self._headers())
        bodies = [self._body(prompts, completions, sent, at) for at in range(0, len(completions), self.batch_size)]
        try:
            async with client, asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._ask(client, gate, body)) for body in bodies]
        except ExceptionGroup as several:  # the first to fail ends the others
            raise several.exceptions[0] from None
        return [score for task in tasks for score in task.result()]

    def _columns(self, given: dict[str, Any], size: int) -> dict[str, list[Any]]:
        """The columns of the data set that are to be sent. Raises RewardError for one that is not there."""
        found = {name: values for name, values in given.items() if name not in RESERVED and isinstance(values, list)}
        if self.columns is None:
            return found
        if missing := [name for name in self.columns if name not in found]:
            have = ", ".join(sorted(found)) or "none"
            raise RewardError(f"http: options.columns names {missing[0]!r}, which the prompts lack; there are: {have}")
        return {name: found[name] for name in self.columns}

    def _body(
        self, prompts: list[Any], completions: list[Any], columns: dict[str, list[Any]], start: int
    ) -> dict[str, Any]:
        chosen = slice(start, start + self.batch_size)
        answers = completions[chosen]
        pictures = any(is_image(answer) for answer in answers)
        return {
            "prompts": prompts[chosen],
            "completions": [as_text(answer) for answer in answers] if pictures else answers,
            "media": "image" if pictures else "text",
            "columns": {name: values[chosen] for name, values in columns.items()},
        }

    def _headers(self) -> dict[str, str]:
        key = os.environ.get(self.key_env or "")
        bearer = {"Authorization": f"Bearer {key}"} if key else {}
        return {"Content-Type": "application/json", **bearer, **(self.headers or {})}

    async def _ask(self, client: httpx2.AsyncClient, gate: asyncio.Semaphore, body: dict[str, Any]) -> list[Any]:
        """The scores of one request. Raises RewardError."""
        import httpx2

        async with gate:
            try:
                response = await post(client, self.url, MOST_BYTES, content=encoded(body))
            except (httpx2.HTTPError, ResponseTooLarge) as error:
                raise RewardError(f"{self.shown}: {one_line(str(error), EXCERPT) or type(error).__name__}") from None
        if not response.is_success:
            raise RewardError(f"{self.shown}: HTTP {response.status_code}: {self._shown(response)}")
        return self._scores(response, len(body["completions"]))

    def _scores(self, response: httpx2.Response, size: int) -> list[Any]:
        """What lies under "scores"; one entry a sample. Raises RewardError."""
        try:
            scores = response.json()["scores"]
        except (ValueError, TypeError, KeyError):
            scores = None
        if not isinstance(scores, list):
            said = self._shown(response) or "an empty body"
            raise RewardError(f'{self.shown}: the answer must be {{"scores": […]}}; got {said}')
        if len(scores) != size:
            raise RewardError(f"{self.shown}: {len(scores)} scores for {size} completions; there must be one for each")
        return scores

    def _shown(self, response: httpx2.Response) -> str:
        """The beginning of what the server said, on one line, the key blotted out where it was repeated."""
        text = masked(response.text)
        for secret in (os.environ.get(self.key_env or ""), *(self.headers or {}).values()):
            text = text.replace(secret, "***") if secret else text
        return one_line(text, EXCERPT)


def as_text(picture: Any) -> str:
    """The image as PNG in base64."""
    return base64.b64encode(png_of(picture)).decode("ascii")


def encoded(body: dict[str, Any]) -> bytes:
    """The body as JSON. Raises RewardError for a column whose values JSON does not know."""
    try:
        return json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
    except TypeError as error:
        raise RewardError(f"http: the columns cannot be sent as JSON: {error}. Name others: options.columns.") from None
