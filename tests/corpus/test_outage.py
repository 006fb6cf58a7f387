"""An outage in a whole job on Ray: it is said once what is waited for, then the job stops, and no image is to blame."""

import logging
import socket

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.store import Store
from tests.helpers import addresses, captions_of, run_fake
from tests.reading import png


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_job_without_a_network_stops_and_the_next_one_resumes(tmp_path, caplog):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{probe.getsockname()[1]}"
    (tmp_path / "here.png").write_bytes(png(1))
    urls = [*["here.png"] * 4, *[f"{closed}/{i}" for i in range(16)]]
    pq.write_table(pa.table({"url": urls}), tmp_path / "a.parquet", row_group_size=4)
    output = Store(str(tmp_path / "out"))
    arguments = [f"input.path={tmp_path}/a.parquet", f"output.path={output.path}", "unit.images=4"]
    arguments += ["input.allow_private=true", "input.fetch_retries=0"]
    with caplog.at_level(logging.WARNING):
        outcome = run_fake(*arguments, "faults.patience_seconds=3", "run.heartbeat_seconds=0.5", on_ray=True)
    assert outcome.code == 1
    assert "outage: addresses: no connection: Connection refused, for 3 s" in outcome.message
    said = "addresses: no connection: Connection refused; waiting since "
    told = sum(text.startswith(said) for text in caplog.messages)
    assert 1 <= told <= 4, "once for a wait, though the four units without an answer may wait one after the other"
    assert output.list("quarantine") == {}
    assert {row for _, row in addresses(output)} <= {0, 1, 2, 3}
    assert run_fake(*arguments, "faults.patience_seconds=0").code == 0  # now blame the addresses
    assert addresses(output) == [("a.parquet", row) for row in range(20)]
    assert [row for _, row, _ in captions_of(output)] == [0, 1, 2, 3]
