"""Joins a Ray cluster or starts an embedded one, and checks that the actor pools fit it."""

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import grpc
import ray
import ray.data

from otprune.models import Checkpoint
from pipelines.config.keys import Config
from pipelines.errors import UserError
from pipelines.run.outcome import Cluster
from pipelines.run.resources import TASK_CPUS, actor_cpus, actor_gpus, cluster_resources, gpus_needed, is_local
from pipelines.run.signals import answers, head_address
from pipelines.text import clean

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 15.0  # longest wait for a running cluster to open a connection
START_ATTEMPTS = 3  # of an embedded Ray; Ray fixes the 30 s of each
TOO_SLOW = ("timed out during startup", "Timed out while waiting for GCS")  # in messages of a Ray that came up too late


@contextmanager
def connected(config: Config, checkpoint: Checkpoint | None) -> Iterator[Cluster]:
    """Joins the cluster, or starts an embedded one, for the block, and yields its description.

    A Ray that already runs in this process is used and left running. `ray.address=none` needs no Ray.

    Args:
        checkpoint: as of `actor_cpus`.

    Raises:
        UserError: if no cluster answers at `ray.address`, an embedded Ray does not start, or the cluster is too small
            for the pools.
    """
    if is_local(config):
        yield _cluster("none", cluster_resources(config))
        return
    _quiet()
    if ray.is_initialized():
        yield _cluster("joined before", ray.cluster_resources())
        return
    try:
        cluster = _start(config, checkpoint)
        logger.info("%s", cluster)
        yield cluster
    finally:
        if answers(head_address()):
            ray.shutdown()
        # Else this would wait for the head until Ray ends the process, before the run could say why.


def _cluster(address: str, resources: Mapping[str, float], dashboard: str = "") -> Cluster:
    return Cluster(address, resources.get("CPU", 0), resources.get("GPU", 0), dashboard)


def _start(config: Config, checkpoint: Checkpoint | None) -> Cluster:
    address = config.ray.address or os.environ.get("RAY_ADDRESS")
    if address:
        _check_answers(address)
        try:
            environment = {"env_vars": {"OMP_WAIT_POLICY": "passive"}}
            context = ray.init(address=address, log_to_driver=False, runtime_env=environment)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(f"ray.address must name a running cluster, got {address}: {error}") from error
    else:
        # OpenMP threads that spin while they wait take cores from other processes: four times slower on a busy machine.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray logs an error at the start of each pool, about constructor arguments that are safe while the driver lives.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        context = _start_embedded(config, checkpoint)
    resources = ray.cluster_resources()
    check_room(config, checkpoint, resources, may_grow=bool(address))
    dashboard = f"http://{context.dashboard_url}" if context.dashboard_url else ""
    return _cluster(address or "embedded", resources, dashboard)


def _start_embedded(config: Config, checkpoint: Checkpoint | None) -> Any:
    """Starts a Ray of this process's own. On a busy machine Ray may miss its deadline, so a late start is retried.

    Raises:
        UserError: if Ray misses its deadline START_ATTEMPTS times, or cannot write where it has to.
    """
    store_mb, last_error = config.ray.object_store_mb, None
    for _ in range(START_ATTEMPTS):
        try:
            return ray.init(
                address="local",
                num_cpus=config.ray.num_cpus or max(os.cpu_count() or 1, actor_cpus(config, checkpoint) + TASK_CPUS),
                include_dashboard=config.ray.dashboard,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=store_mb * 2**20 if store_mb else None,
            )
        except OSError as error:  # its token is a file in HOME, its sockets are files whose names have a longest length
            raise UserError(
                f"an embedded Ray could not start: {clean(str(error))}. Ray needs a HOME that it can write to, and a "
                "short RAY_TMPDIR (e.g. /tmp) that it can write to; ray.address=none runs without Ray"
            ) from error
        except Exception as error:
            if not any(words in str(error) for words in TOO_SLOW):  # Ray has no exception type for a late start
                raise
            last_error = error
            logger.warning("Ray did not start within 30 s: is the machine busy?")
    raise UserError(f"an embedded Ray must start in {START_ATTEMPTS} attempts of 30 s: {last_error}") from last_error


def _check_answers(address: str) -> None:
    """Checks that something speaks gRPC at a host:port address, before `ray.init` is called.

    If nothing answers, `ray.init` ends this process after a while, without an exception. Addresses with TLS are not
    checked, because they do not answer a channel without TLS.

    Raises:
        UserError: if nothing at the address answers within ANSWER_SECONDS.
    """
    target = address.removeprefix("ray://")
    if ":" not in target or os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return
    with grpc.insecure_channel(target) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=ANSWER_SECONDS)
        except grpc.FutureTimeoutError as error:
            raise UserError(f"ray.address must name a running cluster, got {address}: no Ray answers there") from error


def call_on_cluster(config: Config, checkpoint: Checkpoint, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls `function(*arguments)` in one task with the CPUs and GPUs of an encode actor, and returns its result.

    With `ray.address=none` the call runs in this process.
    """
    if is_local(config):
        return function(*arguments)
    gpus, _ = actor_gpus(config, checkpoint)
    remote = ray.remote(num_cpus=config.encode.num_cpus, num_gpus=gpus)(function)
    return ray.get(remote.remote(*arguments))


def check_room(
    config: Config, checkpoint: Checkpoint | None, resources: Mapping[str, float], *, may_grow: bool
) -> None:
    """Checks that both pools and one task fit the cluster: Ray would wait in silence for a pool that never fits.

    Args:
        checkpoint: as of `actor_cpus`.
        resources: of the whole cluster, as `ray.cluster_resources()` gives them.
        may_grow: whether the cluster may still get nodes. If so, a pool that does not fit yet is only logged.

    Raises:
        UserError: if the pools do not fit a cluster that cannot grow.
    """
    needs = {"GPU": gpus_needed(config, checkpoint), "CPU": actor_cpus(config, checkpoint) + 1}  # one CPU for the tasks
    problems = [
        f"encode.actors, generate.actors and one task need {need:g} {kind}s, the cluster has {has:g}"
        for kind, need in needs.items()
        if need > (has := resources.get(kind, 0))
    ]
    for name, pool in (("encode", config.encode), ("generate", config.generate)):
        if pool.accelerator and f"accelerator_type:{pool.accelerator}" not in resources:
            known = sorted(kind.partition(":")[2] for kind in resources if kind.startswith("accelerator_type:"))
            has = ", ".join(known) or "none"
            problems.append(f"{name}.accelerator must be one of the cluster's ({has}), got {pool.accelerator}")
    for text in problems:
        if not may_grow:
            raise UserError(text)
        logger.warning("%s: the job waits until the cluster has grown", text)


def _quiet() -> None:
    """Turns off Ray's progress bars and most of its log, since this package shows a progress line of its own."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # A pool may get fewer units than it has actors, as in a resumed job with few units left. Ray warns of that.
    warnings.filterwarnings("ignore", "The minimum number of concurrent actors")
    for name in ("ray.data", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("ray.data._internal.execution.streaming_executor_state").addFilter(_in_one_line)


def _in_one_line(record: logging.LogRecord) -> bool:
    """A log filter that shortens a traceback to one line: Ray logs forty lines for each unit whose process died.

    The traceback must not outlive this call. It refers to the actor of the dead unit, so a handler that keeps the
    record would keep the actor, with its CPUs and GPUs.
    """
    if record.exc_info and record.exc_info[1]:
        error = record.exc_info[1]
        record.msg, record.args = f"{record.getMessage()} {type(error).__name__}: {clean(str(error))}", ()
        record.exc_info = None
    return True
