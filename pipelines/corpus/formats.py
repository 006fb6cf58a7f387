"""All corpus formats. `input.format=auto` chooses among them (choose.py)."""

from pipelines.corpus.images import FORMAT as IMAGES
from pipelines.corpus.parquet import FORMAT as PARQUET
from pipelines.corpus.tar import FORMAT as TAR

FORMATS = (PARQUET, IMAGES, TAR)
