"""All corpus formats. `input.format=auto` chooses among them (choose.py)."""

from pipelines.corpus.arrow import FORMAT as ARROW
from pipelines.corpus.imagefolder import FORMAT as IMAGEFOLDER
from pipelines.corpus.images import FORMAT as IMAGES
from pipelines.corpus.lines import CSV, JSONL
from pipelines.corpus.parquet import FORMAT as PARQUET
from pipelines.corpus.tar import FORMAT as TAR

FORMATS = (PARQUET, IMAGES, TAR, IMAGEFOLDER, ARROW, JSONL, CSV)
