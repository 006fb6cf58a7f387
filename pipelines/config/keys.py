"""The keys of the caption job: one frozen dataclass per section, each key with its type, default and meaning.

`--help` prints the meanings, so each meaning tells a user what the key does in one or two sentences. Precedence: these
defaults < the YAML file of --config < `dotted.key=value` arguments. A job with further keys subclasses `Config` in a
config.py beside its code.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from pipelines.config.schema import Sections, key

NO_RAY = "none"  # value of ray.address for a run in this process


@dataclass(frozen=True, kw_only=True, slots=True)
class InputConfig:
    """the corpus to caption"""

    path: str = key(
        "corpus: a file, a glob, or a folder of Parquet files, tar shards, image files ...; a local path, or an "
        "address with s3://, gs://, az://, hf://, https:// or another scheme of fsspec",
        "",
    )
    format: str = key(
        "file format of the corpus: auto | parquet | images | tar (WebDataset shards) | imagefolder (pictures with "
        "metadata.csv, .jsonl or .parquet) | arrow | jsonl | csv. auto detects it from the files' names",
        "auto",
    )
    image_column: str = key("column of the images: bytes, {bytes, path} structs or URIs. auto finds it", "auto")
    id_column: str = key(
        "column with the id of each row. auto looks for id, key, image_id ...; none makes ids of the form file#row",
        "auto",
    )
    reference_column: str = key("column with reference captions, shown in the report: auto | none | a name", "auto")
    cache: str | None = key(
        "folder, local or s3:// and the like, that keeps where the rows of tar shards, JSONL and CSV files begin, so "
        "that a second plan reads none of them; null: no cache",
        "~/.cache/otprune",
    )
    limit: int | None = key("caption only this many rows, from the start of the corpus", None, low=1)
    on_changed: Literal["refuse", "skip", "redo"] = key(
        "what a resume does with captioned files that are lost or changed since. refuse: stop with exit code 2. "
        "skip: keep their captions, and leave out what changed. redo: remove the captions of what changed and caption "
        "it again; keep those of what is lost",
        "refuse",
    )
    endpoint_url: str | None = key("S3 endpoint of the input, if it is not AWS: e.g. the URL of a MinIO server")
    anonymous: bool = key("read S3 without credentials", False)
    fetch_threads: int = key(
        "parallel downloads in each process that reads: images named by address, and image files",
        16,
        low=1,
        high=256,
    )
    fetch_per_host: int = key("parallel downloads from one host of the web, in each process that reads", 8, low=1)
    fetch_timeout: float = key(
        "seconds after which one image is given up: headers, redirects, retries and waits included", 30.0, above=0
    )
    fetch_retries: int = key(
        "further tries of a download after a passing fault: 429, 5xx, a reset, a time-out, a cut file", 4, low=0
    )
    allow_private: bool = key("let addresses in the corpus lead into loopback, link-local and private networks", False)
    allow_paths: list[str] = key(
        "where addresses and links in the corpus may lead besides the web and the corpus's own folder or bucket: local "
        "folders, or prefixes such as s3://bucket/folder",
        [],
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputConfig:
    """where captions and quarantined rows go"""

    path: str = key("folder for the captions, the quarantine and the report; local, s3://, gs://, az:// or hf://", "")
    endpoint_url: str | None = key("S3 endpoint of the output, if it is not AWS")
    on_mismatch: Literal["refuse", "new"] = key(
        "what to do if output.path holds captions of another configuration. refuse: stop with exit code 2. new: write "
        "to a new folder beside it",
        "refuse",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """the checkpoint that captions"""

    path: str = key(
        "checkpoint in Hugging Face format of a family that README.md lists: a folder or a hub repository", ""
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key(
        "number format of weights and activations. auto: bfloat16 on a GPU, float32 on a CPU", "auto"
    )
    max_pixels: int | None = key(
        "models of free picture size: shrink larger images to this many pixels; null: 1280 visual tokens' worth",
        None,
        low=1,
    )
    min_pixels: int | None = key(
        "models of free picture size: enlarge smaller images to this many pixels; null: the checkpoint's own",
        None,
        low=1,
    )
    max_tiles: int | None = key(
        "InternVL, SmolVLM: cut an image into at most this many tiles, its overview not counted; null: the "
        "checkpoint's own, 12 and 16",
        None,
        low=1,
    )
    original_tiles: bool = key(
        "LLaVA-1.6: cut an image with no side above 336 pixels into an upper and a lower tile, as LLaVA's own code "
        "does, instead of a left and a right one, as transformers and vLLM do",
        False,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptConfig:
    """what is asked of every image"""

    template: str = key(
        "prompt for every image; {column} inserts that column of the row",
        "Provide a one-sentence caption for the provided image.",
    )
    more: list[str] = key(
        "further prompts for every image. Each gives a caption row of its own; the image is encoded only once", []
    )
    system: str = key("system message in front of the prompt; empty: the chat format's own, if it has one", "")
    conversation: Literal["auto", "vicuna_v1", "plain"] = key(
        "chat format around the prompt. auto: the checkpoint's own chat template if it has one, else vicuna_v1", "auto"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneConfig:
    """which visual tokens the language model sees"""

    method: str = key(
        "method that selects, merges or drops visual tokens: otprune, divprune, fastv, ...; none keeps all of them",
        "otprune",
    )
    retention: float | None = key(
        "share of the visual tokens to keep; null: the family's default, 0.098 for LLaVA (README.md lists them)",
        None,
        above=0,
        high=1,
    )
    shrink: float | None = key(
        "send pictures with about this share of their visual tokens, and prune those: the vision tower has less to do, "
        "too. prune.retention stays a share of the whole picture's tokens. For models of free picture size, InternVL "
        "and SmolVLM2, and methods that do not keep every token; null: whole pictures",
        None,
        above=0,
        high=1,
    )
    merge: float | None = key(
        "weight in (0, 1] of the tokens that are not kept: each is averaged into the kept one that is most like it; "
        "null: they are dropped",
        None,
        above=0,
        high=1,
    )
    gamma: float | None = key(
        "weight of the kernel in the log-determinant; null: the method's own default", None, above=0
    )
    gamma_scale: Literal["released", "paper", "trace"] = key(
        "convention of gamma. released: as in the authors' code; paper: as in the paper; trace: relative to the mean "
        "diagonal of the kernel",
        "released",
    )
    seed: int = key("seed of the method random, combined with each image's hash", 0, low=0)
    per_tile: bool = key(
        "models that see tiles: select tokens within each tile, instead of among all tokens of the image", False
    )
    settings: dict[str, Any] = key(
        "settings that only this method has, e.g. prune.settings.layer=2. README.md lists them", {}
    )

    @property
    def share(self) -> float:
        """`retention` of a configuration that has been resolved for its model (`run.job.check_model`)."""
        assert self.retention is not None, "the configuration has not been resolved for its model"
        return self.retention

    @property
    def share_of_sent(self) -> float:
        """The share of the visual tokens to keep of the pictures that are sent, which `shrink` makes smaller."""
        return self.share if self.shrink is None else min(1.0, self.share / self.shrink)


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeConfig:
    """how image bytes become pixels, and which images are quarantined unread"""

    aspect: Literal["auto", "pad", "crop", "stretch"] = key(
        "how an image becomes the square of a model with one picture size. pad: add bars in the mean colour, as "
        "LLaVA-1.5 does; crop: cut out the centre, as CLIP does; stretch: scale each side by itself, as SigLIP does; "
        "auto: as the checkpoint's processor says",
        "auto",
    )
    max_bytes: int = key("quarantine images whose encoded file is larger than this", 64 * 2**20, low=1)
    max_pixels: int = key(
        "quarantine images whose header announces more pixels than this; photographs (JPEG) that are decoded at a "
        "reduced size may have four times as many",
        100_000_000,
        low=1,
    )
    min_side: int = key("quarantine images with a side shorter than this, in pixels", 2, low=1)
    color_profiles: bool = key("show the colours of an embedded colour profile, as browsers do, instead of sRGB", True)
    more_formats: list[Literal["avif", "jpeg2000"]] = key(
        "decode these formats as well, whose decoders are large: avif, jpeg2000. Without it they are quarantined", []
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitConfig:
    """the images that are read, committed and retried together, as one work unit"""

    images: int = key(
        "images in one work unit. A unit is committed as a whole, and retried as a whole if its process dies",
        128,
        low=1,
        high=4096,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeConfig:
    """the actors that run the vision tower and select visual tokens"""

    actors: int = key("number of actors that encode images and select tokens", 1, low=1)
    max_actors: int | None = key(
        "Ray may grow the pool up to this many actors; null: the pool keeps its size", None, low=1
    )
    batch_size: int = key("images in one forward pass of the vision tower", 32, low=1)
    num_gpus: float | None = key("GPUs for each actor; null: 0.3 if the cluster has GPUs, else 0", None, low=0)
    num_cpus: float = key("CPUs for each actor", 1.0, low=0)
    accelerator: str | None = key("run only on nodes with this accelerator, in Ray's spelling: A100, L4, H100 ...")


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig:
    """the actors that run the language model"""

    max_new_tokens: int = key("longest caption, in tokens", 64, low=1)
    temperature: float = key("sampling temperature; 0 decodes greedily", 0.0, low=0)
    top_p: float = key(
        "probability mass that nucleus sampling draws from, at a temperature above 0", 1.0, above=0, high=1
    )
    seed: int = key("seed of sampling, combined with each image's hash", 0, low=0)
    retries: int = key(
        "further attempts at a caption that ends in a loop, each at a higher temperature; 0 keeps it as it is",
        3,
        low=0,
        high=10,
    )
    retry_cut: bool = key(
        "try captions again that max_new_tokens cuts as well. Mostly a larger max_new_tokens is what they need", False
    )
    batch_size: int = key("prompts decoded together by the transformers engine", 32, low=1)
    actors: int = key("number of actors that decode captions", 1, low=1)
    max_actors: int | None = key(
        "Ray may grow the pool up to this many actors; null: the pool keeps its size", None, low=1
    )
    num_gpus: float | None = key("GPUs for each actor; null: 0.7 if the cluster has GPUs, else 0", None, low=0)
    num_cpus: float = key("CPUs for each actor", 1.0, low=0)
    accelerator: str | None = key("run only on nodes with this accelerator, in Ray's spelling: A100, L4, H100 ...")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """the library that decodes captions in the generate actors"""

    name: str = key("engine that decodes: transformers | vllm. The extra .[vllm] installs vLLM", "transformers")
    kwargs: dict[str, Any] = key("vllm: arguments of its engine, e.g. engine.kwargs.tensor_parallel_size=2", {})
    sampling: dict[str, Any] = key(
        "vllm: further sampling parameters, e.g. engine.sampling.structured_outputs.regex='[a-z ]+'", {}
    )
    units_in_flight: int | None = key(
        "vllm: work units that an actor decodes at the same time; null: enough to fill max_num_seqs", None, low=1
    )
    timeout_seconds: float = key(
        "vllm: restart an engine that has finished no request for this many seconds", 600.0, above=0
    )
    max_restarts: int = key(
        "vllm: restarts in a row, with no unit finished in between, after which the job fails",
        6,
        low=0,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultsConfig:
    """which failures a run survives, and when it gives up"""

    patience_seconds: float = key(
        "wait this long for an input of which nothing answers (network, store, credentials), or an output that refuses "
        "or is full, then stop with exit code 1; 0: do not wait, and quarantine the images that cannot be fetched",
        600.0,
        low=0,
    )
    redo: list[str] = key(
        "try quarantined rows of these reasons again, also of an output that is complete, e.g. [unavailable]: what a "
        "passing fault kept from being fetched",
        [],
    )

    retries: int = key("retries of a unit whose process died", 2, low=0)
    max_isolated: int = key(
        "stop with exit code 1 if more units than this fail as a whole: then the fault is not in the images",
        100,
        low=0,
    )
    max_rejected: float = key(
        "stop with exit code 1 if more than this share of the images is quarantined, judged from 256 images on: then "
        "the fault is in the corpus or its keys; 1: never",
        0.5,
        low=0,
        high=1,
    )
    no_progress_seconds: int = key(
        "fail the run if no stage makes progress for this many seconds, instead of hanging", 1800, low=1
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class CostConfig:
    """what the cluster costs"""

    usd_per_hour: float | None = key(
        "price of the whole cluster in USD per hour; null: add up its nodes by cost.prices", None, low=0
    )
    prices: list[str] = key(
        "price files: YAML or SkyPilot catalogs (CSV). The first file that lists an instance sets its price",
        ["conf/prices.yaml"],
    )
    region: str | None = key("region of nodes that have no ray.io/availability-region label; prices depend on it")
    spot: bool = key("price nodes that have no ray.io/market-type label as spot instances", False)


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetConfig:
    """the spend cap of the output"""

    max_usd: float | None = key(
        "stop when all runs of this output together have cost this many USD (exit code 4); a higher cap resumes",
        None,
        above=0,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimateConfig:
    """the sample that run.estimate=true captions"""

    images: int = key("images in the sample, drawn from the whole corpus", 1024, low=1)
    instances: list[str] = key(
        "instances of cost.prices to estimate as well: NAME, or NAME:SPEED with its images/s relative to this cluster",
        [],
    )
    seed: int = key("seed of the sample", 0, low=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class GateConfig:
    """a check of caption quality on a sample, before the run begins"""

    min_quality: float | None = key(
        "least quality relative to the unpruned model, e.g. 0.95. Exit code 3 if the 95 % interval measured on a "
        "sample begins below it; null: no check",
        None,
        above=0,
    )
    metric: Literal["auto", "cider", "rouge_l", "objects", "judge"] = key(
        "what quality is. cider: against references; rouge_l: agreement with unpruned captions; objects: F1 of the "
        "objects named (quality.objects); judge: pairs won (quality.judge). auto: cider or else rouge_l for captions "
        "of up to 30 words, objects or else judge for longer ones",
        "auto",
    )
    images: int = key("images in the sample; each is captioned with and without pruning", 256, low=16)
    seed: int = key("seed of the sample", 0, low=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class QualitySection:
    """what captions are held against by jobs/quality.py, the gate and the sweep"""

    objects: Literal["auto", "none", "coco", "shapes"] = key(
        "objects to look for in captions. coco: COCO's 80; shapes: those of the demo world; auto: coco with "
        "quality.instances, shapes where the corpus has a column `scene`",
        "auto",
    )
    instances: str | None = key(
        "COCO's instances_*.json: the objects of the images whose number is in the id of their row"
    )
    judge: dict[str, Any] = key(
        "a model that says which of two captions is better, behind an OpenAI-compatible endpoint: quality.judge.url, "
        ".model; .pairs=100, .seconds=600, .usd_per_million_input ...; the key is in JUDGE_API_KEY (.key_variable)",
        {},
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class MlflowConfig:
    """tracking of the run in MLflow"""

    enabled: bool = key("track the run in MLflow", True)
    tracking_uri: str | None = key(
        "MLflow tracking server; null: the environment's MLFLOW_TRACKING_URI, else a SQLite store beside the output"
    )
    experiment: str = key("name of the MLflow experiment", "captions")
    run_name: str | None = key("name of the MLflow run; null: method, retention and fingerprint")


@dataclass(frozen=True, kw_only=True, slots=True)
class RayConfig:
    """the Ray cluster to join, or the embedded Ray that the job starts"""

    address: str | None = key(
        "cluster to join. null: the cluster that the job was submitted to, else an embedded Ray. none: no Ray; all "
        "stages run in this process, where breakpoints work but a crash ends the job"
    )
    num_cpus: int | None = key(
        "logical CPUs of the embedded Ray; null: those of the machine, or more if the pools need more", None, low=1
    )
    object_store_mb: int | None = key("object store of the embedded Ray, in MiB; null: Ray's default", None, low=80)
    dashboard: bool = key("start the dashboard of the embedded Ray", False)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """what the run reports, and how often"""

    estimate: bool = key(
        "caption a sample, write nothing, and print the dollars, hours and bytes of the whole run", False
    )
    progress_seconds: float = key("seconds between progress lines, and between metric points in MLflow", 5.0, above=0)
    heartbeat_seconds: float = key("seconds between updates of heartbeat.json in the output folder", 5.0, above=0)
    samples: int = key("number of captioned images shown in the report and in MLflow", 24, low=0, high=512)


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
    quality: QualitySection = field(default_factory=QualitySection)
    mlflow: MlflowConfig = field(default_factory=MlflowConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    run: RunConfig = field(default_factory=RunConfig)
