"""Fetching an image that the corpus names by a URI: http(s), s3 or a path relative to the corpus."""

import http.client
import urllib.error
import urllib.request

from pipelines.decode import Reject
from pipelines.storage import Store

USER_AGENT = "otprune/0.1 (image captioning)"


def fetch(uri: str | None, store: Store, max_bytes: int, timeout: float) -> bytes | Reject | None:
    """The bytes behind `uri`; null stays null; what cannot be had is a `Reject` to be raised by the caller.

    `timeout` is in seconds, for each socket operation. Objects above `max_bytes` are not read to their end.
    """
    if uri is None:
        return None
    try:
        if uri.startswith(("http://", "https://")):
            request = urllib.request.Request(uri, headers={"User-Agent": USER_AGENT})
            with urllib.request.urlopen(request, timeout=timeout) as response:
                data = response.read(max_bytes + 1)
        else:
            inside = not uri.startswith(("s3://", "file://", "/"))
            place = Store(store.path if inside else uri.removeprefix("file://"), store.endpoint_url, store.anonymous)
            data = place.fs.cat_file(place.join(uri) if inside else place.root, end=max_bytes + 1)
    except urllib.error.HTTPError as error:
        return Reject("fetch", f"HTTP status {error.code}")
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError and time-outs are OSError
        return Reject("fetch", f"{type(error).__name__}: {error}")
    return data if len(data) <= max_bytes else Reject("too_large_bytes", f"more than {max_bytes} bytes")
