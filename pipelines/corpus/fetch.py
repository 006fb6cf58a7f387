"""Fetching an image that the corpus names by a URI: http(s), s3 or a path relative to the corpus."""

import http.client
import time
import urllib.error
import urllib.request
from typing import cast
from urllib.parse import quote

from pipelines.images.decode import Reject
from pipelines.store import Store

USER_AGENT = "otprune/0.1 (image captioning)"
CHUNK_BYTES = 2**16
URI_SAFE = "%/:=&?~#+!$,;'@()*[]"  # reserved characters, and those of a URI that is quoted already


def fetch(uri: str | None, store: Store, max_bytes: int, timeout: float) -> bytes | Reject | None:
    """The bytes behind `uri`; null stays null; what cannot be had is a `Reject` to be raised by the caller.

    `timeout` is in seconds, for a whole HTTP download. Objects above `max_bytes` are not read to their end.
    """
    if uri is None:
        return None
    try:
        if uri.startswith(("http://", "https://")):
            data = _download(quote(uri, safe=URI_SAFE), max_bytes, timeout)
        else:
            inside = not uri.startswith(("s3://", "file://", "/"))
            place = Store(store.path if inside else uri.removeprefix("file://"), store.endpoint_url, store.anonymous)
            path = place.join(uri) if inside else place.root
            data = cast(bytes, place.fs.cat_file(path, end=max_bytes + 1))
    except urllib.error.HTTPError as error:
        return Reject("fetch", f"HTTP status {error.code}")
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError and time-outs are OSError
        return Reject("fetch", f"{type(error).__name__}: {error}")
    return data if len(data) <= max_bytes else Reject("too_large_bytes", f"more than {max_bytes} bytes")


def _download(url: str, max_bytes: int, timeout: float) -> bytes:
    """The body, at most `max_bytes` + 1 of it. Read piece by piece: a socket's own time-out starts anew with each.

    Raises:
        TimeoutError: also for a server that trickles.
        http.client.IncompleteRead: if the connection ends before the body does, which would pass for a damaged image.
    """
    deadline = time.monotonic() + timeout
    request = urllib.request.Request(url, headers={"User-Agent": USER_AGENT})
    data = bytearray()
    with urllib.request.urlopen(request, timeout=timeout) as response:
        wanted = max_bytes + 1 if response.length is None else min(response.length, max_bytes + 1)
        while len(data) < wanted and (piece := response.read1(min(CHUNK_BYTES, wanted - len(data)))):
            data += piece
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(data)} bytes in {timeout:g} s")
    if response.length is not None and len(data) < wanted:
        raise http.client.IncompleteRead(bytes(data), wanted - len(data))
    return bytes(data)
