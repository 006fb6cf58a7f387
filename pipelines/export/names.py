"""What the files of a row are named after."""

import re
from collections import Counter
from collections.abc import Iterable

from pipelines.errors import UserError
from pipelines.export.captions import Captioned
from pipelines.export.pieces import stem


def shared_stems(sources: Iterable[str]) -> frozenset[str]:
    """Names without suffix that several image files share, such as those of a.jpg and a.png."""
    return frozenset(name for name, count in Counter(map(stem, sources)).items() if count > 1)


def beside(row: Captioned, shared: frozenset[str]) -> str:
    """The name of an image file's caption, without suffix: that of a.jpg is `a`, or `a.jpg` if there is an a.png."""
    name = stem(row.source)
    return row.source if name in shared else name


def of_row(row: Captioned, by_id: bool) -> str:
    """The name of a row's files: nine digits, or the id with `_` for other characters than letters, digits, - and /."""
    return _plain(row.id) if by_id and row.id else f"{row.row:09d}"


def unique(name: str, taken: set[str]) -> str:
    """`name`, which is added to `taken`.

    Raises:
        UserError: if the name is taken.
    """
    if name in taken:
        raise UserError(f"export.name=id needs ids that differ, got {name} twice; export.name=row names files by row")
    taken.add(name)
    return name


def key_of_image(row: Captioned, taken: set[str]) -> str:
    """The key of an image file in a tar shard, where a dot would end the key: a number sets equal keys apart."""
    key = plain = _plain(stem(row.source))
    number = 1
    while key in taken:
        number += 1
        key = f"{plain}_{number}"
    taken.add(key)
    return key


def _plain(text: str) -> str:
    return re.sub(r"[^\w/-]+", "_", text).strip("/") or "_"
