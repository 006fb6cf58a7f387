"""Chooses the columns that the job reads from a corpus of rows. The key `auto` finds them by name and type."""

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from pipelines.errors import UserError

IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "content", "picture", "photo")
URI_NAMES = ("image_url", "image_uri", "url", "uri", "image_path", "file_path", "path", "file_name", "filename")
ID_NAMES = ("id", "key", "__key__", "image_id", "img_id", "uid", "uuid", "question_id")
REFERENCE_NAMES = ("references", "captions", "caption", "answer", "sentences")

Kind = Literal["struct", "binary", "uri"]
"""Type of the image column: a Hugging Face struct {bytes, path}, bytes (as img2dataset writes them), or a URI."""


@dataclass(frozen=True, slots=True)
class ColumnChoice:
    """The columns that the configuration asks for."""

    image: str  # a column's name, or auto
    id: str  # a column's name, auto, or none
    references: str  # a column's name, auto, or none
    templates: tuple[str, ...]  # prompt templates, which name further columns in braces


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns that the job reads from a corpus of rows."""

    image: str
    kind: Kind
    id: str | None
    references: str | None
    fields: tuple[str, ...]  # columns that the prompt templates name

    def to_read(self, with_references: bool) -> list[str]:
        """Names of the columns to read from a file, each once."""
        # Parquet stores the fields of a struct apart: `path` beside `bytes` is never read.
        image = f"{self.image}.bytes" if self.kind == "struct" else self.image
        wanted = [image, self.id, *self.fields, self.references if with_references else None]
        return list(dict.fromkeys(name for name in wanted if name))


def find_columns(schema: pa.Schema, choice: ColumnChoice) -> Columns:
    """Resolves `choice` against the schema of a corpus.

    Raises:
        UserError: if no column or several columns may be the image, a name is unknown, or a column's type is unusable.
    """
    kinds: dict[str, Kind] = {f.name: kind for f in schema if (kind := _image_kind(f.type))}
    image_column = choice.image
    if image_column == "auto":
        image_column = _choose_image(schema, kinds)
    elif image_column not in schema.names:
        raise UserError(
            f"input.image_column must be a column of the corpus ({', '.join(schema.names)}), got {image_column}"
        )
    elif image_column not in kinds:
        kind = schema.field(image_column).type
        raise UserError(
            f"input.image_column must hold bytes, {{bytes, path}} structs or URIs, got {image_column} of type {kind}"
        )
    fields = tuple(dict.fromkeys(name for template in choice.templates for name in template_fields(template)))
    if unknown := [name for name in fields if name not in schema.names]:
        raise UserError(f"prompt.template uses the column {unknown[0]!r}; the corpus has {', '.join(schema.names)}")
    ids = [
        f.name
        for f in schema
        if pa.types.is_string(f.type) or pa.types.is_large_string(f.type) or pa.types.is_integer(f.type)
    ]
    texts = [f.name for f in schema if _is_text(f.type) and f.name != image_column]
    return Columns(
        image=image_column,
        kind=kinds[image_column],
        id=_choose("input.id_column", choice.id, ID_NAMES, ids),
        references=_choose("input.reference_column", choice.references, REFERENCE_NAMES, texts),
        fields=fields,
    )


def template_fields(template: str) -> list[str]:
    """Column names in the braces of a prompt template, in order, repeated names included.

    Raises:
        UserError: if the braces do not match or hold something other than a plain column name.
    """
    try:
        replacements = [part for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise UserError(
            f"prompt.template must have matching braces around column names, got {template!r}: {error}"
        ) from error
    names = [str(name) for _, name, _, _ in replacements]
    # `extras` are the format specification and the conversion, as in {name:>10!r}.
    if bad := [name for _, name, *extras in replacements if any(extras) or not re.fullmatch(r"[\w ]+", str(name))]:
        raise UserError(f"prompt.template must hold plain column names in braces, got {{{bad[0]}}} in {template!r}")
    return names


def _image_kind(kind: pa.DataType) -> Kind | None:
    if pa.types.is_struct(kind):
        inner = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else None
        return "struct" if inner is not None and _is_binary(inner) else None
    if _is_binary(kind):
        return "binary"
    return "uri" if pa.types.is_string(kind) or pa.types.is_large_string(kind) else None


def _choose_image(schema: pa.Schema, kinds: dict[str, Kind]) -> str:
    """The image column. Structs and bytes win over URIs; among equals, the first of the well-known names wins."""
    for accepted_kinds, names in ((("struct", "binary"), IMAGE_NAMES), (("uri",), URI_NAMES)):
        candidates = [name for name, kind in kinds.items() if kind in accepted_kinds]
        known = [name for name in names if name in candidates]
        if known:
            return known[0]
        # A lone column of bytes is the image under any name. A lone column of text may be anything, so it is not.
        if len(candidates) == 1 and accepted_kinds != ("uri",):
            return candidates[0]
    columns = ", ".join(f"{f.name}: {f.type}" for f in schema)
    raise UserError(f"no image column found among [{columns}]; name one by input.image_column")


def _choose(key: str, choice: str, names: Sequence[str], usable: list[str]) -> str | None:
    """The column for the configuration key `key`; `names` are the well-known names, in order of preference."""
    if choice == "none":
        return None
    if choice == "auto":
        return next((name for name in names if name in usable), None)
    if choice not in usable:
        raise UserError(f"{key} must be none, auto or one of {', '.join(usable)}, got {choice}")
    return choice


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _is_text(kind: pa.DataType) -> bool:
    """Whether the type is a string or a list of strings."""
    inner = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
    return pa.types.is_string(inner) or pa.types.is_large_string(inner)
