"""Counts the CPUs and GPUs that the actor pools of a configuration hold."""

import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from otprune.models import Checkpoint
from pipelines.config.keys import NO_RAY, Config
from pipelines.engines.registry import get_engine, takes_images
from pipelines.run.placement import SINK_CPUS, Stage, share_a_gpu

TASK_CPUS = 2  # of an embedded Ray, for the tasks that read, decode and write beside the actors


def is_local(config: Config) -> bool:
    """Whether the stages run in this process, without Ray."""
    return config.ray.address == NO_RAY


def cluster_resources(config: Config) -> Mapping[str, float]:
    """Resource -> amount, of the connected cluster or of this process: CPU, GPU, and Ray's further resources."""
    if not is_local(config):
        return ray.cluster_resources()
    import torch  # slow to load, and a run on a cluster does not need it here

    return {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}


def cluster_nodes(config: Config) -> list[dict[str, Any]]:
    """The nodes as `ray.nodes()` lists them.

    With `ray.address=none`, this process is the one node. No price file knows its kind, so `cost.usd_per_hour` alone
    gives it a price.
    """
    if not is_local(config):
        return ray.nodes()
    return [{"NodeID": "this process", "Alive": True, "Labels": {}, "Resources": cluster_resources(config)}]


def actor_cpus(config: Config, checkpoint: Checkpoint | None) -> int:
    """CPUs that the actors of both pools hold at their minimum sizes.

    Args:
        checkpoint: decides whether the engine encodes the images itself. None counts encode actors. The functions
            below use it in the same way.
    """
    encode = 0 if takes_images(config, checkpoint) else config.encode.actors * config.encode.num_cpus
    return math.ceil(encode + config.generate.actors * config.generate.num_cpus)


def actor_gpus(config: Config, checkpoint: Checkpoint | None) -> tuple[float, float]:
    """(GPUs of one encode actor, GPUs of one generate actor), as configured or else by these defaults.

    Without GPUs in the cluster, both are 0. With them, an encode actor takes 0.3 of a GPU and a generate actor 0.7, so
    that the two share one. An engine with several workers, or with a placement group, takes one GPU for each worker.
    An engine that encodes the images itself takes whole GPUs too, and leaves 0 for the encode actor.
    """
    has_gpus = cluster_resources(config).get("GPU", 0) > 0
    encode = (0.3 if has_gpus else 0.0) if config.encode.num_gpus is None else config.encode.num_gpus
    images = takes_images(config, checkpoint)
    engine = get_engine(config)
    num_workers = engine.num_workers(config)
    share = float(num_workers) if num_workers > 1 or images or engine.bundles(config) else 0.7
    generate = (share if has_gpus else 0.0) if config.generate.num_gpus is None else config.generate.num_gpus
    return (0.0 if images else encode), generate


def gpus_needed(config: Config, checkpoint: Checkpoint | None) -> float:
    """Whole GPUs that the cluster needs for both pools at their minimum sizes.

    An actor with a share below 1 lives on a single GPU, so shares that do not fit on one GPU together need another. The
    packing is first-fit decreasing, with pairs of an encode and a generate actor as one share, as `placers` puts them.
    """
    encode, generate = actor_gpus(config, checkpoint)
    actors = config.encode.actors, config.generate.actors
    pairs = min(actors) if share_a_gpu(encode, generate) else 0
    shares = [encode + generate] * pairs + [generate] * (actors[1] - pairs) + [encode] * (actors[0] - pairs)
    whole_gpus, free = 0.0, []  # GPUs of actors with one or more; free share of each GPU that actors share
    for share in sorted(filter(None, shares), reverse=True):
        if share >= 1:
            whole_gpus += share
            continue
        place = next((i for i, left in enumerate(free) if share <= left + 1e-9), None)
        if place is None:
            free.append(1 - share)
        else:
            free[place] -= share
    return whole_gpus + len(free)


def stage_weights(config: Config, checkpoint: Checkpoint | None) -> tuple[str, dict[str, float]]:
    """The scarce resource, and the units of it that one actor or task of each stage holds.

    The dollars are split in proportion to the scarce resource: GPU if any actor holds GPUs, else CPU.
    """
    encode, generate = actor_gpus(config, checkpoint)
    if encode or generate:
        return "GPU", {"encode": encode, "generate": generate}
    pools = {"encode": config.encode.num_cpus, "generate": config.generate.num_cpus}
    return "CPU", {"read": 1.0, "decode": 1.0, **pools, "write": SINK_CPUS}


def wait_for_room(stages: Sequence[Stage], seconds: float = 60.0) -> None:
    """Waits until the cluster has room for all actors of the stages and one task, but no longer than `seconds`.

    An actor may be restarting when its pool is closed. Such an actor holds its CPUs and GPUs until it is up again and
    Ray ends it.
    """
    cpus = math.ceil(sum(stage.min_actors * stage.num_cpus for stage in stages))
    gpus = sum(stage.min_actors * stage.num_gpus for stage in stages)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        free = ray.available_resources()
        if free.get("CPU", 0) >= cpus + 1 and free.get("GPU", 0) >= gpus:
            return
        time.sleep(0.2)
