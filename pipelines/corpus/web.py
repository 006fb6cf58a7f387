"""Downloads from http and https: connections are kept alive, and the address of each is checked as it is made."""

import asyncio
import os
import socket
import urllib.request
from collections.abc import Awaitable, Callable
from email.utils import parsedate_to_datetime
from time import time
from typing import Any
from urllib.parse import quote

import aiohttp
from yarl import URL

from pipelines.corpus.addresses import Allowed, checked_socket, is_private_literal
from pipelines.corpus.fault import PASSING_STATUSES, REFUSALS, FetchFault

USER_AGENT = "otprune/0.1 (image captioning)"
URI_SAFE = "%/:=&?~#+!$,;'@()*[]"  # never quoted: reserved characters, and the % of a URI that is quoted already
CHUNK_BYTES = 2**16
MAX_REDIRECTS = 10
CONNECT_SECONDS = 10.0  # for the connection alone, so that a dead host leaves time for another try
STALL_SECONDS = 15.0  # without a byte, after which a request is given up, which leaves time for another
REDIRECTS = frozenset({301, 302, 303, 307, 308})

Grow = Callable[[int], Awaitable[None]]
"""Is told of the bytes that are about to be held, and returns once there is room for them."""


class Web:
    """The http client of a process. Its methods run on one event loop, and so do its connections.

    Environment variables name the proxy (`https_proxy`, `no_proxy`). What a proxy connects to is for the proxy to
    decide; only addresses that are private in so many words are refused then.
    """

    def __init__(self, allowed: Allowed):
        self.allowed = allowed
        self._sessions: dict[bool, aiohttp.ClientSession] = {}  # by whether a proxy is used

    async def get(self, url: str, max_bytes: int, grow: Grow) -> bytes:
        """The body behind a URL, at most its first `max_bytes` + 1 bytes. The caller sets the deadline.

        Raises:
            FetchFault: if there is no such body, or the URL or a redirect leads where it must not.
        """
        try:
            target = URL(quote(url, safe=URI_SAFE), encoded=True)
            for _ in range(MAX_REDIRECTS + 1):
                answer = await self._get_one(target, max_bytes, grow)
                if isinstance(answer, bytes):
                    return answer
                target = answer
        except FetchFault:
            raise
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise _fault_of(error) from error
        raise FetchFault(f"more than {MAX_REDIRECTS} redirects")

    async def close(self) -> None:
        """Closes the connections."""
        for session in self._sessions.values():
            await session.close()
        self._sessions.clear()

    async def _get_one(self, url: URL, max_bytes: int, grow: Grow) -> bytes | URL:
        """The body behind a URL, or the URL that the server names instead."""
        if url.scheme not in ("http", "https") or not url.host:
            raise FetchFault("leads to an address that is not http or https")
        proxy = _proxy_of(url)
        if not self.allowed.private and is_private_literal(url.host):
            raise FetchFault("a private address; input.allow_private allows it")
        async with self._session(proxy is not None).get(url, proxy=proxy, allow_redirects=False) as response:
            if response.status in REDIRECTS and "Location" in response.headers:
                return url.join(URL(response.headers["Location"]))
            if response.status == 407:
                raise FetchFault("HTTP status 407 of the proxy", passing=True, answered=False)
            if not 200 <= response.status < 300:
                passing = response.status in PASSING_STATUSES
                wait = _seconds(response.headers.get("Retry-After")) if passing else None
                refused = response.status in REFUSALS
                raise FetchFault(f"HTTP status {response.status}", passing=passing, refused=refused, retry_after=wait)
            return await _body(response, max_bytes, grow)

    def _session(self, through_proxy: bool) -> aiohttp.ClientSession:
        if through_proxy not in self._sessions:
            check = not (through_proxy or self.allowed.private)
            connector = aiohttp.TCPConnector(
                limit=0,  # the caller limits how many requests run at a time
                socket_factory=checked_socket if check else None,
                keepalive_timeout=30,
            )
            self._sessions[through_proxy] = aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity"},
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=STALL_SECONDS),
            )
        return self._sessions[through_proxy]


async def _body(response: aiohttp.ClientResponse, max_bytes: int, grow: Grow) -> bytes:
    """The body, read until it ends or exceeds `max_bytes`. A body that is cut short is an error of the client."""
    data = bytearray()
    while len(data) <= max_bytes and (piece := await response.content.read(CHUNK_BYTES)):
        await grow(len(piece))
        data += piece
    if len(data) > max_bytes:
        response.close()  # the rest is not read, so the connection serves nobody else
    return bytes(data[: max_bytes + 1])


def _proxy_of(url: URL) -> str | None:
    """The proxy that the environment names for a URL."""
    proxy = urllib.request.getproxies().get(url.scheme)
    return None if proxy is None or urllib.request.proxy_bypass(url.host or "") else proxy


def _seconds(retry_after: str | None) -> float | None:
    """The seconds of a Retry-After header, which holds a number or a date."""
    if retry_after is None:
        return None
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        try:
            return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time())
        except ValueError:
            return None


def _fault_of(error: Exception) -> FetchFault:
    """The fault behind an exception of aiohttp. Messages of its own may hold the URL, so only the system's are kept."""
    inner: Any = getattr(error, "os_error", None)
    if isinstance(inner, FetchFault):
        return inner
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        unknown = getattr(inner, "errno", None) == socket.EAI_NONAME  # this name does not exist; others may
        return FetchFault("no such host" if unknown else "DNS does not answer", passing=not unknown, answered=False)
    if isinstance(error, aiohttp.ClientSSLError | aiohttp.ClientConnectorCertificateError):
        return FetchFault("no valid certificate")
    if isinstance(error, aiohttp.ClientPayloadError):
        return FetchFault("the connection ended before the file did", passing=True)
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return FetchFault(f"HTTP status {error.status} of the proxy", passing=True, answered=False)
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return FetchFault("the connection ended before the answer came", passing=True, answered=False)
    if isinstance(error, aiohttp.ClientConnectionError | asyncio.TimeoutError | OSError):
        number = getattr(error if inner is None else inner, "errno", None)
        words = f": {os.strerror(number)}" if number and number > 0 else ""
        return FetchFault(f"no connection{words}", passing=True, answered=False)
    if isinstance(error, aiohttp.InvalidURL | ValueError):
        return FetchFault("not a valid address")
    return FetchFault("not a valid answer")
