"""All corpus formats. `input.format=auto` takes the first one that recognises a file."""

from pipelines.corpus.images import FORMAT as IMAGES
from pipelines.corpus.parquet import FORMAT as PARQUET

FORMATS = (PARQUET, IMAGES)
