"""The outcome of a run: exit code, message and metrics, with the cluster and the gate as run.json stores them."""

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
    """The place where the stages of a run ran. `str` gives a line for people."""

    address: str  # of a cluster, or a key of PLACES
    cpus: float
    gpus: float
    dashboard: str = ""  # its URL

    def __str__(self) -> str:
        place = PLACES.get(self.address) or f"Ray cluster {self.address}"
        dashboard = f", dashboard {self.dashboard}" if self.dashboard else ""
        return f"{place}: {self.cpus:g} CPUs, {self.gpus:g} GPUs{dashboard}"

    def to_dict(self) -> dict[str, Any]:
        """The form that run.json stores."""
        return asdict(self)

    @property
    def machines(self) -> str:
        """A line for people without the address of the dashboard, which differs between runs on the same machines."""
        return str(replace(self, dashboard=""))


def read_cluster(stored: Any) -> Cluster | None:
    """The cluster under `cluster` in run.json; None if the run joined no cluster, or the value is a line of text."""
    return Cluster(**stored) if isinstance(stored, dict) else None


@dataclass(frozen=True, slots=True)
class Compared:
    """One prompt of a sampled image, captioned with and without pruning."""

    source: str
    row: int
    prompt: str
    pruned: str  # caption with pruning
    unpruned: str  # caption without
    references: list[str]
    picture: dict[str, Any]  # the fields of its `Sample`, with pruning
    agreement: float  # ROUGE-L of the two captions


METRICS = {  # of the gate
    "cider": "CIDEr with the corpus's references",
    "rouge_l": "ROUGE-L with the unpruned captions",
    "objects": "F1 of the objects named",
    "judge": "pairs that a judge gives to each",
}


@dataclass(frozen=True, slots=True)
class Gate:
    """The verdict of the gate. `compared` serves the report, worst agreement first; it is empty after a resume."""

    passed: bool
    min_quality: float
    quality: float
    interval: tuple[float, float]  # 95 %
    metric: str  # a key of METRICS
    pruned_score: float  # on the metric's own scale
    unpruned_score: float
    images: int  # captioned both with and without pruning
    drawn: int  # images of the sample
    seconds: float
    compared: list[Compared] = field(default_factory=list)
    note: str = ""  # why the metric is second best
    judged: dict[str, float] = field(default_factory=dict)  # what a judge said and cost, under MLflow names

    @property
    def by(self) -> str:
        """The metric in words, with the reason if it is second best."""
        return METRICS[self.metric] + (f" ({self.note})" if self.note else "")

    def metrics(self) -> dict[str, float]:
        """The numbers of the gate under their MLflow names, `gate/...`."""
        names = ("min_quality", "quality", "pruned_score", "unpruned_score", "images", "seconds")
        numbers = {f"gate/{name}": float(getattr(self, name)) for name in names}
        ends = {"gate/quality_low": self.interval[0], "gate/quality_high": self.interval[1]}
        return numbers | ends | {f"gate/{name}": value for name, value in self.judged.items()}

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"quality {self.quality:.4f} of unpruned ({low:.4f} to {high:.4f}; {self.by}, "
            f"{self.pruned_score:.4f} against {self.unpruned_score:.4f}, {self.images} of {self.drawn} sampled images) "
            f"{'reaches' if self.passed else 'does not reach'} gate.min_quality={self.min_quality:g} at the lower end"
        )


@dataclass(slots=True)
class Outcome:
    """The result of a run."""

    code: int = DONE
    message: str = ""  # why the run ended early; empty if it is done
    metrics: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    tracked: str = ""  # where MLflow has the run
    cluster: Cluster | None = None  # None: the run joined no cluster
    gate: Gate | None = None  # None: the gate was not asked for


Conclude = Callable[[Job, Outcome, Totals, Tracker], dict[str, Any]]
"""(job, outcome, totals of the output, tracker) -> further keys of run.json. Writes the files of this kind of job."""
