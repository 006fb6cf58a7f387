"""Images that a corpus names by address: what the web and the disk give, and every way in which they do not."""

import hashlib
import http.server
import socket
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.corpus.fetch import fetch
from pipelines.images.decode import Reject
from pipelines.store import Store
from tests.reading import LIMIT, numbers_of, png, read, reasons


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        name = self.path.strip("/")
        if name == "missing":
            self.send_error(404)
        elif name == "broken":
            self.send_error(500)
        elif name == "moved":
            self._answer(301, b"", Location="/image")
        elif name == "loop":
            self._answer(302, b"", Location="/loop")
        elif name == "elsewhere":
            self._answer(302, b"", Location="file:///etc/hostname")
        elif name == "large":
            self._answer(200, b"x" * (LIMIT + 1))
        elif name == "endless":
            self._stream(b"x" * 5000, pause=0.0)
        elif name == "trickle":
            self._stream(b"x", pause=0.1)
        elif name == "short":
            self._answer(200, b"x" * 10, length=99)
        elif name == "silent":
            time.sleep(3)
        elif name == "agent":
            self._answer(200, self.headers["User-Agent"].encode())
        elif name == "chunked":
            self._stream(png(1), pause=0.0, times=1)
        else:
            self._answer(200, png(1) if name == "image" else name.encode())

    def _answer(self, status: int, body: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, piece: bytes, pause: float, times: int = 100) -> None:
        self.protocol_version = "HTTP/1.1"
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for _ in range(times):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                time.sleep(pause)
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            pass  # the reader has heard enough

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def web():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def get(uri: str | None, folder: Path = Path("/nowhere"), timeout: float = 5.0) -> bytes | Reject | None:
    return fetch(uri, Store(str(folder)), LIMIT, timeout)


def rejected(uri: str, folder: Path = Path("/nowhere"), timeout: float = 5.0) -> tuple[str, str]:
    reject = get(uri, folder, timeout)
    assert isinstance(reject, Reject)
    return reject.reason, reject.detail


@pytest.mark.parametrize("name", ["image", "moved", "chunked"])
def test_an_image_on_the_web_is_fetched_also_behind_a_redirect(web, name):
    assert get(f"{web}/{name}") == png(1)


def test_addresses_as_people_write_them_are_quoted(web):
    assert get(f"{web}/a b-\u00e4") == b"a%20b-%C3%A4"
    assert get(f"{web}/a%20b?x=1&y=[2]") == b"a%20b?x=1&y=[2]"


def test_the_server_is_told_who_asks(web):
    assert get(f"{web}/agent").startswith(b"otprune/")


@pytest.mark.parametrize(
    ("name", "reason", "detail"),
    [
        ("missing", "fetch", "HTTP status 404"),
        ("broken", "fetch", "HTTP status 500"),
        ("loop", "fetch", "HTTP status 302"),
        ("elsewhere", "fetch", "HTTP status 302"),  # from the web into the local disk
        ("short", "fetch", "IncompleteRead: IncompleteRead(10 bytes read, 89 more expected)"),
        ("large", "too_large_bytes", f"more than {LIMIT} bytes"),
        ("endless", "too_large_bytes", f"more than {LIMIT} bytes"),
    ],
)
def test_what_the_web_does_not_give_is_rejected(web, name, reason, detail):
    assert rejected(f"{web}/{name}") == (reason, detail)


@pytest.mark.parametrize("name", ["silent", "trickle"])
def test_a_slow_server_is_given_up_in_time(web, name):
    start = time.monotonic()
    reason, detail = rejected(f"{web}/{name}", timeout=0.5)
    assert (reason, detail.split(":")[0]) == ("fetch", "TimeoutError")
    assert time.monotonic() - start < 2.5


def test_a_closed_port_and_nonsense_are_rejected():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{probe.getsockname()[1]}/x"
    for uri in (closed, "http://", "https://[", "http://127.0.0.1:port/x", "gopher://x/y", "", "\0"):
        assert rejected(uri)[0] == "fetch"


def test_paths_are_relative_to_the_corpus_or_absolute(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x.png").write_bytes(png(5))
    absolute = str(tmp_path / "sub" / "x.png")
    for uri, folder in (
        ("sub/x.png", tmp_path),
        (absolute, Path("/nowhere")),
        (f"file://{absolute}", Path("/nowhere")),
    ):
        assert get(uri, folder) == png(5)
    assert rejected("sub/y.png", tmp_path)[0] == "fetch"
    assert rejected("sub", tmp_path)[0] == "fetch"
    (tmp_path / "large").write_bytes(b"x" * (LIMIT + 1))
    assert rejected("large", tmp_path)[0] == "too_large_bytes"


def test_null_stays_null():
    assert get(None) is None


def test_a_column_of_addresses_is_fetched_and_faults_stay_with_their_rows(web, tmp_path):
    (tmp_path / "local.png").write_bytes(png(9))
    uris = [f"{web}/image", f"{web}/missing", None, "local.png", f"{web}/text", f"{web}/silent"]
    pq.write_table(pa.table({"url": uris, "key": [f"k{i}" for i in range(6)]}), tmp_path / "a.parquet")
    start = time.monotonic()
    (work,) = read(tmp_path / "a.parquet", fetch_timeout=0.5)
    assert time.monotonic() - start < 3
    assert [(i.id, i.row) for i in work.images] == [("k0", 0), ("k3", 3)]
    assert numbers_of(work) == [1, 9]
    assert reasons([work]) == {1: "fetch", 2: "missing", 4: "unsupported_format", 5: "fetch"}
    assert work.images[0].sha256 == hashlib.sha256(png(1)).hexdigest()
