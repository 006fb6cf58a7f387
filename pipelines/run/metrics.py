"""The metrics of a run under their MLflow names: rates, counts, seconds, and dollars with their split by stage."""

import copy

from pipelines.dollars.account import Account
from pipelines.output.reader import OutputReader
from pipelines.output.totals import Totals
from pipelines.run.job import Job
from pipelines.run.pool_clock import PoolClock
from pipelines.run.progress import Progress
from pipelines.run.pruning import prefill_flops_of


def run_metrics(job: Job, progress: Progress, account: Account, clock: PoolClock) -> dict[str, float]:
    """The metrics of this run so far. Rates leave the start-up out; dollars include it.

    `gpu_busy/<stage>`: share of the time that the actors of a stage were held in which they worked, also of actors on
        CPUs; absent for a stage without actors.
    `idle_share`: share of the paid capacity (GPUs, else CPUs) that no stage used.
    `usd_per_million_images_steady`: price of a million images at the rate of the run, without start-up and gate.
    `usd_total`: while a node has no price, the cost of the other nodes; prices per image are then left out.
    `kept_from/overview`, `kept_from/tiles`, `retention/overview`, `retention/tiles`: of pictures in tiles
        (`Totals.crop_shares`).
    `retry_tokens`: tokens of attempts that were not kept. `tokens_per_second` and prices per token count kept tokens
        alone, so that what retries cost lowers the one and raises the others.
    `usd_of_retries`: the part of `usd/generate` that these tokens cost, by their share of all generated tokens.
    `prefill_tflops_per_image`: multiply-adds of the language model, as papers on pruning count them.
    """
    totals, rates, startup = progress.totals, progress.rates(), progress.startup_seconds
    busy = {stage: clock.busy_share(stage, totals.seconds[stage]) for stage in ("encode", "generate")}
    metrics: dict[str, float] = {
        **rates,
        "images_captioned": totals.images_captioned,
        "images_quarantined": totals.images_quarantined,
        "mean_caption_tokens": totals.generated_tokens / max(1, totals.captions),
        "mean_prompt_tokens": totals.prompt_tokens / max(1, totals.captions),
        "prefill_tflops_per_image": prefill_tflops(job, totals),
        "finished_by_length": totals.finished_by_length / max(1, totals.captions),
        **totals.crop_shares(),
        "finished_by_loop": totals.finished_by_loop / max(1, totals.captions),
        "captions_retried": totals.retried,
        "captions_repaired": totals.repaired,
        "retry_tokens": totals.retry_tokens,
        "wall_seconds": progress.elapsed,
        "startup_seconds": startup - account.gate_seconds,
        **{f"seconds/{stage}": seconds for stage, seconds in totals.seconds.items()},
        **{f"gpu_busy/{stage}": share for stage, share in busy.items() if share is not None},
        **{f"quarantined/{reason}": count for reason, count in totals.reasons.items()},
    }
    metrics |= account.metrics(
        first_unit=startup,
        busy=totals.seconds,
        images=totals.images_captioned,
        tokens=totals.generated_tokens,
        rates=rates,
        usd_to_finish=progress.usd_left,
    )
    if "usd/generate" in metrics:
        metrics["usd_of_retries"] = metrics["usd/generate"] * totals.retry_share
    return metrics


def prefill_tflops(job: Job, totals: Totals) -> float:
    """Multiply-adds / 1e12 of the language model's prefill: all prompts of an image, or one question of a benchmark."""
    mean_prompt = round(totals.prompt_tokens / max(1, totals.captions))
    flops = prefill_flops_of(job.config, job.checkpoint, job.pruning, mean_prompt)
    return (1 + len(job.config.prompt.more)) * flops / 1e12


def output_totals(job: Job, new_parts: Totals, summarized: set[str]) -> Totals:
    """Sums over the whole output: the parts that this run added, and the metadata of all others.

    Args:
        new_parts: sums over the parts that this run added.
        summarized: names of these parts.
    """
    reader, totals = OutputReader(job.output, job.folder), copy.deepcopy(new_parts)
    for unit in reader.totals(name for name in reader.names() if name not in summarized):
        totals.add(unit)
    return totals
