"""How a run ended: exit code, why, and the numbers; the files that say so."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pipelines.output.totals import Totals
from pipelines.run.job import Job
from pipelines.tracker import Tracker

RECORD, SAMPLES = "run.json", "samples.json"
DONE, FAILED, GATED, CAPPED, INTERRUPTED = 0, 1, 3, 4, 130  # exit codes
PLACES = {"embedded": "embedded Ray", "joined before": "this process's Ray", "none": "this process"}


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where the stages of a run ran. `str` says it to people."""

    address: str  # of the cluster; else a key of PLACES
    cpus: float
    gpus: float
    dashboard: str = ""  # its URL

    def __str__(self) -> str:
        place = PLACES.get(self.address) or f"Ray cluster {self.address}"
        dashboard = f", dashboard {self.dashboard}" if self.dashboard else ""
        return f"{place}: {self.cpus:g} CPUs, {self.gpus:g} GPUs{dashboard}"

    def to_dict(self) -> dict[str, Any]:
        """As it stands in run.json."""
        return asdict(self)

    @property
    def machines(self) -> str:
        """Without the dashboard, whose address changes: runs on the same machines say the same."""
        return str(replace(self, dashboard=""))


def read_cluster(stored: Any) -> Cluster | None:
    """What run.json holds under `cluster`; None for a run that joined none, and for a line of text."""
    return Cluster(**stored) if isinstance(stored, dict) else None


@dataclass(frozen=True, slots=True)
class Compared:
    """One prompt of a sampled image under both settings; `jpeg` is a base64 thumbnail, `kept` the tokens in raster
    order of which there are `num_tokens`, `agreement` ROUGE-L of the two captions."""

    source: str
    row: int
    prompt: str
    pruned: str
    unpruned: str
    references: list[str]
    jpeg: str
    kept: list[int]
    num_tokens: int
    agreement: float


@dataclass(frozen=True, slots=True)
class Gate:
    """What the gate found. `compared` is there for the report, worst agreement first; not after a resume."""

    passed: bool
    min_quality: float
    quality: float
    interval: tuple[float, float]  # 95 %
    metric: str  # cider, of references; rouge_l, of the unpruned captions
    pruned_score: float  # CIDEr on the raw scale, or ROUGE-L
    unpruned_score: float
    images: int
    drawn: int  # images of the sample; those that did not come through twice are not in `images`
    seconds: float
    compared: list[Compared] = field(default_factory=list)

    def metrics(self) -> dict[str, float]:
        """Under their MLflow names, `gate/...`."""
        names = ("min_quality", "quality", "pruned_score", "unpruned_score", "images", "seconds")
        numbers = {f"gate/{name}": float(getattr(self, name)) for name in names}
        return numbers | {"gate/quality_low": self.interval[0], "gate/quality_high": self.interval[1]}

    def __str__(self) -> str:
        low, high = self.interval
        of = "CIDEr with the corpus's references" if self.metric == "cider" else "ROUGE-L with the unpruned captions"
        return (
            f"quality {self.quality:.4f} of unpruned ({low:.4f} to {high:.4f}; {of}, {self.pruned_score:.4f} against "
            f"{self.unpruned_score:.4f}, {self.images} of {self.drawn} sampled images) "
            f"{'reaches' if self.passed else 'does not reach'} gate.min_quality={self.min_quality:g} at the lower end"
        )


@dataclass(slots=True)
class Outcome:
    """How a run ended: exit code, why, and the numbers."""

    code: int = DONE
    message: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    tracked: str = ""
    cluster: Cluster | None = None  # None: the run joined none
    gate: Gate | None = None  # with the captions that were compared


Conclude = Callable[[Job, Outcome, Totals, Tracker], dict[str, Any]]
"""(job, outcome, totals of the output, tracker) -> more for run.json. Writes what only this kind of job has."""
