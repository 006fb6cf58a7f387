"""The whole configuration: one frozen dataclass per section, every key with its type, default and meaning.

Precedence: these defaults < the YAML file given by --config < `dotted.key=value` arguments.
"""

from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import Any, Literal


def key(meaning: str, default: Any = None, **bounds: Any) -> Any:
    """A configuration field: its one-line meaning, its default, and bounds (`low`, `high`, `above`, `choices`)."""
    metadata = {"meaning": meaning, **bounds}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True, slots=True)
class InputConfig:
    path: str = key("corpus: Parquet file, glob, folder of Parquet or of image files; local or s3://", "")
    image_column: str = key("column with image bytes, {bytes, path} structs or URIs; auto finds it", "auto")
    id_column: str = key(
        "column with the rows' own keys; auto finds id, key, image_id ...; none uses row addresses", "auto"
    )
    reference_column: str = key("column with reference captions, shown in the report; auto | none | its name", "auto")
    limit: int | None = key("caption only the first so many rows", None, low=1)
    endpoint_url: str | None = key("S3 endpoint of the input, e.g. of MinIO")
    anonymous: bool = key("read S3 without credentials", False)
    fetch_threads: int = key("parallel downloads of one read task when the column holds URIs", 16, low=1, high=256)
    fetch_timeout: float = key("seconds before the download of one URI is given up", 30.0, above=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputConfig:
    path: str = key("folder of captions and quarantine; local or s3://", "")
    endpoint_url: str | None = key("S3 endpoint of the output")
    on_mismatch: Literal["refuse", "new"] = key(
        "if the output holds captions of another configuration: refuse, or write to a new sibling folder", "refuse"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    path: str = key("LLaVA-1.5 or 1.6 checkpoint in Hugging Face format: a folder or a hub repository", "")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key("auto: bfloat16 on a GPU, float32 on a CPU", "auto")


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptConfig:
    template: str = key(
        "the user's text; {column} inserts a column of the row",
        "Provide a one-sentence caption for the provided image.",
    )
    more: list[str] = key("further templates asked of every image, one caption row each; the image is encoded once", [])
    conversation: Literal["auto", "vicuna_v1", "plain"] = key(
        "format around the text; auto is the checkpoint's own chat template, else vicuna_v1", "auto"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneConfig:
    method: str = key(
        "how tokens are chosen, merged or dropped: otprune, divprune, fastv, ...; none keeps all", "otprune"
    )
    retention: float = key("share of the visual tokens to keep", 0.098, above=0, high=1)
    gamma: float | None = key("scale inside the log-det; null is the method's own default", None, above=0)
    gamma_scale: Literal["released", "paper", "trace"] = key(
        "meaning of gamma: of the released code, of the paper, or relative to the kernel's mean diagonal", "released"
    )
    seed: int = key("seed of the random method; each image adds its own hash", 0, low=0)
    per_tile: bool = key("LLaVA-1.6: choose in each tile by itself, not among the whole image's tokens", False)
    settings: dict[str, Any] = key(
        "further settings of the method, e.g. prune.settings.layer=2; README.md lists them", {}
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeConfig:
    aspect: Literal["pad", "crop"] = key(
        "pad: to a square with the mean colour, LLaVA-1.5's; crop: CLIP's centre crop; LLaVA-1.6 cuts tiles instead",
        "pad",
    )
    max_bytes: int = key("larger encoded images are quarantined", 64 * 2**20, low=1)
    max_pixels: int = key("images of more pixels are quarantined, judged by their header", 100_000_000, low=1)
    min_side: int = key("images with a shorter side, in pixels, are quarantined", 2, low=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitConfig:
    images: int = key("images of one work unit, the grain of commit and of retry", 128, low=1, high=4096)


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeConfig:
    actors: int = key("actors that encode and select", 1, low=1)
    max_actors: int | None = key("let Ray scale the pool up to so many", None, low=1)
    batch_size: int = key("images of one forward pass of the vision tower", 32, low=1)
    num_gpus: float | None = key("GPUs an actor; null: 0.3 where the cluster has GPUs, else 0", None, low=0)
    num_cpus: float = key("CPUs an actor", 1.0, low=0)
    accelerator: str | None = key("only nodes with this accelerator, as Ray names it: A100, L4, H100 ...")


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig:
    max_new_tokens: int = key("longest answer in tokens", 64, low=1)
    temperature: float = key("0 decodes greedily", 0.0, low=0)
    top_p: float = key("nucleus of sampling at temperature > 0", 1.0, above=0, high=1)
    seed: int = key("seed of sampling; each image adds its own hash", 0, low=0)
    batch_size: int = key("prompts decoded together by the transformers engine", 32, low=1)
    actors: int = key("actors that decode", 1, low=1)
    max_actors: int | None = key("let Ray scale the pool up to so many", None, low=1)
    num_gpus: float | None = key("GPUs an actor; null: 0.7 where the cluster has GPUs, else 0", None, low=0)
    num_cpus: float = key("CPUs an actor", 1.0, low=0)
    accelerator: str | None = key("only nodes with this accelerator, as Ray names it: A100, L4, H100 ...")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    name: str = key(
        "what decodes the pruned prompts: transformers | vllm, which is installed by the extra .[vllm]", "transformers"
    )
    kwargs: dict[str, Any] = key("vllm: arguments of its engine, e.g. engine.kwargs.tensor_parallel_size=2", {})
    sampling: dict[str, Any] = key(
        "vllm: further sampling parameters, e.g. engine.sampling.structured_outputs.regex='[a-z ]+'", {}
    )
    units_in_flight: int | None = key(
        "vllm: work units an actor has at hand at once; null: enough to keep max_num_seqs busy", None, low=1
    )
    timeout_seconds: float = key(
        "vllm: an engine that finishes no request for so long is taken for dead", 600.0, above=0
    )
    max_restarts: int = key(
        "vllm: more engines than this that die one after the other, with no unit finished in between, fail the job",
        6,
        low=0,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultsConfig:
    retries: int = key("further tries for a unit whose process died", 2, low=0)
    max_isolated: int = key(
        "more work units than this that fail as a whole mean that the images are not to blame: stop with exit code 1",
        100,
        low=0,
    )
    no_progress_seconds: int = key("a run in which nothing moves for so long fails instead of hanging", 1800, low=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class CostConfig:
    usd_per_hour: float | None = key("price of the whole cluster; null prices its nodes by cost.prices", None, low=0)
    prices: list[str] = key(
        "price files, YAML or SkyPilot catalogs (CSV); the first that knows an instance wins", ["conf/prices.yaml"]
    )
    region: str | None = key("region of nodes without a ray.io/availability-region label, where prices differ")
    spot: bool = key("nodes without a ray.io/market-type label are spot instances", False)


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetConfig:
    max_usd: float | None = key(
        "stop cleanly, resumable, when all runs of this output have cost so much (exit code 4)", None, above=0
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimateConfig:
    images: int = key("images that run.estimate captions, drawn over the whole corpus", 1024, low=1)
    instances: list[str] = key(
        "instances of cost.prices to estimate for: NAME, or NAME:SPEED with its images/s relative to this cluster's", []
    )
    seed: int = key("seed of the sample", 0, low=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class GateConfig:
    min_quality: float | None = key(
        "quality relative to unpruned, on a sample, that the lower end of its 95 % interval must reach before the run "
        "begins (exit code 3 if not); null asks nothing",
        None,
        above=0,
    )
    images: int = key("images of the sample, captioned with and without pruning", 256, low=16)
    seed: int = key("seed of the sample", 0, low=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class MlflowConfig:
    enabled: bool = key("track the run", True)
    tracking_uri: str | None = key("tracking server; null is a sqlite store beside the output")
    experiment: str = key("experiment name", "captions")
    run_name: str | None = key("run name; null is method, retention and fingerprint")


@dataclass(frozen=True, kw_only=True, slots=True)
class RayConfig:
    address: str | None = key("cluster to join; null is the submitted job's own, else an embedded one")
    num_cpus: int | None = key(
        "logical CPUs of the embedded Ray; null is what the machine and the pools need", None, low=1
    )
    object_store_mb: int | None = key("object store of the embedded Ray in MiB; null is Ray's default", None, low=80)
    dashboard: bool = key("start the dashboard of the embedded Ray", False)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    estimate: bool = key("caption a sample, write nothing, and say what the run would cost and take", False)
    progress_seconds: float = key("seconds between progress lines and metric points", 5.0, above=0)
    heartbeat_seconds: float = key("seconds between writes of heartbeat.json beside the output", 5.0, above=0)
    samples: int = key("captioned images shown in the report and in MLflow", 24, low=0, high=512)


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    input: InputConfig = field(default_factory=InputConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    unit: UnitConfig = field(default_factory=UnitConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    cost: CostConfig = field(default_factory=CostConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    estimate: EstimateConfig = field(default_factory=EstimateConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    mlflow: MlflowConfig = field(default_factory=MlflowConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def dotted(self) -> dict[str, Any]:
        """Every key by its dotted name, e.g. {"prune.retention": 0.098}."""
        return {name: value for name, _, value in self.walk()}

    def walk(self) -> Iterator[tuple[str, Field, Any]]:
        """Dotted name, field and value of every key; keys without a section come first."""
        parts = [(top, getattr(self, top.name)) for top in fields(self)]
        yield from ((top.name, top, value) for top, value in parts if not is_dataclass(value))
        for section, part in parts:
            if is_dataclass(part):
                yield from ((f"{section.name}.{k.name}", k, getattr(part, k.name)) for k in fields(part))


@dataclass(frozen=True, kw_only=True, slots=True)
class BaselineConfig:
    path: str | None = key("another output for the same questions or images, to compare with", None)
    endpoint_url: str | None = key("S3 endpoint of the baseline")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig(Config):
    """The evaluation's configuration: the caption job's, and what to ask."""

    benchmarks: Any = key("a benchmark, a list of them, all (the eleven of the papers) or demo", "demo")
    limit: int | None = key("at least so many questions of each benchmark, in whole scoring groups", None, low=1)
    resamples: int = key("bootstrap resamples behind each interval", 1000, low=1)
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    generate: GenerateConfig = field(default_factory=lambda: GenerateConfig(max_new_tokens=1024))
    mlflow: MlflowConfig = field(default_factory=lambda: MlflowConfig(experiment="benchmarks"))


@dataclass(frozen=True, kw_only=True, slots=True)
class GridConfig:
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
    retentions: list[float] = key("shares of the visual tokens that each method keeps", [0.5, 0.25, 0.098, 0.05])
    settings: dict[str, Any] = key(
        "of a method or variant: what prune.settings takes, gamma, gamma_scale, seed, per_tile: {fastv: {layer: 2}}", {}
    )
    calibration_images: int = key(
        "images that FitPrune's recipes are fitted to where grid.settings has none", 64, low=1
    )
    distance_images: int = key(
        "images whose kept tokens are held against all tokens: trace objective, Gaussian W2; 0 for none", 64, low=0
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class AccuracyConfig(EvaluateConfig):
    """The evaluation's configuration, and the methods and retentions to evaluate."""

    grid: GridConfig = field(default_factory=GridConfig)
    mlflow: MlflowConfig = field(default_factory=lambda: MlflowConfig(experiment="accuracy"))


@dataclass(frozen=True, kw_only=True, slots=True)
class CanaryConfig:
    images: int = key(
        "images captioned as they are, blank and swapped, to see that the model looks at them; 0 for none", 0, low=0
    )
    max_same: float = key(
        "larger shares of captions that stay the same without their image fail the gate", 0.1, low=0, high=1
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityConfig(Config):
    """The caption job's configuration, and what to hold its captions against."""

    sample: int = key("captions looked at; the same images of every output", 10_000, low=2)
    resamples: int = key("bootstrap resamples behind each interval", 1000, low=1)
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    canary: CanaryConfig = field(default_factory=CanaryConfig)
    mlflow: MlflowConfig = field(default_factory=lambda: MlflowConfig(experiment="quality"))


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationConfig:
    path: str = key("JSON file to write", "runs/calibration.json")
    samples: int = key("images to look at, the first of the corpus", 64, low=1)
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
    """The caption job's configuration, and how to calibrate."""

    calibrate: CalibrationConfig = field(default_factory=CalibrationConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepSection:
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


NOT_IN_EVALUATION = (
    "input.image_column",
    "input.id_column",
    "input.reference_column",
    "input.limit",
    "input.fetch_threads",
    "input.fetch_timeout",
    "prompt.template",
    "prompt.more",
    "run.estimate",
    "estimate.images",
    "estimate.instances",
    "estimate.seed",
    "gate.min_quality",
    "gate.images",
    "gate.seed",
)
"""Keys of the caption job that benchmarks decide for themselves."""
