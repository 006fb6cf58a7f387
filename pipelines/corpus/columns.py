"""Chooses the columns that the job reads from a corpus of rows. The key `auto` finds them by name and type."""

import logging
import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import unquote

import pyarrow as pa

from pipelines.errors import UserError

logger = logging.getLogger(__name__)

IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "content", "picture", "photo")
URI_NAMES = ("image_url", "image_uri", "url", "uri", "image_path", "file_path", "path", "file_name", "filename")
ADDRESS_NAMES = tuple(name for name in URI_NAMES if name != "path")  # even if the column's type is bytes
ID_NAMES = ("id", "key", "__key__", "image_id", "img_id", "uid", "uuid", "question_id")
REFERENCE_NAMES = ("references", "captions", "caption", "answer", "sentences")

Kind = Literal["struct", "binary", "uri"]
"""Type of the image column: a Hugging Face struct {bytes, path}, bytes (as img2dataset writes them), or a URI."""

Alike = Literal["text", "integer", "number", "bytes", "struct", "texts", "nothing", "other"]
"""What a type reads as. Files whose columns read alike are one corpus."""


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
    with_paths: bool = False  # struct: some rows have no bytes but the path of a file
    folder_relative: bool = False  # a relative URI is relative to the folder of its own file, not to the corpus
    partitions: tuple[str, ...] = ()  # of `id`, `references` and `fields`, those that stand in folder names: year=2024

    def to_read(self, with_references: bool) -> list[str]:
        """Names of the columns to read from a file, each once."""
        # Parquet stores the fields of a struct apart: `path` beside `bytes` is never read.
        image = f"{self.image}.bytes" if self.kind == "struct" else self.image
        path = f"{self.image}.path" if self.with_paths else None
        wanted = [image, path, self.id, *self.fields, self.references if with_references else None]
        return list(dict.fromkeys(name for name in wanted if name and name not in self.partitions))


def find_columns(schema: pa.Schema, choice: ColumnChoice, partitions: Sequence[str] = ()) -> Columns:
    """Resolves `choice` against the schema of a corpus.

    Args:
        partitions: columns that stand in the names of folders, as Hive writes them.

    Raises:
        UserError: if no column or several columns may be the image, a name is unknown, or a column's type is unusable.
    """
    for name in partitions:
        if name not in schema.names:
            schema = schema.append(pa.field(name, pa.string()))
    kinds: dict[str, Kind] = {f.name: kind for f in schema if (kind := _image_kind(f))}
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
    ids = [f.name for f in schema if _names_rows(f.type) and f.name != image_column]
    texts = [f.name for f in schema if reads_as(f.type) in ("text", "texts") and f.name != image_column]
    id_column = _choose("input.id_column", choice.id, ID_NAMES, ids)
    references = _choose("input.reference_column", choice.references, REFERENCE_NAMES, texts)
    if id_column is None and choice.id == "auto" and (unusable := _first_known(ID_NAMES, schema.names)):
        logger.warning(
            "ids are file#row: the column %s of type %s cannot name captions", unusable, schema.field(unusable).type
        )
    used = (id_column, references, *fields)
    return Columns(
        image=image_column,
        kind=kinds[image_column],
        id=id_column,
        references=references,
        fields=fields,
        partitions=tuple(name for name in partitions if name in used),
    )


def partitions_of(source: str) -> dict[str, str]:
    """The columns that stand in the folders of a file's name, as Hive writes them: year=2024/month=1/a.parquet."""
    pairs = (part.partition("=") for part in source.split("/")[:-1])
    return {name: unquote(value) for name, mark, value in pairs if mark and name.isidentifier()}


def reads_as(kind: pa.DataType) -> Alike:
    """What a column of this type reads as, whatever its width and encoding."""
    if pa.types.is_dictionary(kind):
        return reads_as(kind.value_type)
    tests: tuple[tuple[Alike, bool], ...] = (
        ("text", pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)),
        ("integer", pa.types.is_integer(kind)),
        ("number", pa.types.is_floating(kind) or pa.types.is_decimal(kind)),
        ("bytes", _is_binary(kind)),
        ("struct", pa.types.is_struct(kind)),
        ("nothing", pa.types.is_null(kind)),
        ("texts", _is_list(kind) and reads_as(kind.value_type) == "text"),
    )
    for name, holds in tests:
        if holds:
            return name
    return "other"


def merge_schemas(schemas: Iterable[pa.Schema]) -> pa.Schema:
    """Every column of any of the schemas, with the type of the first one that says more than null."""
    fields: dict[str, pa.Field] = {}
    last = None
    for schema in schemas:
        if last is not None and schema.equals(last):
            continue  # most files of a corpus have one schema
        last = schema
        for each in schema:
            if each.name not in fields or pa.types.is_null(fields[each.name].type):
                fields[each.name] = each
    return pa.schema(list(fields.values()))


def check_alike(name: str, schema: pa.Schema, merged: pa.Schema, columns: Columns) -> None:
    """Refuses a file whose columns read in another way than those of the corpus. Other columns than the image may lack.

    Raises:
        UserError: with the file, the column and both types.
    """
    for column in filter(None, (columns.image, columns.id, columns.references, *columns.fields)):
        if column not in schema.names:
            if column != columns.image:
                continue
            got = "no such column"
        else:
            got = schema.field(column).type
            if column in columns.partitions or reads_as(got) in (reads_as(merged.field(column).type), "nothing"):
                continue
        raise UserError(f"{name}: column {column} must be {merged.field(column).type} as in the first file, got {got}")


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


def _image_kind(column: pa.Field) -> Kind | None:
    kind = column.type
    if pa.types.is_struct(kind):
        inner = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else None
        return "struct" if inner is not None and _is_binary(inner) else None
    if _is_binary(kind):
        # Spark, Impala and Hive may write text without saying that it is text: then the name tells.
        return "uri" if column.name in ADDRESS_NAMES else "binary"
    return "uri" if reads_as(kind) == "text" else None


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
        return _first_known(names, usable)
    if choice not in usable:
        raise UserError(f"{key} must be none, auto or one of {', '.join(usable)}, got {choice}")
    return choice


def _first_known(names: Sequence[str], columns: Sequence[str]) -> str | None:
    """The first of the well-known names that is a column, in any case of letters: ID stands for id."""
    by_lower = {column.lower(): column for column in reversed(columns)}
    return next((name if name in columns else by_lower[name] for name in names if name in by_lower), None)


def _names_rows(kind: pa.DataType) -> bool:
    """Whether values of this type are fit to be ids: text, whole numbers, decimals, bytes, UUIDs, dates."""
    if pa.types.is_dictionary(kind):
        return _names_rows(kind.value_type)
    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    exact = pa.types.is_decimal(kind) or pa.types.is_temporal(kind) or pa.types.is_fixed_size_binary(kind)
    return exact or reads_as(kind) in ("text", "integer", "bytes")


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
