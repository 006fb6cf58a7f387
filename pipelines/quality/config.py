"""The configuration of jobs/quality.py."""

from dataclasses import dataclass, field

from pipelines.config.keys import Config, MlflowConfig
from pipelines.config.schema import key


@dataclass(frozen=True, kw_only=True, slots=True)
class BaselineConfig:
    """the output to compare with"""

    path: str | None = key("another output for the same questions or images, to compare with", None)
    endpoint_url: str | None = key("S3 endpoint of the baseline")


@dataclass(frozen=True, kw_only=True, slots=True)
class CanaryConfig:
    """whether the model looks at its images"""

    images: int = key(
        "images to caption as they are, blank and swapped, to test that the captions depend on them; 0 for none",
        0,
        low=0,
    )
    max_same: float = key(
        "largest share of captions that may stay the same without their image; a larger share fails the gate",
        0.1,
        low=0,
        high=1,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityConfig(Config):
    """The configuration of jobs/quality.py: the caption job's keys, and what to compare its captions with."""

    sample: int = key("number of captions to measure; the same images in every output", 10_000, low=2)
    resamples: int = key("bootstrap resamples behind each interval", 1000, low=1)
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    canary: CanaryConfig = field(default_factory=CanaryConfig)
    mlflow: MlflowConfig = field(default_factory=lambda: MlflowConfig(experiment="quality"))
