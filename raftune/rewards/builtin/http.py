"""Reward `http`: a server that scores samples."""

from __future__ import annotations

import asyncio
import base64
import json
import os
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

from pydantic import Field

from raftune.clients.url import ResponseTooLarge, is_local, post, web_url
from raftune.config.secrets import masked, redacted
from raftune.data.images import png_of
from raftune.errors import ConfigError, RewardError
from raftune.rewards.batch import RESERVED, is_image
from raftune.rewards.fingerprint import digest
from raftune.rewards.registry import BuiltInReward, builtin
from raftune.sanitize import one_line

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
        for option in ("batch_size", "concurrency"):
            if getattr(self, option) < 1:
                raise ConfigError(f"http: options.{option} must be 1 or more; got {getattr(self, option)}.")
        if self.key_env is not None and not os.environ.get(self.key_env):
            raise ConfigError(
                f"http: options.key_env names the environment variable {self.key_env!r}, which is not set. Set it to "
                "the key, or leave out key_env."
            )
        self.needs = frozenset(self.columns or ())
        _ = self.fingerprint  # now: `masked` learns more secrets with each reward

    @cached_property
    def fingerprint(self) -> str:
        """Over the address without keys; another key, or more requests at once, is the same judge."""
        return digest("http", 1, redacted(masked(self.url), references=False), self.batch_size, self.columns)

    async def __call__(self, *, prompts: list[Any], completions: list[Any], **columns: Any) -> list[Any]:
        """The numbers as the server gave them. Raises RewardError for a response without them."""
        import httpx2

        lists = {name: values for name, values in columns.items() if name not in RESERVED and isinstance(values, list)}
        names = list(lists) if self.columns is None else self.columns
        if missing := [name for name in names if name not in lists]:
            have = ", ".join(sorted(lists)) or "none"
            raise RewardError(f"http: options.columns names {missing[0]!r}, which the prompts lack; there are: {have}")
        key = os.environ.get(self.key_env or "")
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        headers |= self.headers or {}
        slots = asyncio.Semaphore(self.concurrency)
        # Proxies of the environment are for other machines; a server on this one is asked directly.
        client = httpx2.AsyncClient(timeout=None, trust_env=not is_local(self.url), headers=headers)
        address = redacted(masked(self.url))  # without keys

        async def request(rows: slice) -> list[Any]:
            part, media = completions[rows], "text"
            async with slots:
                if any(is_image(completion) for completion in part):
                    part, media = [base64.b64encode(png_of(image)).decode("ascii") for image in part], "image"
                others = {name: lists[name][rows] for name in names}
                body = {"prompts": prompts[rows], "completions": part, "media": media, "columns": others}
                try:
                    content = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
                except TypeError as error:
                    raise RewardError(
                        f"http: the columns cannot be sent as JSON: {error}. Name others: options.columns."
                    ) from None
                try:
                    response = await post(client, self.url, MOST_BYTES, content=content)
                except (httpx2.HTTPError, ResponseTooLarge) as error:
                    raise RewardError(f"{address}: {one_line(str(error), EXCERPT) or type(error).__name__}") from None
            text = masked(response.text)
            for secret in (key, *(self.headers or {}).values()):
                text = text.replace(secret, "***") if secret else text
            excerpt = one_line(text, EXCERPT)
            if not response.is_success:
                raise RewardError(f"{address}: HTTP {response.status_code}: {excerpt}")
            try:
                scores = response.json()["scores"]
            except (ValueError, TypeError, KeyError):
                scores = None
            if not isinstance(scores, list):
                raise RewardError(f'{address}: the answer must be {{"scores": […]}}; got {excerpt or "an empty body"}')
            if len(scores) != len(part):
                raise RewardError(
                    f"{address}: {len(scores)} scores for {len(part)} completions; there must be one for each"
                )
            return scores

        starts = range(0, len(completions), self.batch_size)
        try:
            async with client, asyncio.TaskGroup() as group:
                tasks = [group.create_task(request(slice(start, start + self.batch_size))) for start in starts]
        except ExceptionGroup as several:  # the first to fail ends the others
            raise several.exceptions[0] from None
        return [score for task in tasks for score in task.result()]
