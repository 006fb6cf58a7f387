"""Fetches an image that the corpus names by a URI: http(s), s3, or a path relative to the corpus."""

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
URI_SAFE = "%/:=&?~#+!$,;'@()*[]"  # never quoted: reserved characters, and the % of a URI that is quoted already


def fetch(uri: str | None, store: Store, max_bytes: int, timeout: float) -> bytes | Reject | None:
    """The bytes behind `uri`, or None for a null URI.

    A failed fetch returns a `Reject` (reason `fetch` or `too_large_bytes`) for the caller to raise. `timeout`, in
    seconds, bounds a whole HTTP download. Reading stops one byte after `max_bytes`.
    """
    if uri is None:
        return None
    try:
        if uri.startswith(("http://", "https://")):
            data = _download(quote(uri, safe=URI_SAFE), max_bytes, timeout)
        else:
            relative = not uri.startswith(("s3://", "file://", "/"))
            # An absolute URI may lie outside the store of the corpus, so it gets a Store of its own.
            source = Store(store.path if relative else uri.removeprefix("file://"), store.endpoint_url, store.anonymous)
            path = source.join(uri) if relative else source.root
            data = cast(bytes, source.fs.cat_file(path, end=max_bytes + 1))
    except urllib.error.HTTPError as error:
        return Reject("fetch", f"HTTP status {error.code}")
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError and TimeoutError are OSErrors
        return Reject("fetch", f"{type(error).__name__}: {error}")
    return data if len(data) <= max_bytes else Reject("too_large_bytes", f"more than {max_bytes} bytes")


def _download(url: str, max_bytes: int, timeout: float) -> bytes:
    """The body of an HTTP response, at most its first `max_bytes` + 1 bytes.

    Raises:
        TimeoutError: if the download takes longer than `timeout` seconds, even if the server keeps sending.
        http.client.IncompleteRead: if the connection ends before the body does. Without this check a cut body would
            count as a damaged image.
    """
    # A socket's own time-out starts anew with each read. Reading in pieces lets the deadline cover the whole download.
    deadline = time.monotonic() + timeout
    request = urllib.request.Request(url, headers={"User-Agent": USER_AGENT})
    data = bytearray()
    with urllib.request.urlopen(request, timeout=timeout) as response:
        num_wanted = max_bytes + 1 if response.length is None else min(response.length, max_bytes + 1)
        while len(data) < num_wanted and (piece := response.read1(min(CHUNK_BYTES, num_wanted - len(data)))):
            data += piece
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(data)} bytes in {timeout:g} s")
    if response.length is not None and len(data) < num_wanted:
        raise http.client.IncompleteRead(bytes(data), num_wanted - len(data))
    return bytes(data)
