"""A fifth of all requests to the store end in 503, a reset, a cut answer or silence: rows are those of a quiet run."""

import contextlib
import http.client
import http.server
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator

import pytest

import pipelines.store
from pipelines.store import Store
from tests.helpers import captions_of, read_rows, run_fake, s3_server
from tests.reading import png

SHARE, STALL_SECONDS = 0.2, 1
IMAGES = 96


class Misbehaving(http.server.ThreadingHTTPServer):
    """Passes requests on to an S3 server, and spoils a share of the answers; half of those after the deed was done."""

    daemon_threads = True

    def __init__(self, behind: str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behind = behind.removeprefix("http://")
        self.random, self.lock = random.Random(0), threading.Lock()
        self.did: Counter[str] = Counter()

    def draw(self) -> tuple[str, bool]:
        with self.lock:
            spoils = self.random.random() < SHARE
            kind = self.random.choice(("503", "reset", "cut", "stall")) if spoils else "passed"
            self.did[kind] += 1
            return kind, self.random.random() < 0.5


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Misbehaving

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kind, afterwards = self.server.draw()
        answer = self._pass_on(body) if kind in ("passed", "cut") or afterwards else None
        if kind == "stall":
            time.sleep(3 * STALL_SECONDS)
        if kind in ("reset", "stall"):
            self._reset()
        elif kind == "503":
            self._send(503, {}, b"<Error><Code>SlowDown</Code><Message>slow down</Message></Error>")
        else:
            assert answer is not None
            self._send(*answer, cut=kind == "cut")

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_DELETE(self) -> None:
        self.answer()

    def _pass_on(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.server.behind)
        with contextlib.closing(connection):
            headers = {k: v for k, v in self.headers.items() if k.lower() not in ("connection", "expect")}
            connection.request(self.command, self.path, body, headers)
            response = connection.getresponse()
            hop = ("connection", "transfer-encoding", "date", "server")
            kept = {k: v for k, v in response.getheaders() if k.lower() not in hop}
            return response.status, kept, response.read()

    def _send(self, status: int, headers: dict[str, str], body: bytes, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() != "content-length" or self.command == "HEAD":
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = self.close_connection or cut

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def handle(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # of connections that are closed
            super().handle()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def misbehaving(s3: str) -> Iterator[Misbehaving]:
    server = Misbehaving(s3)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def s3() -> Iterator[str]:
    with s3_server("corpus", "out") as address:
        yield address


@pytest.mark.slow
def test_a_store_that_fails_a_fifth_of_all_requests_costs_time_and_no_row(s3, misbehaving, monkeypatch):
    monkeypatch.setattr(pipelines.store, "STALL_SECONDS", STALL_SECONDS)
    for i in range(IMAGES):
        Store("s3://corpus", s3).write(f"in/{i:03}.png", png(i))
    rows, seconds = {}, {}
    for name, address in (("quiet", s3), ("faults", f"http://127.0.0.1:{misbehaving.server_port}")):
        began = time.monotonic()
        arguments = ["input.path=s3://corpus/in", f"input.endpoint_url={address}", "unit.images=8"]
        outcome = run_fake(*arguments, f"output.path=s3://out/{name}", f"output.endpoint_url={address}")
        seconds[name] = time.monotonic() - began
        assert (outcome.code, outcome.message) == (0, "")
        output = Store(f"s3://out/{name}", s3)
        rows[name] = captions_of(output)
        assert read_rows(output, "quarantine") == []
    assert len(rows["quiet"]) == IMAGES
    assert rows["faults"] == rows["quiet"]
    assert all(misbehaving.did[kind] for kind in ("503", "reset", "cut", "stall"))
    rates = ", ".join(f"{name} {IMAGES / each:.1f} images/s" for name, each in seconds.items())
    print(f"{rates}; {dict(misbehaving.did)}")
