"""The configuration of jobs/sweep.py."""

from dataclasses import dataclass, field
from typing import Any

from pipelines.config.keys import Config, MlflowConfig
from pipelines.config.schema import key


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepSection:
    """the grid of settings, and how it is judged"""

    grid: Any = key(
        "axis -> values, or a YAML file that holds it; axes: method, retention, engine, batch, cluster and any key"
    )
    baselines: bool = key("none, random and uniform are among the methods, whatever the grid says", True)
    dry_run: bool = key("list the points with estimated dollars and run none", False)
    trial_images: int = key("images that a dry run captions for its estimate; 0 runs nothing", 48, low=0)
    tolerance: float = key(
        "share of the unpruned model's quality that may be lost: a setting is advised if the lower end of its "
        "interval stays within it",
        0.05,
        low=0,
        high=1,
    )
    sample: int = key("captions of each point whose quality is measured; the same images in every point", 10_000, low=2)
    resamples: int = key("bootstrap resamples behind each interval", 1000, low=1)
    poll_seconds: float = key("seconds between looks at a job that was submitted to another cluster", 5.0, above=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig(Config):
    """The caption job's configuration, which all points share, and what they differ in."""

    sweep: SweepSection = field(default_factory=SweepSection)
    mlflow: MlflowConfig = field(default_factory=lambda: MlflowConfig(experiment="sweeps"))
