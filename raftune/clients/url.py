"""Checks and normalises URLs."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING, Any

from raftune.errors import ConfigError

if TYPE_CHECKING:
    import httpx2


def web_url(url: str, field: str, example: str, key: str) -> httpx2.URL:
    """The URL, parsed. Raises ConfigError that names `field` for what is none, and for one that holds a password.

    `example` is a sentence with a good one; `key` says where a secret belongs.
    """
    import httpx2

    try:
        shown = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ConfigError(f"{field} must be the URL of an endpoint; got {url!r}: {error}. {example}") from error
    if shown.scheme not in ("http", "https") or not shown.host:
        raise ConfigError(f"{field} must be a URL that begins with http:// or https://; got {url!r}. {example}")
    if shown.userinfo:
        raise ConfigError(f"{field} must hold no password. Put the key into an environment variable: {key}.")
    return shown


async def post(client: httpx2.AsyncClient, url: str, most: int, **request: Any) -> httpx2.Response:
    """The answer to a POST, read as it comes; one of more than `most` bytes is broken off. Raises ResponseTooLarge for
    it.
    """
    import httpx2

    body = bytearray()
    async with client.stream("POST", url, **request) as response:
        async for part in response.aiter_bytes():
            body += part
            if len(body) > most:
                raise ResponseTooLarge(f"the answer is longer than {most:,} bytes; it was broken off")
        headers = [(name, value) for name, value in response.headers.items() if name != "content-encoding"]
        return httpx2.Response(response.status_code, headers=headers, content=bytes(body), request=response.request)


class ResponseTooLarge(Exception):
    """A server's answer has more bytes than it may."""


def is_local(url: str) -> bool:
    """Whether the URL names this machine."""
    import httpx2

    host = httpx2.URL(url).host
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
