"""The configuration of jobs/sweep.py."""

from dataclasses import dataclass, field
from typing import Any, Literal

from pipelines.config.keys import Config, MlflowConfig
from pipelines.config.schema import key


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepSection:
    """the grid of settings, and how its points are judged"""

    grid: Any = key(
        "axes with their values, or a YAML file with them. Axes are method, retention, engine, batch, cluster, any key"
    )
    baselines: bool = key("add the methods none, random and uniform to those of the grid, for comparison", True)
    dry_run: bool = key("list the points with estimated dollars, and run none of them", False)
    trial_images: int = key(
        "images that a dry run captions to measure speed; 0 captions none and estimates nothing", 48, low=0
    )
    tolerance: float = key(
        "share of the unpruned quality that may be lost. Only settings whose 95 % interval stays within it are advised",
        0.05,
        low=0,
        high=1,
    )
    metric: Literal["auto", "cider", "rouge_l", "objects"] = key(
        "what quality is, as gate.metric. auto: cider or else rouge_l for captions of up to 30 words, objects for "
        "longer ones where they are known",
        "auto",
    )
    sample: int = key("captions of each point that are scored; the same images in every point", 10_000, low=2)
    resamples: int = key("bootstrap resamples for each interval", 1000, low=1)
    poll_seconds: float = key("seconds between status requests for a job on another cluster", 5.0, above=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig(Config):
    """The keys of the caption job, which all points share, and the grid in which the points differ."""

    sweep: SweepSection = field(default_factory=SweepSection)
    mlflow: MlflowConfig = field(default_factory=lambda: MlflowConfig(experiment="sweeps"))
