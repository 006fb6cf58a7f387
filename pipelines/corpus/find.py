"""Finding the corpus: its files, their row groups, and the columns that matter. Runs once, on the driver."""

import logging
import posixpath
import re
import string
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, cast

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.corpus.file import CorpusFile
from pipelines.errors import UserError
from pipelines.store import STORE_ERRORS, Store

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jp2")
IMAGE_SUFFIXES += (".avif", ".heic", ".heif", ".ico", ".svg")  # not decoded, but a quarantine row says so
IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "content", "picture", "photo")
URI_NAMES = ("image_url", "image_uri", "url", "uri", "image_path", "file_path", "path", "file_name", "filename")
ID_NAMES = ("id", "key", "__key__", "image_id", "img_id", "uid", "uuid", "question_id")
REFERENCE_NAMES = ("references", "captions", "caption", "answer", "sentences")
FOOTER_THREADS = 16


Kind = Literal["struct", "binary", "uri"]
"""{bytes, path} of Hugging Face | bytes, as img2dataset writes | address"""


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns that the job reads from a Parquet corpus."""

    image: str
    kind: Kind
    id: str | None
    references: str | None
    fields: tuple[str, ...]  # of the prompt templates

    def to_read(self, with_references: bool) -> list[str]:
        image = f"{self.image}.bytes" if self.kind == "struct" else self.image
        wanted = [image, self.id, *self.fields, self.references if with_references else None]
        return list(dict.fromkeys(name for name in wanted if name))


@dataclass(frozen=True, slots=True)
class Corpus:
    """A folder with either Parquet files (`columns` set) or image files."""

    store: Store
    files: tuple[CorpusFile, ...]
    columns: Columns | None

    @property
    def num_rows(self) -> int:
        return sum(file.num_rows for file in self.files)


def find_corpus(
    store: Store, *, image_column: str, id_column: str, reference_column: str, templates: Sequence[str]
) -> Corpus:
    """The corpus at `store.path`: a Parquet file, a glob, or a folder (searched recursively).

    Raises:
        UserError: nothing there, neither Parquet nor images, a damaged Parquet file, or no usable image column.
    """
    root, sizes = _list(store)
    parquet = {name: size for name, size in sizes.items() if name.lower().endswith((".parquet", ".parq"))}
    if not parquet:
        return _image_folder(root, sizes, templates)
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        footers = list(pool.map(lambda name: read_footer(root, name), parquet))
    schema = footers[0].schema.to_arrow_schema()
    columns = find_columns(schema, image_column, id_column, reference_column, templates)
    beside = sum(name.lower().endswith(IMAGE_SUFFIXES) for name in sizes)
    if beside and columns.kind != "uri":
        logger.warning("%d image files beside the Parquet files are no part of the corpus", beside)
    files = []
    for (name, size), footer in zip(parquet.items(), footers, strict=True):
        _check_same(name, footer.schema.to_arrow_schema(), schema, columns)
        groups = tuple(footer.row_group(i).num_rows for i in range(footer.num_row_groups))
        if sum(groups):
            files.append(CorpusFile(name, size, groups))
    if not files:
        raise UserError(f"input.path must hold images, found {len(parquet)} Parquet files without rows in {store.path}")
    return Corpus(root, tuple(files), columns)


def find_columns(
    schema: pa.Schema, image_column: str, id_column: str, reference_column: str, templates: Sequence[str]
) -> Columns:
    """The columns to read, found by name and type where the configuration says auto.

    Raises:
        UserError: no or several candidates, an unknown name, or a column of an unusable type.
    """
    kinds: dict[str, Kind] = {f.name: kind for f in schema if (kind := _image_kind(f.type))}
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
    fields = tuple(dict.fromkeys(name for template in templates for name in template_fields(template)))
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
        id=_choose("input.id_column", id_column, ID_NAMES, ids),
        references=_choose("input.reference_column", reference_column, REFERENCE_NAMES, texts),
        fields=fields,
    )


def template_fields(template: str) -> list[str]:
    """Column names in braces of a prompt template.

    Raises:
        UserError: if the braces do not hold plain column names.
    """
    try:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise UserError(
            f"prompt.template must have matching braces around column names, got {template!r}: {error}"
        ) from error
    names = [str(name) for _, name, _, _ in parts]
    if bad := [name for _, name, *more in parts if any(more) or not re.fullmatch(r"[\w ]+", str(name))]:
        raise UserError(f"prompt.template must hold plain column names in braces, got {{{bad[0]}}} in {template!r}")
    return names


def _list(store: Store) -> tuple[Store, dict[str, int]]:
    """The folder that sources are relative to, and relative name -> size of every file below it that is meant."""
    fs, path = store.fs, store.root
    try:
        if any(mark in path for mark in "*?[") and not fs.exists(path):
            fixed = re.split(r"[*?\[]", path, maxsplit=1)[0]
            root = fixed.rpartition("/")[0] or "/"
            matches = cast(dict[str, Any], fs.glob(path, detail=True))
            found = {p: info for p, info in matches.items() if info["type"] != "directory"}  # links are files too
        elif fs.isfile(path):
            root, found = posixpath.dirname(path), {path: fs.info(path)}
        else:
            root, found = path, cast(dict[str, Any], fs.find(path, detail=True))
    except STORE_ERRORS as error:
        raise UserError(f"input.path {store.path} cannot be listed: {error}") from error
    names = {posixpath.relpath(p, root): info["size"] for p, info in found.items()}
    names = {
        name: size for name, size in sorted(names.items()) if not any(p.startswith((".", "_")) for p in name.split("/"))
    }
    if not names:
        raise UserError(
            f"input.path must be a Parquet file, a glob or a folder with images, found nothing at {store.path!r}"
        )
    scheme = "s3://" if store.is_s3 else ""
    return Store(scheme + root, store.endpoint_url, store.anonymous), names


def _image_folder(root: Store, sizes: dict[str, int], templates: Sequence[str]) -> Corpus:
    files = tuple(CorpusFile(name, size) for name, size in sizes.items() if name.lower().endswith(IMAGE_SUFFIXES))
    if not files:
        shown = ", ".join(list(sizes)[:3])
        raise UserError(
            f"input.path must hold Parquet or image files, found {len(sizes)} others in {root.path}: {shown}"
        )
    if names := [name for template in templates for name in template_fields(template)]:
        raise UserError(f"prompt.template uses the column {names[0]!r}, but a folder of image files has no columns")
    if skipped := len(sizes) - len(files):
        logger.warning("%d files without an image suffix are no part of the corpus", skipped)
    return Corpus(root, files, None)


def read_footer(root: Store, name: str) -> pq.FileMetaData:
    """Raises UserError if the file is no readable Parquet."""
    try:
        with root.fs.open(root.join(name), "rb") as stream:
            return pq.read_metadata(stream)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{name} is not a readable Parquet file: {str(error).splitlines()[0]}") from error


def _check_same(name: str, schema: pa.Schema, first: pa.Schema, columns: Columns) -> None:
    for wanted in filter(None, (columns.image, columns.id, columns.references, *columns.fields)):
        got = schema.field(wanted).type if wanted in schema.names else "no such column"
        if got != first.field(wanted).type:
            raise UserError(
                f"{name}: column {wanted} must be {first.field(wanted).type} as in the first file, got {got}"
            )


def _image_kind(kind: pa.DataType) -> Kind | None:
    if pa.types.is_struct(kind):
        inner = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else None
        return "struct" if inner is not None and _is_binary(inner) else None
    if _is_binary(kind):
        return "binary"
    return "uri" if pa.types.is_string(kind) or pa.types.is_large_string(kind) else None


def _choose_image(schema: pa.Schema, kinds: dict[str, Kind]) -> str:
    """Structs and bytes before URIs; among several, the best known name."""
    for wanted, names in ((("struct", "binary"), IMAGE_NAMES), (("uri",), URI_NAMES)):
        candidates = [name for name, kind in kinds.items() if kind in wanted]
        known = [name for name in names if name in candidates]
        if known:
            return known[0]
        if len(candidates) == 1 and wanted != ("uri",):
            return candidates[0]
    columns = ", ".join(f"{f.name}: {f.type}" for f in schema)
    raise UserError(f"no image column found among [{columns}]; name one by input.image_column")


def _choose(key: str, wanted: str, names: Sequence[str], usable: list[str]) -> str | None:
    if wanted == "none":
        return None
    if wanted == "auto":
        return next((name for name in names if name in usable), None)
    if wanted not in usable:
        raise UserError(f"{key} must be none, auto or one of {', '.join(usable)}, got {wanted}")
    return wanted


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _is_text(kind: pa.DataType) -> bool:
    inner = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
    return pa.types.is_string(inner) or pa.types.is_large_string(inner)
