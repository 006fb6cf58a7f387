"""No secret in a text, in a configuration as it is shown, nor in anything that a run leaves behind."""

import base64
import http.server
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from pipelines.config.keys import Config
from pipelines.config.load import to_yaml, with_values
from pipelines.entry import enter
from pipelines.errors import UserError
from pipelines.report.terminal import print_summary
from pipelines.run.job import Actors, prepare
from pipelines.secrets import deciding, is_secret, public, split_address, without_secrets
from pipelines.store import make_store
from tests.helpers import LOCAL, QUICK, fake_encoder, fake_generator, light_stages, read_rows, run_captions

SIGNED = "https://host/x.png?id=5&X-Amz-Credential=AKIA%2Fhunter2&X-Amz-Signature=hunter2&X-Amz-Expires=60"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("at https://bob:hunter2@host:5000/x@y.", "at https://host:5000/x@y."),
        ("postgresql+psycopg2://bob:hun/ter2@db/mlflow", "postgresql+psycopg2://db/mlflow"),
        ("https://hunter2@host/x, http://a:hunter2@b", "https://host/x, http://b"),
        (SIGNED, "https://host/x.png?id=5&X-Amz-Credential=***&X-Amz-Signature=***&X-Amz-Expires=60"),
        ("https://a.net/x?sv=1&amp;sig=hunter2%3D", "https://a.net/x?sv=1&amp;sig=***"),
        (
            "https://a.net/x?AWSAccessKeyId=hunter2&Signature=hunter2",
            "https://a.net/x?AWSAccessKeyId=***&Signature=***",
        ),
        ("EngineArgs(model='m', hf_token='hunter22')", "EngineArgs(model='m', hf_token='***')"),
        ("{'api_key': 'hunter22', 'n': 1}", "{'api_key': '***', 'n': 1}"),
        ("Authorization: Bearer hunter22", "Authorization: ***"),
        ("401 for hf_ABCDEFGHIJKLMNOPQRSTUV", "401 for ***"),
    ],
)
def test_secrets_leave_a_text_and_the_rest_stays(text, left):
    assert without_secrets(text) == left
    assert without_secrets(left) == left


@pytest.mark.parametrize(
    "text",
    [
        "http://localhost:5000/x@y",
        "http://[::1]:5000/a@b",
        "abfss://container@account.dfs.core.windows.net/x",
        "hf://datasets/owner/name@main/x.parquet",
        "sqlite:////runs/mlflow.db",
        "the image token: <image>, generate.max_new_tokens=12345678",
        "write to a@b.example or see https://b.example/?page=2",
    ],
)
def test_a_text_without_secrets_stays_as_it_is(text):
    assert without_secrets(text) == text


def test_no_key_of_the_job_is_taken_for_a_secret_by_its_name():
    assert not [name for name in Config().dotted() if is_secret(name)]
    assert not any(map(is_secret, ("stop_token_ids", "tokens_per_second", "mlflow.tracking_uri", "key_variable")))
    assert all(
        map(is_secret, ("engine.kwargs.hf_token", "apiKey", "AWS_SECRET_ACCESS_KEY", "Authorization", "password"))
    )


def test_a_configuration_is_shown_without_its_secrets_and_works_with_them():
    given = {"mlflow.tracking_uri": "https://bob:hunter2@host", "engine.kwargs": {"hf_token": "hunter2", "seed": 1}}
    config = with_values(Config(), given)
    assert config.mlflow.tracking_uri == given["mlflow.tracking_uri"]
    assert "hunter2" not in to_yaml(config) + json.dumps(public(config.dotted()))
    assert public(given)["engine.kwargs"] == {"hf_token": "***", "seed": 1}
    assert deciding(given) == {"mlflow.tracking_uri": "https://host", "engine.kwargs": {"seed": 1}}
    assert deciding({"regex": "token=[ab]{9}"}) == {"regex": "token=[ab]{9}"}


def test_a_store_opens_with_what_its_name_does_not_show():
    store = make_store("https://bob:hunter2@host/folder/a.parquet?X-Amz-Signature=hunter2")
    assert store.path == "https://host/folder/a.parquet"
    assert "hunter2" not in repr(store)
    assert store.join() == "https://bob:hunter2@host/folder/a.parquet?X-Amz-Signature=hunter2"
    assert store.address("https://bob:hunter2@host/folder") == "https://host/folder"
    assert make_store("https://host/download?id=3").path == "https://host/download?id=3"
    assert split_address("s3://bucket/a@b?sig=x").public == "s3://bucket/a@b?sig=x", "a key may hold anything"


def test_an_error_of_any_kind_is_told_without_secrets(capsys):
    def fail(_: Config) -> int:
        print("printed https://bob:hunter2@host/")
        raise UserError("no answer of https://bob:hunter2@host/")

    assert enter(["model.path=x"], fail, "", Config) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("printed https://host/\n", "error: no answer of https://host/\n")


class Web(http.server.BaseHTTPRequestHandler):
    """Serves the files of `content` to whoever logs in; a file that is signed, only with its signature."""

    content: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[tuple[str, str]]] = []  # the path, and what the client logged in with

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        self.asked.append(
            (self.path, base64.b64decode(self.headers.get("Authorization", "").partition(" ")[2]).decode())
        )
        data = self.content.get(path) if "X-Amz-Signature=hunter2" in query else None
        self.send_response(404 if data is None else 200)
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data or b"")

    do_HEAD = do_GET  # noqa: N815 - the name that http.server asks for

    def log_message(self, format: str, *_: object) -> None:
        pass


@pytest.fixture
def web(scene_png) -> Iterator[str]:
    """An address that logs in: `http://bob:hunter2@host`."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://bob:hunter2@127.0.0.1:{server.server_port}"
    names = ("a.png", "gone.png", "b.png")
    Web.content.update({f"/{name}": scene_png(i) for i, name in enumerate(names) if name != "gone.png"})
    rows = [{"url": f"{address}/{name}?X-Amz-Signature=hunter2", "title": f"{address}/title"} for name in names]
    Web.content["/list.jsonl"] = "\n".join(map(json.dumps, rows)).encode()
    yield address
    server.shutdown()


class Leaky(fake_generator()):
    """A stage that fails with whatever it knows."""

    def __call__(self, row):
        raise OSError(f"no answer of {Leaky.address}, Config(hf_token='hunter2hunter2')")

    address: ClassVar[str] = ""


def run_in_public(arguments: list[str], generator: type | None = None) -> int:
    def run(config: Config) -> int:
        job = prepare(config, Actors(fake_encoder(), generator or fake_generator()))
        outcome = run_captions(job, stages=light_stages)
        print_summary(job, outcome)
        return outcome.code

    return enter([*QUICK, LOCAL, *arguments], run, "", Config)


def test_nothing_that_a_run_leaves_holds_a_secret(web, tmp_path, capsys, caplog, monkeypatch):
    """Every file, the log, the summary and the tracking store; what the secrets open was open."""
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    Leaky.address = web
    paths = [f"input.path={web}/list.jsonl?X-Amz-Signature=hunter2", "input.image_column=url", "input.id_column=title"]
    keys = [
        *paths,
        "input.allow_private=true",
        "input.endpoint_url=http://AKIA:hunter2@127.0.0.1:9",
        "prompt.template=what is in {title} ?",
        "run.samples=2",
        "faults.max_rejected=1",
        f"quality.judge={{url: '{web}/v1?key=hunter2', model: m, options: {{api_key: hunter2}}}}",
    ]
    assert run_in_public([*keys, f"output.path={tmp_path / 'out'}", "mlflow.enabled=true"]) == 0
    dead = "mlflow.tracking_uri=http://bob:hunter2@127.0.0.1:9"
    assert run_in_public([*keys, f"output.path={tmp_path / 'failed'}", "mlflow.enabled=true", dead], Leaky) == 1
    assert ("/a.png?X-Amz-Signature=hunter2", "bob:hunter2") in Web.asked

    left = {str(path): path.read_bytes().decode("latin1") for path in tmp_path.rglob("*") if path.is_file()}
    left |= {"printed": "".join(capsys.readouterr()), "logged": caplog.text}
    left |= {
        f"{folder} {i}": str(row)
        for folder in ("captions", "quarantine")
        for i, row in enumerate(read_rows(tmp_path / "out", folder))
    }
    assert {"run.json", "report.html", "mlflow.db", "heartbeat.json", "config.yaml"} <= {
        Path(name).name for name in left
    }
    assert not [name for name, text in left.items() if "hunter2" in text]
    rows = read_rows(tmp_path / "out")
    assert {row["source"] for row in rows} == {"list.jsonl"}, "an address is signed anew; its file stays that file"
    assert {row["id"] for row in rows} == {web.replace("bob:hunter2@", "") + "/title"}
    assert [row["reason"] for row in read_rows(tmp_path / "out", "quarantine")] == ["fetch"]
    assert "run.samples" in left[str(tmp_path / "out" / "run.json")]
    assert "incomplete" in left["printed"]
