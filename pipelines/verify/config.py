"""The keys of jobs/verify.py in addition to those of the caption job."""

from dataclasses import dataclass

from pipelines.config.keys import Config
from pipelines.config.schema import key


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyConfig(Config):
    repair: bool = key(
        "remove the parts that are damaged or that hold rows of another part again; the job that wrote the output, run "
        "again, makes them anew. Nothing else is removed",
        False,
    )
    images: int = key(
        "images of the corpus that are read again, drawn over all parts: their sha256 must be that of their captions",
        0,
        low=0,
    )
