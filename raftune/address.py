"""Addresses on the web, as a person gives them."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

from raftune.errors import ConfigError

if TYPE_CHECKING:
    import httpx2


def web_url(url: str, field: str, example: str, key: str) -> httpx2.URL:
    """The URL, parsed. Raises ConfigError that names `field` for what is none, and for one that holds a password.

    `example` is a sentence with a good one; `key` says where a secret belongs.
    """
    import httpx2

    try:
        given = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ConfigError(f"{field} must be the URL of an endpoint; got {url!r}: {error}. {example}") from error
    if given.scheme not in ("http", "https") or not given.host:
        raise ConfigError(f"{field} must be a URL that begins with http:// or https://; got {url!r}. {example}")
    if given.userinfo:
        raise ConfigError(f"{field} must hold no password. Put the key into an environment variable: {key}.")
    return given


def is_local(url: str) -> bool:
    """Whether the URL names this machine."""
    import httpx2

    host = httpx2.URL(url).host
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
