"""The column types that a benchmark's Parquet must have, and checks with messages for wrong files."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.types as pt


@dataclass(frozen=True, slots=True)
class Column:
    """The accepted types of one column. Offset widths, integer widths and dictionary encoding do not matter."""

    types: tuple[pa.DataType, ...]
    nullable: bool = False

    def __str__(self) -> str:
        return " or ".join(map(str, self.types))


_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # the Image feature of Hugging Face datasets
TEXT = Column((pa.string(),))
MAYBE_TEXT = Column((pa.string(),), nullable=True)
TEXTS = Column((pa.list_(pa.string()),))
NUMBER = Column((pa.int64(),))
NUMBER_OR_TEXT = Column((pa.int64(), pa.string()))
IMAGE = Column((_IMAGE,))
MAYBE_IMAGE = Column((_IMAGE,), nullable=True)
IMAGES = Column((pa.list_(_IMAGE),))


def check_schema(benchmark: str, columns: Mapping[str, Column], schema: pa.Schema) -> None:
    """Raises ValueError if columns are missing or of another type. The message names each with both types."""
    problems = []
    for name, column in columns.items():
        if name not in schema.names:
            problems.append(
                f"column {name!r} must be there as {column}, got only {', '.join(schema.names) or 'nothing'}"
            )
        elif not any(_fits(schema.field(name).type, wanted) for wanted in column.types):
            problems.append(f"column {name!r} must be {column}, got {schema.field(name).type}")
    if problems:
        raise ValueError(f"benchmark {benchmark!r}: {'; '.join(problems)}")


def check_nulls(columns: Mapping[str, Column], source: Mapping[str, Any]) -> None:
    """Raises ValueError if a column that is not nullable is null in this row."""
    for name, column in columns.items():
        if source[name] is None and not column.nullable:
            raise ValueError(f"column {name!r} must hold {column}, got null")


def image_bytes(image: Mapping[str, Any] | None, column: str = "image") -> bytes:
    """The encoded bytes of one Image value.

    Raises:
        ValueError: if the value is null, or holds only a path to the image.
    """
    if image is None:
        raise ValueError(f"column {column!r} must hold an image, got null")
    if not image["bytes"]:
        raise ValueError(f"column {column!r} must hold the image's bytes, got none, with the path {image['path']!r}")
    return image["bytes"]


def _fits(found: pa.DataType, wanted: pa.DataType) -> bool:
    if pt.is_dictionary(found):
        found = found.value_type
    if pt.is_string(wanted):
        return pt.is_string(found) or pt.is_large_string(found) or pt.is_string_view(found)
    if pt.is_binary(wanted):
        return pt.is_binary(found) or pt.is_large_binary(found) or pt.is_binary_view(found)
    if pt.is_integer(wanted):
        return pt.is_integer(found)
    if pt.is_list(wanted):
        is_list = pt.is_list(found) or pt.is_large_list(found) or pt.is_fixed_size_list(found)
        return is_list and _fits(found.value_type, wanted.value_type)
    if pt.is_struct(wanted):
        fields = {field.name: field.type for field in found} if pt.is_struct(found) else {}
        return all(field.name in fields and _fits(fields[field.name], field.type) for field in wanted)
    return found == wanted
