"""The numbers of a run, under their MLflow names: rates, counts, seconds, and dollars with where they went."""

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from otprune.models import Checkpoint
from pipelines.config.keys import Config
from pipelines.dollars.attribution import attribute, price_run, price_steady
from pipelines.dollars.ledger import Spent
from pipelines.dollars.meter import Meter
from pipelines.output.parts import read_totals
from pipelines.output.totals import Totals
from pipelines.run import watchdog as watch
from pipelines.run.job import Job
from pipelines.run.placement import SINK_CPUS
from pipelines.run.progress import Progress
from pipelines.run.pruning import prefill_flops_of
from pipelines.run.resources import actor_gpus


@dataclass(slots=True)
class Account:
    """Everything that the dollars of a run are reckoned with."""

    meter: Meter
    earlier: Spent  # by earlier runs of this output
    resource: str = "CPU"  # that divides the dollars
    weights: dict[str, float] = field(default_factory=dict)  # units of it that one actor or task of a stage holds
    gate: tuple[float, float] | None = None  # when it began and ended, on the meter's clock
    held_before: dict[str, float] = field(default_factory=lambda: dict(watch.held_seconds))
    active_before: dict[str, float] = field(default_factory=lambda: dict(watch.active_seconds))

    def weigh(self, config: Config, checkpoint: Checkpoint) -> None:
        """Chooses the resource and the weights, as the connected cluster has it."""
        gpus: dict[str, float] = dict(zip(watch.POOLS, actor_gpus(config, checkpoint), strict=True))
        if any(gpus.values()):
            self.resource, self.weights = "GPU", gpus
        else:
            pools = {"encode": config.encode.num_cpus, "generate": config.generate.num_cpus}
            self.resource, self.weights = "CPU", {"read": 1.0, "decode": 1.0, **pools, "write": SINK_CPUS}

    @property
    def usd_of_output(self) -> float | None:
        """Dollars of this run and of the earlier ones; None if this one has no price."""
        usd = self.meter.usd
        return None if usd is None else usd + self.earlier.usd

    def spent(self) -> Spent:
        """Of all runs of the output, this one included."""
        spent = copy.deepcopy(self.earlier)
        spent.add(self.meter.usd, self.meter.elapsed, self.meter.node_seconds)
        return spent


def run_metrics(job: Job, progress: Progress, account: Account) -> dict[str, float]:
    """The metrics of this run so far. Rates include nothing of the start-up, dollars all of it.

    `gpu_busy/<stage>` is the share of the time its actors were held in which they worked, CPU actors too;
    `idle_share` that of the capacity paid for (GPUs, else CPUs) that no stage used;
    `usd_per_million_images_steady` what a million images cost at this rate, without start-up and gate;
    while a node has no price, nothing is divided by images, and `usd_total` is what the others cost;
    `prefill_tflops_per_image` counts multiply-adds of the language model, as papers on pruning do.
    """
    totals = progress.totals
    metrics: dict[str, float] = {
        **progress.rates(),
        "images_captioned": totals.images_captioned,
        "images_quarantined": totals.images_quarantined,
        "mean_caption_tokens": totals.generated_tokens / max(1, totals.captions),
        "mean_prompt_tokens": totals.prompt_tokens / max(1, totals.captions),
        "prefill_tflops_per_image": prefill_tflops(job, totals),
        "finished_by_length": totals.finished_by_length / max(1, totals.captions),
        "wall_seconds": progress.elapsed,
        "startup_seconds": progress.startup_seconds - _gate_seconds(account),
        **{f"seconds/{stage}": seconds for stage, seconds in totals.seconds.items()},
        **{f"gpu_busy/{stage}": share for stage, share in _busy(job, progress, account).items()},
        **{f"quarantined/{reason}": count for reason, count in totals.reasons.items()},
    }
    return metrics | _dollars(progress, account)


def _busy(job: Job, progress: Progress, account: Account) -> dict[str, float]:
    """Share of each pool's actor-seconds spent on units; of those that overlap in an actor, no more than its time."""
    actors = {"encode": job.config.encode.actors, "generate": job.config.generate.actors}
    shares = {}
    for stage, count in actors.items():
        held = watch.held_seconds[stage] - account.held_before.get(stage, 0.0) or count * progress.elapsed
        active = watch.active_seconds[stage] - account.active_before.get(stage, 0.0) or held
        shares[stage] = min(progress.totals.seconds[stage], active, held) / max(held, 1e-9)
    return shares


def _dollars(progress: Progress, account: Account) -> dict[str, float]:
    meter, totals = account.meter, progress.totals
    usd, capacity = meter.usd, meter.capacity(account.resource)
    before, gate = _before(progress, account)
    shares = attribute(totals.seconds, account.weights, capacity, before, gate)
    metrics: dict[str, float] = {"node_hours": sum(meter.node_seconds.values()) / 3600}
    if capacity:
        metrics["idle_share"] = shares.idle
    if unpriced := meter.unpriced.total():
        metrics["nodes_unpriced"] = unpriced
    if usd is None:
        return metrics
    metrics |= {"usd_total": usd, "usd_of_output": usd + account.earlier.usd}
    if unpriced:
        return metrics
    metrics |= price_run(usd, totals.images_captioned, totals.generated_tokens) | shares.dollars(usd)
    metrics |= price_steady(usd * (1 - before - gate), progress.elapsed - progress.startup_seconds, progress.rates())
    if progress.usd_left is not None:
        metrics["usd_to_finish"] = progress.usd_left
    return metrics


def _before(progress: Progress, account: Account) -> tuple[float, float]:
    """Shares of the dollars: start-up, gate. Of the time where nothing has a price."""
    meter, gate = account.meter, account.gate or (0.0, 0.0)
    first = meter.started + progress.startup_seconds
    spent = [meter.usd_until(moment) for moment in (first, *gate, meter.now)]
    until_first, gate_began, gate_ended, whole = (each or 0.0 for each in spent)
    if whole <= 0:
        until_first, gate_began, gate_ended, whole = first - meter.started, *gate, meter.elapsed
    share = (gate_ended - gate_began) / max(whole, 1e-12) if account.gate else 0.0
    return max(0.0, until_first / max(whole, 1e-12) - share), share


def _gate_seconds(account: Account) -> float:
    return account.gate[1] - account.gate[0] if account.gate else 0.0


def prefill_tflops(job: Job, totals: Totals) -> float:
    """Multiply-adds / 1e12 of the language model on one image: on its prompts, or on one question of a benchmark."""
    mean_prompt = round(totals.prompt_tokens / max(1, totals.captions))
    flops = prefill_flops_of(job.config, job.checkpoint, job.pruning, mean_prompt)
    return (1 + len(job.config.prompt.more)) * flops / 1e12


def output_totals(job: Job, progress: Progress, summarized: set[str]) -> Totals:
    """Sums over everything the output holds: this run's own, and the metadata of objects committed before."""
    before = [name for name in job.output.list(job.folder) if name not in summarized]
    totals = copy.deepcopy(progress.totals)
    with ThreadPoolExecutor(16) as pool:
        for unit in pool.map(lambda name: read_totals(job.output, name, job.folder), before):
            totals.add(unit)
    return totals
