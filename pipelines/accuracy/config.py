"""The configurations of jobs/evaluate.py, jobs/evaluate_grid.py and jobs/calibrate.py."""

from dataclasses import dataclass, field
from typing import Any

from pipelines.config.keys import Config, GenerateConfig, MlflowConfig
from pipelines.config.schema import key
from pipelines.quality.config import BaselineConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig(Config):
    """The configuration of an evaluation: the caption job's keys, and which questions to ask."""

    benchmarks: Any = key("a benchmark, a list of them, all (the eleven of the papers), demo or gallery", "demo")
    limit: int | None = key(
        "fewest questions to ask of each benchmark; the last scoring group is always completed", None, low=1
    )
    resamples: int = key("bootstrap resamples behind each interval", 1000, low=1)
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    generate: GenerateConfig = field(default_factory=lambda: GenerateConfig(max_new_tokens=1024, retries=0))
    mlflow: MlflowConfig = field(default_factory=lambda: MlflowConfig(experiment="benchmarks"))


NOT_IN_EVALUATION = (
    "input.format",
    "input.image_column",
    "input.id_column",
    "input.reference_column",
    "input.limit",
    "input.on_changed",
    "input.fetch_threads",
    "input.fetch_per_host",
    "input.fetch_timeout",
    "input.fetch_retries",
    "input.allow_private",
    "input.allow_paths",
    "faults.redo",
    "prompt.template",
    "prompt.more",
    "run.estimate",
    "estimate.images",
    "estimate.instances",
    "estimate.seed",
    "gate.min_quality",
    "gate.images",
    "gate.seed",
    "gate.metric",
    "quality.objects",
    "quality.instances",
    "quality.judge",
)
"""Keys of the caption job without meaning in an evaluation: the benchmark decides what they would set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GridConfig:
    """the points to evaluate: methods x retentions"""

    methods: list[str] = key(
        "methods to compare, as prune.method names them, or variants such as cdpruner:words, which grid.settings "
        "explains; none (all tokens) is always among them",
        [
            "otprune",
            "otprune_centered",
            "logdet_linear",
            "logdet_linear_centered",
            "divprune",
            "random",
            "uniform",
        ],
    )
    retentions: list[float] = key("shares of the visual tokens for each method to keep", [0.5, 0.25, 0.098, 0.05])
    settings: dict[str, Any] = key(
        "for a method or variant: keys of prune.settings, gamma, gamma_scale, seed, per_tile: {fastv: {layer: 2}}",
        {},
    )
    calibration_images: int = key("images to fit FitPrune's recipes to, if grid.settings holds no recipe", 64, low=1)
    distance_images: int = key(
        "images to measure the distance of kept to all tokens on (trace objective, Gaussian W2); 0 for none",
        64,
        low=0,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class AccuracyConfig(EvaluateConfig):
    """The configuration of an accuracy grid: the evaluation's keys, and the methods and retentions to evaluate."""

    grid: GridConfig = field(default_factory=GridConfig)
    mlflow: MlflowConfig = field(default_factory=lambda: MlflowConfig(experiment="accuracy"))


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationConfig:
    """how to find the settings, and where to write them"""

    path: str = key("JSON file to write", "runs/calibration.json")
    samples: int = key("number of images to read, from the front of the corpus", 64, low=1)
    threshold: float = key(
        "largest KL divergence, in nats, at which VTW may withdraw the image; published: 0.003, for LLaVA-1.5-13B "
        "0.0005, for LLaVA-1.6-7B 0.0001",
        0.003,
        low=0,
    )
    first_layer: int | None = key(
        "first layer that VTW tries; null is the release's 5, in proportion in models of fewer than 32", None, low=0
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrateConfig(Config):
    """The configuration of a calibration: the caption job's keys, and how to calibrate."""

    calibrate: CalibrationConfig = field(default_factory=CalibrationConfig)
