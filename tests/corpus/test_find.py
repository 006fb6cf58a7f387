"""Finding the corpus: which files, which columns, and one clear line for everything that is no corpus."""

import base64
import logging
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.parquet import encryption

from pipelines.corpus.columns import ColumnChoice, Columns, find_columns, template_fields
from pipelines.corpus.find import Corpus, find_corpus
from pipelines.corpus.listing import list_files
from pipelines.errors import UserError
from pipelines.store import Store, make_store

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
PLAIN = pa.table({"image": pa.array([b"a", b"b", b"c"])})


def find(path, image="auto", key="auto", references="auto", templates=("x",), format="auto") -> Corpus:
    return find_corpus(
        make_store(str(path)),
        image_column=image,
        id_column=key,
        reference_column=references,
        templates=templates,
        format=format,
    )


def columns(types: dict[str, pa.DataType], image="auto", key="auto", references="auto", templates=("x",)) -> Columns:
    return find_columns(pa.schema(list(types.items())), ColumnChoice(image, key, references, tuple(templates)))


def write(path, table=PLAIN, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return path


# Columns


@pytest.mark.parametrize(
    ("types", "image", "kind"),
    [
        ({"image": STRUCT, "label": pa.int64()}, "image", "struct"),
        ({"img": STRUCT, "path": pa.string()}, "img", "struct"),
        ({"photo_of_it": STRUCT, "text": pa.string()}, "photo_of_it", "struct"),  # the only one, whatever its name
        ({"jpg": pa.binary(), "url": pa.string(), "caption": pa.string()}, "jpg", "binary"),  # img2dataset
        ({"webp": pa.large_binary(), "url": pa.string()}, "webp", "binary"),
        ({"x": pa.binary(), "y": pa.int8()}, "x", "binary"),
        ({"image": pa.binary(), "thumbnail": pa.binary()}, "image", "binary"),
        ({"bytes": pa.binary(), "image": STRUCT}, "image", "struct"),  # the better known name
        ({"image": pa.string(), "blob": pa.binary()}, "blob", "binary"),  # bytes before addresses
        ({"url": pa.string(), "text": pa.string()}, "url", "uri"),
        ({"file_name": pa.large_string(), "url": pa.string()}, "url", "uri"),
        ({"only": pa.struct([("bytes", pa.large_binary())])}, "only", "struct"),
    ],
)
def test_the_image_column_is_found_by_type_and_name(types, image, kind):
    found = columns(types)
    assert (found.image, found.kind) == (image, kind)


@pytest.mark.parametrize(
    "types",
    [
        {"label": pa.int64(), "score": pa.float32()},
        {"a": pa.binary(), "b": pa.binary()},  # two candidates, no known name
        {"text": pa.string()},  # any text might be an address: only known names are taken for one
        {"image": pa.struct([("path", pa.string())])},
        {"image": pa.list_(pa.uint8())},
    ],
)
def test_without_a_usable_image_column_the_columns_are_listed(types):
    with pytest.raises(UserError, match="no image column found among") as caught:
        columns(types)
    assert all(f"{name}: {kind}" in str(caught.value) for name, kind in types.items())
    assert "input.image_column" in str(caught.value)


def test_a_named_image_column_is_taken_even_against_better_known_names():
    found = columns({"image_bytes": pa.binary(), "second": pa.binary()}, image="second")
    assert (found.image, found.kind) == ("second", "binary")
    assert columns({"image_bytes": pa.binary(), "address": pa.string()}, image="address").kind == "uri"


def test_a_named_image_column_must_exist_and_be_usable():
    with pytest.raises(UserError, match=r"input\.image_column must be a column of the corpus \(a, b\), got c"):
        columns({"a": pa.binary(), "b": pa.int8()}, image="c")
    with pytest.raises(UserError, match=r"input\.image_column must hold bytes.*got b of type int8"):
        columns({"a": pa.binary(), "b": pa.int8()}, image="b")


@pytest.mark.parametrize(
    ("types", "key"),
    [
        ({"id": pa.string()}, "id"),
        ({"id": pa.int64()}, "id"),
        ({"key": pa.string(), "image_id": pa.int32()}, "key"),
        ({"id": pa.float64(), "uid": pa.large_string()}, "uid"),
        ({"name": pa.string()}, None),
    ],
)
def test_the_id_column_is_found_by_name_and_type(types, key):
    assert columns({"image": STRUCT, **types}).id == key


@pytest.mark.parametrize(
    ("types", "references"),
    [
        ({"references": pa.list_(pa.string()), "caption": pa.string()}, "references"),
        ({"caption": pa.string()}, "caption"),
        ({"captions": pa.large_list(pa.large_string())}, "captions"),
        ({"captions": pa.list_(pa.struct([("text", pa.string())]))}, None),
        ({"title": pa.string()}, None),
    ],
)
def test_the_reference_column_is_found_by_name_and_type(types, references):
    assert columns({"image": STRUCT, **types}).references == references


def test_id_and_reference_columns_can_be_named_or_refused():
    types = {"image": STRUCT, "id": pa.string(), "mine": pa.string(), "caption": pa.string(), "size": pa.float32()}
    found = columns(types, key="mine", references="id")
    assert (found.id, found.references) == ("mine", "id")
    found = columns(types, key="none", references="none")
    assert (found.id, found.references) == (None, None)
    with pytest.raises(UserError, match=r"input\.id_column must be none, auto or one of id, mine, caption, got size"):
        columns(types, key="size")
    with pytest.raises(UserError, match=r"input\.reference_column must be .*, got nope"):
        columns(types, references="nope")


def test_template_fields_are_columns():
    types = {"picture": pa.binary(), "title": pa.string(), "the year": pa.int32()}
    found = columns(types, templates=["{title} of {the year}", "{title} ?", "no field"])
    assert found.fields == ("title", "the year")
    with pytest.raises(UserError, match=r"prompt\.template uses the column 'ttle'; the corpus has picture, title"):
        columns(types, templates=["{ttle}"])


def test_braces_of_a_template_hold_plain_column_names():
    assert template_fields("a {b} {{not one}} {c}") == ["b", "c"]
    for template in ("{}", "{a.b}", "{a[0]}", "{a!r}", "{a:>5}", "{a", "a}", "{"):
        with pytest.raises(UserError, match=r"prompt\.template must"):
            template_fields(template)


def test_only_needed_columns_are_read():
    types = {"image": STRUCT, "id": pa.string(), "caption": pa.string(), "title": pa.string(), "heavy": pa.binary()}
    found = columns(types, templates=["{title} {title}"])
    assert found.to_read(with_references=False) == ["image.bytes", "id", "title"]
    assert found.to_read(with_references=True) == ["image.bytes", "id", "title", "caption"]


# Files


def test_a_single_file_is_a_corpus(tmp_path):
    corpus = find(write(tmp_path / "one.parquet", row_group_size=2))
    assert corpus.store.path == str(tmp_path)
    assert [(f.source, f.row_groups) for f in corpus.files] == [("one.parquet", (2, 1))]
    assert corpus.files[0].size == (tmp_path / "one.parquet").stat().st_size
    assert corpus.num_rows == 3


def test_a_folder_is_searched_recursively_in_sorted_order_and_hidden_names_are_left_out(tmp_path):
    for name in (
        "b.parquet",
        "a/c.PARQUET",
        "a/b.parq",
        ".hidden.parquet",
        "_delta/x.parquet",
        "a/_y.parquet",
        "n.txt",
    ):
        write(tmp_path / name)
    assert [f.source for f in find(tmp_path).files] == ["a/b.parq", "a/c.PARQUET", "b.parquet"]


def test_a_glob_takes_what_it_matches_relative_to_its_fixed_part(tmp_path):
    for name in ("x/train-0.parquet", "x/train-1.parquet", "x/test-0.parquet", "y/train-0.parquet"):
        write(tmp_path / name)
    corpus = find(tmp_path / "x" / "train-*.parquet")
    assert (corpus.store.path, [f.source for f in corpus.files]) == (
        str(tmp_path / "x"),
        ["train-0.parquet", "train-1.parquet"],
    )
    corpus = find(tmp_path / "*" / "train-?.parquet")
    assert [f.source for f in corpus.files] == ["x/train-0.parquet", "x/train-1.parquet", "y/train-0.parquet"]
    assert len(find(f"{tmp_path}/**/*.parquet").files) == 4


def test_links_are_followed_as_a_hub_cache_needs_it(tmp_path):
    blob = write(tmp_path / "blobs" / "0123")
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    os.symlink("../../blobs/0123", snapshot / "train-0.parquet")
    for path in (snapshot, snapshot / "*.parquet", snapshot / "train-0.parquet"):
        assert [(f.source, f.size) for f in find(path).files] == [("train-0.parquet", blob.stat().st_size)]


def test_a_file_is_the_same_through_its_folder_a_glob_and_its_own_name(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"picture")
    os.utime(tmp_path / "a.jpg", ns=(1_764_000_000_123_456_789,) * 2)
    listings = [list_files(Store(str(path))) for path in (tmp_path, tmp_path / "*.jpg", tmp_path / "a.jpg")]
    assert [dict(listing.versions) for listing in listings] == [{"a.jpg": "1764000000123456789"}] * 3


def test_a_name_with_brackets_is_no_glob_if_it_exists(tmp_path):
    write(tmp_path / "run [1]" / "a.parquet")
    assert [f.source for f in find(tmp_path / "run [1]").files] == ["a.parquet"]
    assert [f.source for f in find(tmp_path / "run [1]" / "a.parquet").files] == ["a.parquet"]


def test_a_folder_of_image_files_is_a_corpus_and_what_is_left_out_is_counted(tmp_path, caplog):
    for name in ("b.JPG", "a/c.png", "a/d.svg", "notes.txt", ".DS_Store", "e.webp.part"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    with caplog.at_level(logging.WARNING):
        corpus = find(tmp_path)
    assert (corpus.format.name, corpus.columns) == ("images", None)
    assert [(f.source, f.size, f.num_rows) for f in corpus.files] == [
        ("a/c.png", 5, 1),
        ("a/d.svg", 5, 1),
        ("b.JPG", 5, 1),
    ]
    assert "2 files without an image suffix" in caplog.text


def test_images_beside_parquet_files_are_reported_unless_the_corpus_points_to_them(tmp_path, caplog):
    (tmp_path / "x.png").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        write(tmp_path / "a.parquet", pa.table({"file_name": ["x.png"]}))
        assert find(tmp_path).columns.kind == "uri"
        assert not caplog.text
        write(tmp_path / "a.parquet")
        find(tmp_path)
        assert "1 image files beside the Parquet files" in caplog.text


def test_the_format_is_parquet_where_there_is_some_unless_it_is_named_and_the_log_says_which(tmp_path, caplog):
    write(tmp_path / "a.parquet")
    (tmp_path / "x.png").write_bytes(b"12")
    with caplog.at_level(logging.INFO):
        assert [f.source for f in find(tmp_path).files] == ["a.parquet"]
        assert f"input.format=auto, found parquet: 1 files, 3 rows in {tmp_path}" in caplog.messages
        assert [f.source for f in find(tmp_path, format="images").files] == ["x.png"]
        assert f"input.format=images: 1 files, 1 rows in {tmp_path}" in caplog.messages
        assert [f.source for f in find(tmp_path, format="parquet").files] == ["a.parquet"]


def test_a_named_format_must_exist_and_have_files(tmp_path):
    (tmp_path / "x.png").write_bytes(b"12")
    with pytest.raises(UserError, match=r"input\.format must be one of auto, parquet, images, tar, .*, got 'Parquet'"):
        find(tmp_path, format="Parquet")
    with pytest.raises(UserError, match=r"input\.path must hold Parquet files, found 1 others in .*: x\.png"):
        find(tmp_path, format="parquet")


def test_a_single_image_file_is_a_corpus(tmp_path):
    (tmp_path / "one.png").write_bytes(b"x")
    (tmp_path / "two.png").write_bytes(b"x")
    assert [f.source for f in find(tmp_path / "one.png").files] == ["one.png"]


def test_a_folder_of_images_has_no_columns_for_a_template(tmp_path):
    (tmp_path / "one.png").write_bytes(b"x")
    with pytest.raises(UserError, match="'title', but a folder of image files has no columns"):
        find(tmp_path, templates=["{title}"])
    with pytest.raises(UserError, match=r"input\.image_column=jpg names a column, but"):
        find(tmp_path, image="jpg")


@pytest.mark.parametrize("name", ["absent", "absent.parquet", "absent/*.parquet", "empty", "only_hidden"])
def test_nothing_there_is_one_clear_line(tmp_path, name):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "only_hidden" / ".a.parquet")
    with pytest.raises(UserError, match=r"input\.path must be a Parquet file, a glob or a folder.* found nothing at"):
        find(tmp_path / name)


def test_neither_parquet_nor_images_is_named(tmp_path):
    (tmp_path / "data.zip").write_bytes(b"")
    with pytest.raises(UserError, match=r"must hold Parquet, image, tar, .* or CSV files, found 1 others .*data\.zip"):
        find(tmp_path)


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "dangling"])
def test_a_damaged_parquet_file_is_named_and_counts_as_a_row(tmp_path, caplog, damage):
    whole = write(tmp_path / "whole.parquet").read_bytes()
    content = {"empty": b"", "cut": whole[: len(whole) // 2], "text": b"no parquet at all\n"}
    if damage == "dangling":
        os.symlink(tmp_path / "nowhere", tmp_path / "b.parquet")
    else:
        (tmp_path / "b.parquet").write_bytes(content[damage])
    with caplog.at_level(logging.WARNING):
        assert [(file.source, file.num_rows) for file in find(tmp_path).files] == [
            ("b.parquet", 1),
            ("whole.parquet", 3),
        ]
    (message,) = caplog.messages
    assert message.startswith("b.parquet is not a readable Parquet file and counts as one row: ")
    assert "\n" not in message
    (tmp_path / "whole.parquet").unlink()
    with pytest.raises(UserError, match=r"^b\.parquet is not a readable Parquet file: "):
        find(tmp_path)


class Keys(encryption.KmsClient):
    """Hands out keys as they are."""

    def __init__(self, _: object):
        super().__init__()

    def wrap_key(self, key: bytes, _: str) -> str:
        return base64.b64encode(key).decode()

    def unwrap_key(self, wrapped: str, _: str) -> bytes:
        return base64.b64decode(wrapped)


@pytest.mark.parametrize("plaintext_footer", [True, False])
def test_encrypted_columns_are_refused_and_never_touched(tmp_path, plaintext_footer):
    """pyarrow ends the process at the first look at the metadata of an encrypted column."""
    setup = encryption.EncryptionConfiguration(
        footer_key="f" * 16, column_keys={"k" * 16: ["image"]}, plaintext_footer=plaintext_footer
    )
    keys = encryption.CryptoFactory(Keys).file_encryption_properties(encryption.KmsConnectionConfig(), setup)
    with pq.ParquetWriter(tmp_path / "a.parquet", PLAIN.schema, encryption_properties=keys) as writer:
        writer.write_table(PLAIN)
    with pytest.raises(UserError, match=r"a\.parquet is not a readable Parquet file: its columns are encrypted"):
        find(tmp_path)


def test_parquet_files_without_rows_are_skipped_or_refused_if_there_are_no_others(tmp_path):
    write(tmp_path / "a.parquet", PLAIN.slice(0, 0))
    with pytest.raises(UserError, match="found 1 Parquet files without rows"):
        find(tmp_path)
    write(tmp_path / "b.parquet")
    assert [f.source for f in find(tmp_path).files] == ["b.parquet"]


def test_a_file_whose_needed_columns_differ_is_named_and_other_columns_may_differ(tmp_path):
    write(tmp_path / "a.parquet", pa.table({"image": [b"a"], "id": ["x"], "extra": [1]}))
    write(tmp_path / "b.parquet", pa.table({"image": [b"a"], "id": ["x"], "extra": ["other"]}))
    assert len(find(tmp_path).files) == 2
    write(tmp_path / "b.parquet", pa.table({"image": [b"a"], "id": [7]}))
    with pytest.raises(UserError, match=r"b\.parquet: column id must be string as in the first file, got int64"):
        find(tmp_path)
    assert len(find(tmp_path, key="none").files) == 2
    write(tmp_path / "b.parquet", pa.table({"id": ["x"]}))
    with pytest.raises(UserError, match=r"b\.parquet: column image must be binary .*, got no such column"):
        find(tmp_path)
