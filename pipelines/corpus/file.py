"""A file of the corpus, as planning sees it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CorpusFile:
    """A Parquet file (`row_groups`: rows of each) or an image file (`row_groups` empty)."""

    source: str  # relative to the input, with forward slashes
    size: int  # bytes
    row_groups: tuple[int, ...] = ()

    @property
    def num_rows(self) -> int:
        return sum(self.row_groups) if self.row_groups else 1
