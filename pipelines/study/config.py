"""The study's configuration: a section for each experiment, and the caption job's sections that apply to a study."""

from dataclasses import dataclass, field
from typing import Any, Literal

from pipelines.config.keys import Config, EncodeConfig, GenerateConfig, MlflowConfig
from pipelines.config.schema import key

EXPERIMENTS = ("table2", "greedy", "gamma", "distance", "ranks")
SECTIONS = ("output", "model", "mlflow", "ray", "run")  # the caption job's sections that apply to the study
WITHOUT_MEANING = ("model.dtype", "output.on_mismatch", "run.samples")  # keys of SECTIONS that do not apply

Scale = Literal["released", "paper", "trace"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Table2Config:
    """Table 2 of the paper, on synthetic data"""

    rows: list[int] = key("lines of Table 2, 1 to 5", [1, 2, 3, 4, 5])
    seeds: int = key("data sets of each line", 20, low=2)
    subsets: int = key("random subsets that stand for all subsets; a fifth as many on line 5", 2000, low=10)
    exhaustive: list[int] = key(
        "lines on which every subset is tried: 1 (15,504) and 2 (30,045,015: 15 minutes a seed)", [1]
    )
    block: int = key("subsets in one piece of an exhaustive line", 500_000, low=1000)


@dataclass(frozen=True, kw_only=True, slots=True)
class GreedyConfig:
    """greedy selection against brute force"""

    sizes: list[list[int]] = key(
        "[tokens, width, kept] of the data sets", [[12, 8, 4], [16, 8, 5], [20, 10, 5], [16, 3, 6]]
    )
    gammas: list[float] = key("scales inside the log-det, as the released code takes them", [0.01, 1.0, 100.0])
    seeds: int = key("data sets of each size", 20, low=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class GammaConfig:
    """the effect of gamma on each of its scales"""

    gammas: list[float] = key("values of gamma on each scale", [0.005, 0.01, 0.05, 0.1, 0.5])
    scales: list[Scale] = key("meanings of gamma", ["released", "paper", "trace"])
    tokens: int = key("visual tokens of the synthetic images", 576, low=2)
    kept: int = key("tokens to keep", 56, low=1)
    widths: list[int] = key(
        "feature widths; selections are compared with the selection at the last width", [192, 1024, 5120, 4096]
    )
    seeds: int = key("synthetic images", 5, low=1)
    retention: float = key("share of the tokens to keep when the demo model answers", 0.098, above=0, high=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class DistanceConfig:
    """distance to all tokens against accuracy, on the demo world"""

    methods: list[str] = key("names of selectors in pipelines/study/demo_points.py; empty takes all", [])
    retentions: list[float] = key("shares of the visual tokens to keep", [0.05, 0.098, 0.15, 0.2, 0.5])
    scenes: int = key("held-out scenes of the demo world, each with its questions", 160, low=2)
    exact: bool = key("measure exact transport as well (POT; takes half of the time)", True)


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyConfig(Config):
    """The configuration of jobs/study.py: the keys of the caption job that apply, and the study's own."""

    experiments: Any = key("all, or a list of table2, greedy, gamma, distance, ranks", "all")
    resamples: int = key("bootstrap resamples behind each interval", 1000, low=10)
    piece_scenes: int = key("scenes in one piece", 16, low=1)
    table2: Table2Config = field(default_factory=Table2Config)
    greedy: GreedyConfig = field(default_factory=GreedyConfig)
    gamma: GammaConfig = field(default_factory=GammaConfig)
    distance: DistanceConfig = field(default_factory=DistanceConfig)
    mlflow: MlflowConfig = field(default_factory=lambda: MlflowConfig(experiment="study"))
    # The pieces are Ray tasks of one CPU. These sections reserve nothing, so that no room is kept free for actors.
    encode: EncodeConfig = field(default_factory=lambda: EncodeConfig(num_cpus=0.0, num_gpus=0.0))
    generate: GenerateConfig = field(default_factory=lambda: GenerateConfig(num_cpus=0.0, num_gpus=0.0, retries=0))


OWN = ("experiments", "resamples", "piece_scenes", *EXPERIMENTS)
NOT_IN_STUDY = tuple(
    name for name in StudyConfig().dotted() if name.split(".")[0] not in (*OWN, *SECTIONS) or name in WITHOUT_MEANING
)
"""Keys of the caption job that do not apply to the study."""
