"""Runs points on other clusters: submits their jobs to Ray dashboards, polls them, and reads the shared output.

The submission id of a job contains the name of its point. A sweep that was killed therefore finds a job that still runs
and waits for it, instead of paying twice.
"""

import json
import logging
import shlex
import time
import urllib.error
import urllib.request
from typing import Any

from ray.job_submission import JobStatus, JobSubmissionClient

from pipelines.config.keys import Config
from pipelines.config.load import REPOSITORY, with_values
from pipelines.errors import UserError
from pipelines.run.heartbeat import FILE as HEARTBEAT
from pipelines.run.outcome import CAPPED, DONE, FAILED, Outcome
from pipelines.secrets import public
from pipelines.store import make_store, read_json
from pipelines.sweep.grid import Point
from pipelines.text import clean

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 15.0  # a dashboard must answer within this time
SILENCE_SECONDS = 60.0  # longest silence of a dashboard while a job runs
GONE = (ConnectionError, OSError, RuntimeError)  # raised by Ray's client if the dashboard does not answer or refuses


class UnreachableError(UserError):
    """No Ray dashboard answers at a cluster's address."""


def connect(address: str) -> JobSubmissionClient:
    """A client of the cluster whose dashboard is at `address`.

    Raises:
        UnreachableError: if no dashboard answers there.
    """
    wanted = "the cluster's address must be that of a Ray dashboard, such as http://host:8265"
    if not address.startswith(("http://", "https://")):
        raise UnreachableError(f"{wanted}, got {address}")
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=ANSWER_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # the dashboard answers; Ray's client adds the token if one is required
    except (OSError, ValueError) as error:
        raise UnreachableError(f"no Ray dashboard answers at {address}: {clean(str(error))}") from error
    try:
        return JobSubmissionClient(address)
    except GONE as error:
        raise UnreachableError(f"the Ray dashboard at {address} refuses: {clean(str(error))}") from error


def run_there(point: Point, poll_seconds: float) -> Outcome:
    """Submits the point's job, or finds it running, and waits for its end. Ctrl-C also stops the job on that cluster.

    Raises:
        UnreachableError: if the cluster does not answer, or stops answering.
    """
    assert point.address is not None
    client = connect(point.address)
    earlier_beat = _last_beat(point)
    try:
        submission = submit(client, point)
        status = wait(client, submission, poll_seconds)
    except KeyboardInterrupt:
        _stop(client, point)
        raise
    if status == JobStatus.SUCCEEDED:
        return Outcome(code=DONE)
    info = client.get_job_info(submission)
    code = CAPPED if getattr(info, "driver_exit_code", None) == CAPPED else FAILED
    return Outcome(
        code=code, message=f"job {submission} {status.lower()}: {_why(client, submission, point, earlier_beat)}"
    )


def submit(client: JobSubmissionClient, point: Point) -> str:
    """The submission id of the point's job. Submits the job unless it runs already."""
    for attempt in range(1000):  # Ray accepts an id once: a job that ended keeps its id, the next try takes a new one
        name = f"{point.name}-{attempt}"
        known = _status(client, name)
        if known is not None and known.is_terminal():
            continue
        if known is None:
            client.submit_job(
                entrypoint=entrypoint(point.config),
                submission_id=name,
                runtime_env={"working_dir": str(REPOSITORY)},
                metadata={"point": point.name},
            )
            logger.info("%s: submitted to %s", name, point.address)
        else:
            logger.info("%s: runs on %s already", name, point.address)
        return name
    raise UserError(f"{point.name} was submitted to {point.address} a thousand times")


def entrypoint(config: Config) -> str:
    """The command of the point's job on the other cluster. Local paths become absolute: both sides must share them.

    Raises:
        UserError: if a key holds a secret, which the cluster would show to everybody who sees its jobs.
    """
    stores = {"input.path": make_store(config.input.path), "output.path": make_store(config.output.path)}
    paths = {name: store.path for name, store in stores.items() if store.is_local}
    values, default = with_values(config, paths).dotted(), Config().dotted()
    changed = {name: value for name, value in values.items() if value != default[name] and name != "ray.address"}
    if secret := next((name for name, value in changed.items() if public(value) != value), None):
        raise UserError(f"{secret} must hold no secret in a job that is submitted; the cluster's environment may")
    arguments = [f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in changed.items()]
    return shlex.join(["python", "jobs/caption_corpus.py", *arguments])


def wait(client: JobSubmissionClient, submission: str, poll_seconds: float) -> JobStatus:
    """Polls until the job ends; returns its last status.

    Raises:
        UnreachableError: if the dashboard is silent for SILENCE_SECONDS. The job may go on; the next sweep finds it.
    """
    last_answer = time.monotonic()
    while True:
        try:
            status = client.get_job_status(submission)
            last_answer = time.monotonic()
            if status.is_terminal():
                return status
        except GONE as error:
            if time.monotonic() - last_answer > SILENCE_SECONDS:
                raise UnreachableError(
                    f"the cluster stopped answering while {submission} ran: {clean(str(error))}"
                ) from error
        time.sleep(poll_seconds)


def _status(client: JobSubmissionClient, submission: str) -> Any:
    """The status of a job; None if there is no such job."""
    try:
        return client.get_job_status(submission)
    except RuntimeError as error:
        if "404" in str(error) or "does not exist" in str(error):
            return None
        raise UnreachableError(f"the cluster refuses: {clean(str(error))}") from error


def _stop(client: JobSubmissionClient, point: Point) -> None:
    try:
        for job in client.list_jobs():
            is_own = (job.metadata or {}).get("point") == point.name and not job.status.is_terminal()
            if is_own and job.submission_id:
                client.stop_job(job.submission_id)
                logger.info("%s: stopped on %s", job.submission_id, point.address)
    except GONE as error:
        logger.warning(
            "%s may still run on %s, which does not answer: %s", point.name, point.address, clean(str(error))
        )


def _last_beat(point: Point) -> dict[str, Any] | None:
    """The heartbeat.json of the point's newest run; None if no run has begun."""
    output = point.config.output
    return read_json(make_store(output.path, endpoint_url=output.endpoint_url), HEARTBEAT)


def _why(client: JobSubmissionClient, submission: str, point: Point, earlier_beat: dict[str, Any] | None) -> str:
    """Why the job ended, from its heartbeat, or from its log if the job did not write a heartbeat.

    A job that ends before its run begins (exit code 2) leaves the heartbeat of an earlier run, which is `earlier_beat`.
    Its log then holds the reason: the `error:` line, else the last line.
    """
    beat = _last_beat(point)
    if beat and beat != earlier_beat and beat["message"]:
        return clean(beat["message"])
    lines = [line.strip() for line in client.get_job_logs(submission).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return clean((errors or lines or ["it left no log"])[-1])
