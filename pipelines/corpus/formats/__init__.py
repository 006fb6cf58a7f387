"""All corpus formats. `input.format=auto` chooses among them (choose.py)."""

from pipelines.corpus.formats.arrow import FORMAT as ARROW
from pipelines.corpus.formats.imagefolder import FORMAT as IMAGEFOLDER
from pipelines.corpus.formats.images import FORMAT as IMAGES
from pipelines.corpus.formats.lines import CSV, JSONL
from pipelines.corpus.formats.parquet import FORMAT as PARQUET
from pipelines.corpus.formats.tar import FORMAT as TAR

FORMATS = (PARQUET, IMAGES, TAR, IMAGEFOLDER, ARROW, JSONL, CSV)
