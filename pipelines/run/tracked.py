"""Starts the MLflow run of a job with its name, parameters and tags."""

import subprocess
from collections.abc import Mapping

from pipelines.config.load import REPOSITORY, to_yaml
from pipelines.run.job import Job
from pipelines.tracker import Tracker, make_tracker


def start_tracker(job: Job, tags: Mapping[str, str] | None = None) -> Tracker:
    """Starts an MLflow run with the configuration as parameters. `tags` are added to the tags of every job."""
    config = job.config
    name = config.mlflow.run_name or f"{config.prune.method}-{config.prune.share:g}-{job.fingerprint[:8]}"
    tracker = make_tracker(
        config.mlflow.enabled, config.mlflow.tracking_uri, config.mlflow.experiment, name, job.output.path
    )
    common = {
        "method": config.prune.method,
        "retention": f"{config.prune.share:g}",
        "engine": config.engine.name,
        "model": config.model.path,
        "cluster": config.ray.address or "local",
        "fingerprint": job.fingerprint,
    }
    tracker.start(config.dotted(), common | job.tags | git_tag() | dict(tags or {}), to_yaml(config))
    return tracker


def git_tag() -> dict[str, str]:
    """{"git_commit": ...} if the package runs from a git repository, else {}."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return {"git_commit": done.stdout.strip()} if done.returncode == 0 else {}
