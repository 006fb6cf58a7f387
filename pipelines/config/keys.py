"""The caption job's configuration: one frozen dataclass per section, every key with its type, default and meaning.

Precedence: these defaults < the YAML file given by --config < `dotted.key=value` arguments. Jobs with keys of their own
have a config.py beside their code, with a subclass of `Config`.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from pipelines.config.schema import Sections, key


@dataclass(frozen=True, kw_only=True, slots=True)
class InputConfig:
    """the corpus to caption"""

    path: str = key("corpus: Parquet file, glob, folder of Parquet or of image files; local or s3://", "")
    format: str = key("how the corpus lies in its files: auto | parquet | images; auto takes what it finds", "auto")
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
    """where captions and quarantined rows go"""

    path: str = key("folder of captions and quarantine; local or s3://", "")
    endpoint_url: str | None = key("S3 endpoint of the output")
    on_mismatch: Literal["refuse", "new"] = key(
        "if the output holds captions of another configuration: refuse, or write to a new sibling folder", "refuse"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """the checkpoint that captions"""

    path: str = key("LLaVA-1.5 or 1.6 checkpoint in Hugging Face format: a folder or a hub repository", "")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key("auto: bfloat16 on a GPU, float32 on a CPU", "auto")


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptConfig:
    """what is asked of every image"""

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
    """which visual tokens the language model sees"""

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
    """how image bytes become pixels, and which images are quarantined unread"""

    aspect: Literal["pad", "crop"] = key(
        "pad: to a square with the mean colour, LLaVA-1.5's; crop: CLIP's centre crop; LLaVA-1.6 cuts tiles instead",
        "pad",
    )
    max_bytes: int = key("larger encoded images are quarantined", 64 * 2**20, low=1)
    max_pixels: int = key("images of more pixels are quarantined, judged by their header", 100_000_000, low=1)
    min_side: int = key("images with a shorter side, in pixels, are quarantined", 2, low=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitConfig:
    """the images that are read, committed and retried together: a work unit"""

    images: int = key("images of one work unit, the grain of commit and of retry", 128, low=1, high=4096)


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeConfig:
    """the actors that run the vision tower and choose tokens"""

    actors: int = key("actors that encode and select", 1, low=1)
    max_actors: int | None = key("let Ray scale the pool up to so many", None, low=1)
    batch_size: int = key("images of one forward pass of the vision tower", 32, low=1)
    num_gpus: float | None = key("GPUs an actor; null: 0.3 where the cluster has GPUs, else 0", None, low=0)
    num_cpus: float = key("CPUs an actor", 1.0, low=0)
    accelerator: str | None = key("only nodes with this accelerator, as Ray names it: A100, L4, H100 ...")


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig:
    """the actors that run the language model"""

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
    """the library that decodes in the actors of generate"""

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
    """what a run survives, and when it gives up"""

    retries: int = key("further tries for a unit whose process died", 2, low=0)
    max_isolated: int = key(
        "more work units than this that fail as a whole mean that the images are not to blame: stop with exit code 1",
        100,
        low=0,
    )
    no_progress_seconds: int = key("a run in which nothing moves for so long fails instead of hanging", 1800, low=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class CostConfig:
    """what the cluster costs"""

    usd_per_hour: float | None = key("price of the whole cluster; null prices its nodes by cost.prices", None, low=0)
    prices: list[str] = key(
        "price files, YAML or SkyPilot catalogs (CSV); the first that knows an instance wins", ["conf/prices.yaml"]
    )
    region: str | None = key("region of nodes without a ray.io/availability-region label, where prices differ")
    spot: bool = key("nodes without a ray.io/market-type label are spot instances", False)


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetConfig:
    """what the output may cost"""

    max_usd: float | None = key(
        "stop cleanly, resumable, when all runs of this output have cost so much (exit code 4)", None, above=0
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimateConfig:
    """the sample that run.estimate=true captions"""

    images: int = key("images that run.estimate captions, drawn over the whole corpus", 1024, low=1)
    instances: list[str] = key(
        "instances of cost.prices to estimate for: NAME, or NAME:SPEED with its images/s relative to this cluster's", []
    )
    seed: int = key("seed of the sample", 0, low=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class GateConfig:
    """a check of quality on a sample before the run begins"""

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
    """how the run is tracked"""

    enabled: bool = key("track the run", True)
    tracking_uri: str | None = key("tracking server; null is a sqlite store beside the output")
    experiment: str = key("experiment name", "captions")
    run_name: str | None = key("run name; null is method, retention and fingerprint")


@dataclass(frozen=True, kw_only=True, slots=True)
class RayConfig:
    """the cluster to join, or the Ray that the job starts by itself"""

    address: str | None = key(
        "cluster to join; null is the submitted job's own, else an embedded one; none runs the stages in this process, "
        "where breakpoints work and nothing is isolated"
    )
    num_cpus: int | None = key(
        "logical CPUs of the embedded Ray; null is what the machine and the pools need", None, low=1
    )
    object_store_mb: int | None = key("object store of the embedded Ray in MiB; null is Ray's default", None, low=80)
    dashboard: bool = key("start the dashboard of the embedded Ray", False)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """how the run reports"""

    estimate: bool = key("caption a sample, write nothing, and say what the run would cost and take", False)
    progress_seconds: float = key("seconds between progress lines and metric points", 5.0, above=0)
    heartbeat_seconds: float = key("seconds between writes of heartbeat.json beside the output", 5.0, above=0)
    samples: int = key("captioned images shown in the report and in MLflow", 24, low=0, high=512)


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(Sections):
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
