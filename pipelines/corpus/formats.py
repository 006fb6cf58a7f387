"""All formats of a corpus. `input.format=auto` takes the first that recognises a file."""

from pipelines.corpus.images import FORMAT as IMAGES
from pipelines.corpus.parquet import FORMAT as PARQUET

FORMATS = (PARQUET, IMAGES)
