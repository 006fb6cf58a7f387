"""The heartbeat: what a run says of itself while it lives, on disk and on S3, and that it survives what it meets."""

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipelines.config.keys import Config
from pipelines.config.load import load_config
from pipelines.dollars.account import Account
from pipelines.dollars.ledger import Spent, record_run
from pipelines.dollars.meter import Meter, Tariff, make_tariff
from pipelines.run.heartbeat import FILE, Heartbeat
from pipelines.run.job import Actors, Job, prepare
from pipelines.run.metrics import run_metrics
from pipelines.run.outcome import Outcome
from pipelines.run.pool_clock import PoolClock
from pipelines.run.progress import Progress
from pipelines.store import Store
from tests.helpers import LOCAL, QUICK, addresses, fake_encoder, fake_generator, run_captions, s3_server

RATE = "cost.usd_per_hour=3600"  # a dollar a second
FIELDS = {"run", "state", "started", "updated", "rows", "done", "images_per_second", "seconds_to_finish", "usd"}
FIELDS |= {"usd_to_finish", "usd_of_output", "elapsed_seconds", "node_seconds", "quarantined"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, scene_parquet: Callable[..., Path]) -> Path:
    return scene_parquet(tmp_path_factory.mktemp("corpus") / "scenes.parquet", 12, row_group_size=4)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server("there") as address:
        yield address


def job_of(corpus: Path, *arguments: str) -> Job:
    return prepare(load_config([*QUICK, LOCAL, f"input.path={corpus}", "unit.images=2", RATE, *arguments]))


def run_slowly(job: Job) -> Outcome:
    return run_captions(replace(job, actors=Actors(fake_encoder(seconds=0.4), fake_generator())))


@pytest.mark.parametrize("where", ["local", "s3"])
def test_a_run_beats_while_it_lives_and_says_how_it_ended(corpus, tmp_path, s3, where):
    output = [f"output.path={tmp_path / 'out'}"]
    if where == "s3":
        output = ["output.path=s3://there/out", f"output.endpoint_url={s3}"]
    job = job_of(corpus, *output, "run.heartbeat_seconds=0.2")
    seen: list[dict[str, Any]] = []

    def watch() -> None:
        while not seen or seen[-1]["state"] == "running":
            if job.output.exists(FILE):
                seen.append(json.loads(job.output.read(FILE)))  # whole JSON, whenever it is read
            done.wait(0.05)
            if done.is_set():
                return

    done = threading.Event()
    thread = threading.Thread(target=watch)
    thread.start()
    outcome = run_slowly(job)
    done.set()
    thread.join()
    assert outcome.code == 0
    last = json.loads(job.output.read(FILE))
    assert set(last) >= FIELDS
    assert (last["state"], last["done"], last["rows"]) == ("done", 12, 12)
    assert last["usd"] == pytest.approx(outcome.metrics["usd_total"], rel=0.01)
    assert last["usd_of_output"] == pytest.approx(last["usd"])
    running = [beat for beat in seen if beat["state"] == "running"]
    assert len({beat["updated"] for beat in running}) > 1
    assert [beat["usd"] for beat in running] == sorted(beat["usd"] for beat in running)
    assert {beat["done"] for beat in running} - {0, 12}, "seen on the way"
    kept = json.loads(job.output.read(f"runs/{last['run']}.json"))
    assert kept["usd"] == pytest.approx(last["usd"])
    assert sum(kept["node_seconds"].values()) == pytest.approx(kept["wall_seconds"], rel=0.01)


@pytest.mark.slow
def test_the_cost_of_a_killed_run_counts(corpus, tmp_path):
    """All that a killed driver leaves is its last beat."""
    record_run(Store(str(tmp_path)), "20260101T000000-killed", 2.5, 100.0, {"g6.xlarge": 100.0})
    outcome = run_slowly(job_of(corpus, f"output.path={tmp_path}"))
    assert outcome.metrics["usd_of_output"] == pytest.approx(2.5 + outcome.metrics["usd_total"])
    spent = json.loads((tmp_path / "run.json").read_text())["spent"]
    assert spent["runs"] == 2
    assert spent["node_seconds"]["g6.xlarge"] == 100.0
    assert spent["usd"] == pytest.approx(outcome.metrics["usd_of_output"])


def test_the_dollars_of_a_run_divide_into_stages_start_up_and_idle(corpus, tmp_path):
    metrics = run_slowly(job_of(corpus, f"output.path={tmp_path}")).metrics
    parts = {name: value for name, value in metrics.items() if name.startswith("usd/")}
    assert set(parts) == {
        f"usd/{part}" for part in ("read", "decode", "encode", "generate", "write", "startup", "idle")
    }
    assert sum(parts.values()) == pytest.approx(metrics["usd_total"])
    assert all(value >= 0 for value in parts.values())
    assert 0 < metrics["idle_share"] < 1
    assert metrics["usd_per_million_images_steady"] < metrics["usd_per_million_images"]
    assert metrics["tokens_per_usd"] == pytest.approx(24 / metrics["usd_total"])


def test_a_node_that_joins_without_a_price_is_said_and_leaves_no_price_of_an_image(
    corpus, tmp_path, monkeypatch, caplog
):
    """Spot nodes, say, that come up once the job asks for GPUs."""
    head = {"NodeID": "1", "Alive": True, "Labels": {"instance-type": "m7i.xlarge"}, "Resources": {"CPU": 4}}
    spot = {"instance-type": "g6e.2xlarge", "ray.io/market-type": "spot"}
    nodes = [head]
    monkeypatch.setattr("pipelines.run.heartbeat.cluster_nodes", lambda config: nodes)
    meter = Meter(make_tariff(Config().cost), 0.0)
    progress, account = Progress(12, 0, meter, 5.0), Account(meter, Spent())
    job = job_of(corpus, f"output.path={tmp_path}")
    beat = Heartbeat(job, "run", progress, account)
    beat.look()
    progress.totals.images_captioned = 10
    assert {"usd_per_image", "usd/idle"} <= run_metrics(job, progress, account, PoolClock()).keys()
    nodes.append({"NodeID": "2", "Alive": True, "Labels": spot, "Resources": {"GPU": 1}})
    beat.look(joined=True)
    assert "not in the dollars: a node that joined, g6e.2xlarge: no spot price" in caplog.text
    metrics = run_metrics(job, progress, account, PoolClock())
    assert metrics["nodes_unpriced"] == 1
    assert {name for name in metrics if "usd" in name} == {"usd_total", "usd_of_output"}


def test_a_store_that_refuses_is_said_once_and_the_thread_lives_on(corpus, tmp_path, monkeypatch, caplog):
    job = job_of(corpus, f"output.path={tmp_path}", "run.heartbeat_seconds=0.01")
    beats = []

    def refuse(self: Store, name: str, data: bytes) -> None:
        beats.append(name)
        raise PermissionError("no")

    monkeypatch.setattr(Store, "write", refuse)
    meter = Meter(Tariff(usd_per_hour=1.0), 0.0)
    progress = Progress(12, 0, meter, 5.0)
    with Heartbeat(job, "run", progress, Account(meter, Spent())) as beat:
        while len(beats) < 5:
            beat._stop.wait(0.01)
    beat.finish(0, "")
    assert [record.getMessage() for record in caplog.records] == [
        "heartbeat.json: PermissionError: no; the job goes on"
    ]


@pytest.mark.slow
def test_a_tracking_server_that_dies_in_mid_run_costs_no_caption_and_no_number(corpus, tmp_path, monkeypatch):
    """It answers MLflow's REST calls until the first metrics are in, and then nothing any more."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # retries of the client cost half a minute
    calls: list[str] = []

    class Dying(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer()

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.answer()

        def answer(self) -> None:
            call = self.path.partition("?")[0].rpartition("mlflow/")[2]
            calls.append(call)
            if calls.count("runs/log-batch") > 2:  # the parameters, then metrics
                self.connection.close()
                threading.Thread(target=die).start()
                return
            run = {
                "info": {"run_id": "r1", "run_uuid": "r1", "artifact_uri": f"file://{tmp_path}/a", "status": "RUNNING"}
            }
            experiment = {"experiment": {"experiment_id": "1", "name": "captions", "lifecycle_stage": "active"}}
            body = {"experiments/get-by-name": experiment, "runs/create": {"run": run}, "runs/get": {"run": run}}
            data = json.dumps(body.get(call, {})).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    def die() -> None:
        server.shutdown()
        server.server_close()  # from now on connections are refused

    server = ThreadingHTTPServer(("127.0.0.1", 0), Dying)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    uri = f"mlflow.tracking_uri=http://127.0.0.1:{server.server_address[1]}"
    more = ("mlflow.enabled=true", "run.progress_seconds=0.1", f"output.path={tmp_path / 'out'}")
    outcome = run_slowly(job_of(corpus, uri, *more))
    die()
    thread.join()
    assert calls.count("runs/log-batch") >= 3, "it was alive at first"
    assert outcome.code == 0
    assert outcome.tracked.startswith("incomplete: ")
    assert len(addresses(tmp_path / "out")) == 12
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["finished"]
    assert record["last_run"] == outcome.metrics
    assert json.loads((tmp_path / "out" / FILE).read_text())["state"] == "done"
