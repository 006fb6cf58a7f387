"""Images that a corpus names by address: what the web and the disk give, and every way in which they do not."""

import hashlib
import http.server
import os
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipelines.corpus.fetch
import pipelines.corpus.patience
from pipelines.corpus.addresses import Allowed, is_public, locate
from pipelines.corpus.fault import FetchFault
from pipelines.corpus.fetch import Fetcher, FetchSettings, fetcher_of
from pipelines.corpus.format import Record
from pipelines.corpus.web import Web
from pipelines.images.decode import Reject
from pipelines.stages.unit_batch import UnitBatch
from pipelines.store import Store
from tests.failing import empty_store, failing_store
from tests.reading import LIMIT, LOCALHOST, corpus_at, numbers_of, png, read, reader_of, reasons, spans_of


class Server(http.server.ThreadingHTTPServer):
    """Counts requests by path, connections, and the most requests at a time."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: Counter[str] = Counter()
        self.connections = self.now = self.most = 0
        self.lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class QuietHandler(http.server.BaseHTTPRequestHandler):
    """Answers with an image, whatever is asked."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(png(1))

    def log_message(self, *_: object) -> None:
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def setup(self) -> None:
        super().setup()
        self.server.connections += 1

    def do_GET(self) -> None:
        server, name = self.server, self.path.strip("/")
        with server.lock:
            server.requests[name] += 1
        self._serve(name, server.requests[name])

    def _serve(self, name: str, count: int) -> None:
        if name.startswith("once/") and count > 1:
            self._answer(200, b"image")
        elif name == "once/reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            self.rfile = self.wfile = open(os.devnull, "rb+")  # noqa: SIM115 - closed with the handler
        elif name == "once/short":
            self._answer(200, b"ima", length=5)
            self.close_connection = True
        elif name.startswith("once/"):
            self._answer(int(name[5:8]), b"", **{"Retry-After": "0"})
        elif name.startswith("always"):
            self._answer(int(name[6:9]), b"")
        elif name == "later":
            self._answer(503, b"", **{"Retry-After": "3600"})
        elif name == "ftp":
            self._answer(302, b"", Location="ftp://127.0.0.1:1/x.png")
        elif name == "headers":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-A: ")
            self._trickle(b"a", 0.05, 100)
        elif name == "continue":
            self._trickle(b"HTTP/1.1 100 Continue\r\n\r\n", 0.05, 100)
        elif name.startswith("slow/"):
            with self.server.lock:
                self.server.now += 1
                self.server.most = max(self.server.most, self.server.now)
            time.sleep(0.02)
            with self.server.lock:
                self.server.now -= 1
            self._answer(200, b"image")
        elif name == "missing":
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
            self.close_connection = True
        elif name == "silent":
            time.sleep(3)
            self.close_connection = True
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

    def _trickle(self, piece: bytes, pause: float, times: int) -> None:
        self.close_connection = True
        try:
            for _ in range(times):
                self.wfile.write(piece)
                self.wfile.flush()
                time.sleep(pause)
        except OSError:
            pass  # the reader has heard enough

    def _stream(self, piece: bytes, pause: float, times: int = 100) -> None:
        self.close_connection = True
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
def server() -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def web(server: Server) -> str:
    server.requests.clear()
    server.connections = server.most = 0
    return server.address


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines.corpus.fetch, "FIRST_WAIT", 0.01)


def fetcher(folder: Path | str = "/nowhere", **settings) -> Fetcher:
    chosen = {"threads": 4, "timeout": 5.0, "retries": 2, "allowed": LOCALHOST, **settings}
    return fetcher_of(Store(str(folder)), FetchSettings(**chosen), LIMIT)


def get(uri: str, folder: Path | str = "/nowhere", **settings) -> bytes | Reject | FetchFault | None:
    return fetcher(folder, **settings).fetch(uri)


def rejected(uri: str, folder: Path | str = "/nowhere", **settings) -> tuple[str, str]:
    fault = get(uri, folder, **settings)
    reject = fault.reject() if isinstance(fault, FetchFault) else fault
    assert isinstance(reject, Reject)
    return reject.reason, reject.detail


# The web


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
        ("broken", "unavailable", "HTTP status 500"),
        ("loop", "fetch", "more than 10 redirects"),
        ("elsewhere", "fetch", "leads to an address that is not http or https"),  # from the web into the local disk
        ("ftp", "fetch", "leads to an address that is not http or https"),
        ("short", "unavailable", "the connection ended before the file did"),
        ("large", "too_large_bytes", f"more than {LIMIT} bytes"),
        ("endless", "too_large_bytes", f"more than {LIMIT} bytes"),
    ],
)
def test_what_the_web_does_not_give_is_rejected(web, name, reason, detail):
    assert rejected(f"{web}/{name}") == (reason, detail)


@pytest.mark.parametrize("name", ["silent", "trickle", "headers", "continue"])
def test_the_deadline_holds_for_headers_and_body_and_all_tries_together(web, name):
    start = time.monotonic()
    assert rejected(f"{web}/{name}", timeout=0.5) == ("unavailable", "TimeoutError")
    assert time.monotonic() - start < 2.5


@pytest.mark.parametrize("fault", ["429", "500", "502", "503", "504", "reset", "short"])
def test_a_passing_fault_is_tried_again(web, server, fault):
    assert get(f"{web}/once/{fault}") == b"image"
    assert server.requests[f"once/{fault}"] == 2


def test_tries_are_counted_and_a_lasting_fault_is_not_tried_again(web, server):
    rejected(f"{web}/broken")
    rejected(f"{web}/missing")
    assert (server.requests["broken"], server.requests["missing"]) == (3, 1)


def test_a_server_that_asks_for_more_time_than_there_is_is_not_asked_again(web, server):
    start = time.monotonic()
    assert rejected(f"{web}/later") == ("unavailable", "HTTP status 503")
    assert (server.requests["later"], time.monotonic() - start < 2) == (1, True)


def test_connections_are_kept_and_a_host_gets_few_requests_at_a_time(web, server):
    records = [Record("", "", i, f"{web}/slow/{i}") for i in range(30)]
    fetched = list(fetcher(threads=16, per_host=3).load(records))
    assert [(record.row, data) for record, data in fetched] == [(i, b"image") for i in range(30)]
    assert server.most == 3
    assert server.connections <= 3


def test_a_host_that_never_answers_is_left_alone_for_a_while(monkeypatch):
    monkeypatch.setattr(pipelines.corpus.fetch, "SILENT_TRIES", 3)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{probe.getsockname()[1]}"
    mine, get, asked = fetcher(threads=1, retries=0), Web.get, []

    async def counted(self, url, *arguments):
        asked.append(url[len(closed) :])
        return await get(self, url, *arguments)

    monkeypatch.setattr(Web, "get", counted)
    assert {str(mine.fetch(f"{closed}/{i}")) for i in range(5)} == {"no connection: Connection refused"}
    assert asked == ["/0", "/1", "/2"]
    mine.forget()
    mine.fetch(f"{closed}/6")
    assert asked[3:] == ["/6"]


def test_memory_is_bounded_whatever_is_fetched_ahead(web, monkeypatch):
    """The largest number of bytes that fetches hold, while the caller is slow."""
    monkeypatch.setattr(pipelines.corpus.fetch, "HELD_BYTES", 20_000)
    held = []
    take = pipelines.corpus.fetch.Budget.take

    async def watched(self, index, num_bytes):
        await take(self, index, num_bytes)
        held.append(self.held)

    monkeypatch.setattr(pipelines.corpus.fetch.Budget, "take", watched)
    name = "y" * (LIMIT - 100)
    monkeypatch.setattr(Handler, "_serve", lambda self, *_: self._answer(200, name.encode()))
    for _, data in fetcher(threads=8, per_host=8, timeout=0.4, retries=0).load(
        Record("", "", i, f"{web}/{i}") for i in range(24)
    ):
        assert data == name.encode()
        time.sleep(0.03)
    assert max(held) <= 20_000 + LIMIT


def test_fetches_that_wait_for_memory_do_not_keep_the_one_before_them_from_its_next_try(web, monkeypatch):
    monkeypatch.setattr(pipelines.corpus.fetch, "HELD_BYTES", 1)
    uris = [f"{web}/once/503", *[f"{web}/{'z' * 500}{i}" for i in range(12)]]
    fetched = list(fetcher(threads=2, per_host=2).load(Record("", "", i, uri) for i, uri in enumerate(uris)))
    assert [len(data) for _, data in fetched] == [5, *[501] * 10, 502, 502]


def test_a_closed_port_and_nonsense_are_rejected(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{probe.getsockname()[1]}/x"
    assert rejected(closed)[0] == "unavailable"
    for uri in ("http://", "https://[", "http://127.0.0.1:port/x", "gopher://x/y", "", "\0", "/a\0b"):
        assert rejected(uri, tmp_path)[0] == "fetch"


# What an address may point at


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "255.255.255.255", "::1", "::", "fe80::1%eth0", "fd00::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254",
        "64:ff9b::7f00:1", "2002:7f00:1::", "ff02::1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_of_the_public_internet(address):
    assert not is_public(address)


def test_addresses_of_the_public_internet():
    assert all(map(is_public, ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::1]", "[::ffff:127.0.0.1]", "0"])
def test_no_spelling_of_a_private_address_is_connected_to(server, web, host):
    reason, detail = rejected(f"http://{host}:{server.server_port}/image", allowed=Allowed())
    assert reason == "fetch"
    assert detail in ("a private address; input.allow_private allows it", "not a valid address")
    assert server.connections == 0


def test_a_name_is_judged_by_the_address_that_is_connected_to(server, web, monkeypatch):
    """A name that resolves to a public address first and to a private one then gains nothing."""
    look_up, answers = socket.getaddrinfo, []

    def rebinding(host, *arguments, **options):
        if host != "innocent.example":
            return look_up(host, *arguments, **options)
        answers.append(host)
        return look_up("127.0.0.1", *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    uri = f"http://innocent.example:{server.server_port}/image"
    assert rejected(uri, allowed=Allowed(), retries=0)[1] == "a private address; input.allow_private allows it"
    assert (len(answers), server.connections) == (1, 0)
    assert get(uri) == png(1)  # where it is allowed


def test_passwords_and_addresses_stand_in_no_detail():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for uri in (
        f"http://user:hunter2@127.0.0.1:{port}/x.png?token=hunter2",
        "http://user:hunter2@127.0.0.1:port/x",
        "http://user:hunter2@[/x",
        "s3://user:hunter2@elsewhere/x",
        "http://hunter2.invalid/x",
    ):
        assert "hunter2" not in rejected(uri, retries=0)[1]
    assert "hunter2" not in rejected("http://user:hunter2@127.0.0.1/x.png", allowed=Allowed())[1]


def test_paths_are_relative_to_the_corpus_or_absolute_and_stay_below_it(tmp_path):
    corpus = tmp_path / "corpus"
    (corpus / "sub").mkdir(parents=True)
    (corpus / "sub" / "x.png").write_bytes(png(5))
    (tmp_path / "secret.png").write_bytes(png(6))
    (tmp_path / "corpus2").mkdir()
    (tmp_path / "corpus2" / "x.png").write_bytes(png(7))
    (corpus / "link.png").symlink_to(tmp_path / "secret.png")
    (corpus / "inner.png").symlink_to(corpus / "sub" / "x.png")
    absolute = str(corpus / "sub" / "x.png")
    for uri in ("sub/x.png", "sub/../sub/x.png", "inner.png", absolute, f"file://{absolute}"):
        assert get(uri, corpus) == png(5)
    outside = [
        str(tmp_path / "secret.png"), f"file://{tmp_path}/secret.png", "../secret.png", "sub/../../secret.png",
        "link.png", str(tmp_path / "corpus2" / "x.png"), "/etc/hostname", "s3://bucket/x.png",
    ]  # fmt: skip
    for uri in outside:
        assert rejected(uri, corpus) == ("fetch", "outside the corpus; input.allow_paths allows it")
    allowed = Allowed(paths=(str(tmp_path),))
    assert [get(uri, corpus, allowed=allowed) for uri in outside[:6]] == [png(6)] * 5 + [png(7)]
    assert rejected("sub/y.png", corpus)[0] == "fetch"
    assert rejected("sub", corpus)[1] == "not a regular file"
    (corpus / "large").write_bytes(b"x" * (LIMIT + 1))
    assert rejected("large", corpus)[0] == "too_large_bytes"


def test_a_corpus_in_a_bucket_names_files_of_this_bucket_alone():
    store = "s3://bucket/corpus"
    for uri in ("s3://bucket2/x", "s3://other/x", "../x", "s3://bucket/../other/x", "/etc/hostname", "gs://bucket/x"):
        assert rejected(uri, store) == ("fetch", "outside the corpus; input.allow_paths allows it")
    allowed = Allowed(paths=("s3://other/a", "/data"))
    for uri, path in (
        ("s3://bucket/a b/%41", "bucket/a b/%41"),
        ("x//y", "bucket/corpus/x//y"),
        ("S3://other/a/x", "other/a/x"),
    ):
        assert locate(uri, Store(store), allowed).path == path
    for uri in ("s3://other/ab", "s3://other/b", "/database/x"):
        with pytest.raises(FetchFault, match="outside the corpus"):
            locate(uri, Store(store), allowed)


def test_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    (tmp_path / "y.png").write_bytes(png(2))
    assert rejected("x.png", tmp_path) == ("fetch", "not a regular file")
    (work,) = read(tmp_path)
    assert work.rejected == []  # it is counted among what is left out
    assert numbers_of(work) == [2]


# A column of addresses


def test_a_column_of_addresses_is_fetched_and_faults_stay_with_their_rows(web, tmp_path):
    (tmp_path / "local.png").write_bytes(png(9))
    uris = [f"{web}/image", f"{web}/missing", None, "local.png", f"{web}/text", f"{web}/silent"]
    pq.write_table(pa.table({"url": uris, "key": [f"k{i}" for i in range(6)]}), tmp_path / "a.parquet")
    start = time.monotonic()
    (work,) = read(tmp_path / "a.parquet", fetch_timeout=0.5)
    assert time.monotonic() - start < 3
    assert [(i.id, i.row) for i in work.images] == [("k0", 0), ("k3", 3)]
    assert numbers_of(work) == [1, 9]
    assert reasons([work]) == {1: "fetch", 2: "missing", 4: "unsupported_format", 5: "unavailable"}
    assert work.images[0].sha256 == hashlib.sha256(png(1)).hexdigest()


# Outages


@pytest.fixture
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines.corpus.patience, "FIRST_WAIT", 0.05)
    monkeypatch.setattr(pipelines.corpus.patience, "LONGEST_WAIT", 0.1)


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def units_of(path: Path, num_images: int = 100, **settings) -> list[UnitBatch]:
    """Read by a process that knows nothing of the network yet."""
    pipelines.corpus.fetch._fetchers.cache_clear()
    corpus = corpus_at(path)
    reader = reader_of(corpus, **{"retries": 0, **settings})
    return [UnitBatch.from_row(row) for span in spans_of(corpus, num_images) for row in reader(span.to_row())]


@pytest.mark.usefixtures("short_patience")
def test_when_nothing_answers_the_images_are_not_to_blame(tmp_path, caplog):
    uris = [f"http://127.0.0.1:{closed_port()}/{i}" for i in range(6)]
    pq.write_table(pa.table({"url": uris}), tmp_path / "a.parquet")
    first, second = units_of(tmp_path / "a.parquet", num_images=3, patience=0.3)
    assert first.error == "outage: addresses: no connection: Connection refused, for 0.3 s"
    assert (first.images, first.rejected, second.error) == ([], [], first.error)
    (line,) = caplog.messages
    assert re.fullmatch(r"addresses: no connection: Connection refused; waiting since (\S+) until (\S+) UTC", line)
    (work,) = units_of(tmp_path / "a.parquet", patience=0)  # unless the user says so
    assert set(reasons([work]).values()) == {"unavailable"}


@pytest.mark.usefixtures("short_patience")
def test_an_outage_that_ends_costs_time_and_no_image(tmp_path):
    port = closed_port()
    uris = [f"http://127.0.0.1:{port}/image" for i in range(5)]
    pq.write_table(pa.table({"url": uris}), tmp_path / "a.parquet")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), QuietHandler, bind_and_activate=False)
    server.allow_reuse_address = True

    def come_back() -> None:
        server.server_bind()
        server.server_activate()
        server.serve_forever()

    threading.Timer(0.5, come_back).start()
    (work,) = units_of(tmp_path / "a.parquet", patience=20)
    server.shutdown()
    server.server_close()
    assert (work.error, numbers_of(work)) == (None, [1] * 5)


def test_hosts_that_are_gone_are_no_outage_where_another_answers(web, tmp_path):
    gone = [f"http://127.0.0.1:{closed_port()}/{i}" for i in range(4)]
    pq.write_table(pa.table({"url": [*gone[:2], f"{web}/missing", *gone[2:]]}), tmp_path / "a.parquet")
    (work,) = units_of(tmp_path / "a.parquet", patience=60)  # which a test would wait for
    assert reasons([work]) == {0: "unavailable", 1: "unavailable", 2: "fetch", 3: "unavailable", 4: "unavailable"}
    pq.write_table(pa.table({"url": [f"{web}/image", *gone]}), tmp_path / "a.parquet", row_group_size=1)
    works = units_of(tmp_path / "a.parquet", num_images=1, patience=60)  # what answered in an earlier unit counts
    assert reasons(works) == dict.fromkeys(range(1, 5), "unavailable")


@pytest.mark.usefixtures("short_patience")
@pytest.mark.parametrize(
    ("status", "reason"), [(401, "fetch"), (403, "fetch"), (429, "unavailable"), (503, "unavailable")]
)
def test_who_is_refused_or_throttled_everywhere_blames_no_image(web, tmp_path, status, reason):
    refused = [f"{web}/always{status}/{i}" for i in range(3)]
    pq.write_table(pa.table({"url": refused}), tmp_path / "a.parquet")
    (work,) = units_of(tmp_path / "a.parquet", patience=0.2)
    assert work.error == f"outage: addresses: HTTP status {status}, for 0.2 s"
    # Where others are served, it is the fault of these.
    pq.write_table(pa.table({"url": [f"{web}/image", *refused]}), tmp_path / "a.parquet", row_group_size=1)
    works = units_of(tmp_path / "a.parquet", patience=60)  # which a test would wait for
    assert reasons(works) == dict.fromkeys(range(1, 4), reason)


class Throttled:
    """Refuses every object at first, then each of them `times` times."""

    def __init__(self, error: Exception, times: int):
        self.error, self.left = error, {f"{i}.png": times for i in range(3)}

    def __call__(self, verb: str, path: str) -> Exception | None:
        name = path.rpartition("/")[2]
        if verb != "GET" or not self.left.get(name):
            return None
        self.left[name] -= 1
        return self.error


@pytest.mark.usefixtures("short_patience")
def test_the_store_of_the_corpus_is_waited_for_file_by_file():
    empty_store()
    for i in range(3):
        Store("memory://corpus").write(f"{i}.png", png(i))
    throttled = Throttled(ConnectionResetError(), times=4)
    throttled.left["1.png"] = 0  # one comes at once, so it is no outage
    with failing_store(throttled):
        (work,) = units_of("memory://corpus", patience=20)
        assert (work.error, work.rejected, numbers_of(work)) == (None, [], [0, 1, 2])
        throttled.left["2.png"] = 10**9
        (work,) = units_of("memory://corpus", patience=0.2)
        assert reasons([work]) == {0: "unavailable"}
        throttled.left = dict.fromkeys(throttled.left, 10**9)
        throttled.error = PermissionError("ExpiredToken")
        (work,) = units_of("memory://corpus", patience=0.2)
        assert work.error == "outage: memory://corpus: PermissionError, for 0.2 s"
    empty_store()


@pytest.mark.usefixtures("short_patience")
def test_a_corpus_that_is_gone_as_a_whole_is_an_outage(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / "in" / f"{i}.png").write_bytes(png(i))
    corpus = corpus_at(tmp_path / "in")
    (span,) = spans_of(corpus)
    (tmp_path / "in").rename(tmp_path / "away")
    (row,) = reader_of(corpus, patience=0.2)(span.to_row())
    assert UnitBatch.from_row(row).error == f"outage: {tmp_path}/in: the folder of the corpus is gone, for 0.2 s"
    threading.Timer(0.3, lambda: (tmp_path / "away").rename(tmp_path / "in")).start()
    (row,) = reader_of(corpus, patience=20)(span.to_row())
    assert numbers_of(UnitBatch.from_row(row)) == [0, 1, 2]
