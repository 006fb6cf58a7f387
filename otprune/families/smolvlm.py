"""SmolVLM2 and Idefics3: labelled tiles of a picture scaled to one longest edge, and behind them the whole of it.

A picture is scaled until its longer side is the checkpoint's longest edge, stretched to whole square tiles, and cut.
The whole of it, squeezed into one tile more, stands behind the tiles: the overview. In each tile merge x merge patches
of the tower make one visual token (pixel shuffle): 81 of a tile of 384 pixels of SmolVLM2-2.2B. Between the tiles stand
token ids of text: a label in front of each tile (`<fake_token_around_image><row_1_col_2>`), a line break behind each
row of tiles, and an end behind the overview.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import ceil, isqrt
from typing import TYPE_CHECKING, Any

import numpy as np

from otprune.families.family import Facts, Family, ImageProcessor, Options
from otprune.families.geometry import Color, Filter, Frame, Size, Span, Way, line_span
from otprune.families.internvl import check_tile_options, num_crops, refuses
from otprune.families.llava import FILTERS, check_side, load_language_model
from otprune.schedules import num_kept
from otprune.shapes import VisionShape

if TYPE_CHECKING:  # these import torch
    from otprune.models.checkpoint import Checkpoint
    from otprune.models.internvl import InternVLEncoder

EDGE, SIDE = 4 * 364, 364
"""Longest edge and side of a tile, in pixels, of an image processor that stores neither: transformers' own."""
MOST_EDGE = 4096
"""The longest edge to which the model's image processor scales."""
RETENTION = 0.33
"""The share of visual tokens to keep by default: a cautious start and not a measured optimum.

A token is made of 4 to 16 patches, so a 1024 x 768 photograph has 1,053 of them in SmolVLM2-2.2B: about as many as in
Qwen2.5-VL, a third of InternVL's. So it keeps Qwen's share. `gate.min_quality` and a sweep decide for a corpus.
"""
MARK, OVERVIEW = "<fake_token_around_image>", "<global-img>"
"""What stands before each crop and behind the last one, and the label of the overview or of a lone tile."""

Pieces = tuple[tuple[int, ...], ...]
"""Token ids in front of each crop of a picture, and behind the last one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledTiles:
    """The geometry of a model that sees square tiles of `side` pixels, `grid_side` x `grid_side` tokens each.

    `edge` is the longest edge of a picture in pixels. A picture that would have more than `max_tiles` tiles gets a
    shorter one, the largest multiple of `side` that leaves it no more. With `retention` below 1 it is so short that the
    picture has at most that share of its tokens, but one tile at least.

    `texts[rows - 1][columns - 1]` holds the token ids between the tiles of a grid; `with_texts` fills it in.
    """

    side: int
    grid_side: int
    edge: int
    max_tiles: int
    background: Color
    resample: Filter = "lanczos"
    retention: float = 1.0
    texts: tuple[tuple[Pieces, ...], ...] = ()
    axes: int = 1
    fixed: int | None = None
    tiled: bool = True

    def __post_init__(self) -> None:
        check_side(self.side)
        if self.side % 2 or self.edge % 2 or not self.side <= self.edge <= MOST_EDGE:
            raise ValueError(
                "the side of a tile and the longest edge must be even, and the edge "
                f"{self.side} to {MOST_EDGE} pixels, got {self.side} and {self.edge}"
            )
        if not 1 <= self.max_tiles <= self.most_rows**2:
            raise ValueError(
                f"model.max_tiles must be 1 to {self.most_rows**2}, the tiles of a square picture with the "
                f"checkpoint's longest edge of {self.edge} pixels, got {self.max_tiles}"
            )

    @property
    def num_tokens(self) -> int:
        """Visual tokens of one tile."""
        return self.grid_side**2

    @property
    def most_rows(self) -> int:
        """Rows, or columns, of tiles of the longest edge."""
        return ceil(self.edge / self.side)

    @property
    def most_visual(self) -> int:
        return self.num_tokens * num_crops(self._most_tiles)

    @property
    def most_bytes(self) -> int:
        return 3 * self.side**2 * num_crops(self._most_tiles)

    @property
    def _most_tiles(self) -> int:
        """No picture has more tiles."""
        grids = [(rows, columns) for rows in range(1, self.most_rows + 1) for columns in range(1, rows + 1)]
        whole = max(rows * columns for rows, columns in grids if rows * columns <= self.max_tiles)
        return whole if self.retention == 1 else self._fewer(whole)

    def frame(self, size: Size) -> Frame:
        if min(size) * self.side < max(size):
            raise ValueError(f"{size[1]} x {size[0]} is thinner than one pixel at {self.side} x {self.side}")
        edge = self._edge(size)
        (rows, columns), via = tiles(size, edge, self.side), scaled(size, edge)
        height, width = rows * self.side, columns * self.side
        if rows * columns == 1:
            return Frame(height, width, "stretch", self.resample, via=via)
        return Frame(height, width, "stretch", self.resample, tile=self.side, overview="last", via=via)

    def tiles(self, size: Size) -> tuple[int, int]:
        """The rows and columns of tiles of a picture."""
        return tiles(size, self._edge(size), self.side)

    def _edge(self, size: Size) -> int:
        """The longest edge that a picture gets, in pixels."""
        edges = [self.edge, *range((self.most_rows - 1) * self.side, 0, -self.side)]
        counts = [rows * columns for rows, columns in (tiles(size, edge, self.side) for edge in edges)]
        whole = next(count for count in counts if count <= self.max_tiles)
        limit = whole if self.retention == 1 else self._fewer(whole)
        return next(edge for edge, count in zip(edges, counts, strict=True) if count <= limit)

    def _fewer(self, count: int) -> int:
        """The most tiles with at most the tokens that `retention` keeps of those of `count` tiles; 1 at least."""
        crops = num_kept(self.retention, self.num_tokens * num_crops(count)) // self.num_tokens
        return max(1, crops - 1)  # one of the crops is the overview

    def num_visual(self, size: Size, way: Way = "joint") -> int:
        rows, columns = self.tiles(size)
        return self.num_tokens * num_crops(rows * columns)

    def grid(self, size: Size) -> tuple[int, int]:
        return self.grid_side, self.grid_side

    def span(self, size: Size, kept: np.ndarray, image_token: int) -> Span:
        """The kept tokens of each crop behind its label.

        Every label and line break stays, also those of a tile that keeps no token. A label names the place of the
        tokens behind it, and the model was trained on whole grids of labels: with gaps, the rows and columns that it
        can read off them would be others than the picture's. A label is two ids, where a tile has 64 to 169 tokens. And
        so the length of a span follows from the picture's size and the number of its kept tokens alone.

        Raises:
            ValueError: for a token that belongs to no single place, or lies outside the picture.
        """
        rows, columns = self.tiles(size)
        if not self.texts:
            raise ValueError("the geometry must hold the text between tiles: with_texts adds it")
        pieces = self.texts[rows - 1][columns - 1]
        crops = len(pieces) - 1
        if len(kept) and not 0 <= kept.min() <= kept.max() < crops * self.num_tokens:
            raise ValueError(
                f"kept tokens must be 0 to {crops * self.num_tokens - 1}, as each stands behind the label of its tile, "
                f"got {kept.min()} to {kept.max()}"
            )
        counts = np.bincount(kept // self.num_tokens, minlength=crops)
        ids: list[int] = []
        for text, count in zip(pieces, [*counts.tolist(), 0], strict=True):
            ids += [*text, *[image_token] * count]
        return line_span(np.array(ids, np.int64))

    def shrunk(self, retention: float) -> "LabelledTiles":
        num_kept(retention, 1)  # checks the bounds
        return replace(self, retention=retention)


def scaled(size: Size, edge: int) -> Size:
    """(height, width) of a picture whose longer side is scaled to `edge`: the rule of the model's image processor.

    The shorter side is rounded down, and up again to an even number.
    """
    height, width = size
    ratio = width / height
    if width >= height:
        short = int(edge / ratio)
        return max(1, short + short % 2), edge
    short = int(edge * ratio)
    return edge, max(1, short + short % 2)


def tiles(size: Size, edge: int, side: int) -> tuple[int, int]:
    """The rows and columns of tiles of a picture that is scaled to `edge`: the rule of the model's image processor.

    The longer side is stretched to whole tiles, the shorter one scaled along, and then stretched to whole tiles too.
    """
    height, width = scaled(size, edge)
    ratio = width / height
    if width >= height:
        columns = ceil(width / side)
        return max(1, ceil(int(columns * side / ratio) / side)), columns
    rows = ceil(height / side)
    return rows, max(1, ceil(int(rows * side * ratio) / side))


def layout(rows: int, columns: int, image: str) -> str:
    """What stands in a prompt for a picture, as the model's processor writes it, with one `image` for each crop."""
    if rows * columns == 1:
        return f"{MARK}{OVERVIEW}{image}{MARK}"
    lines = [
        "".join(f"{MARK}<row_{row}_col_{column}>{image}" for column in range(1, columns + 1)) + "\n"
        for row in range(1, rows + 1)
    ]
    return f"{''.join(lines)}\n{MARK}{OVERVIEW}{image}{MARK}"


def with_texts(
    geometry: LabelledTiles, image: str, image_token: int, encode: Callable[[str], list[int]]
) -> LabelledTiles:
    """The geometry with the token ids between the tiles of every grid.

    Each layout is encoded as a whole, because a tokenizer may join the two line breaks in front of the overview.

    Args:
        image: the text of the image token.
        encode: (text) -> its token ids, without any that begin or end a prompt.

    Raises:
        ValueError: if the tokenizer does not see one image token for each crop.
    """
    sides = range(1, geometry.most_rows + 1)
    texts = tuple(
        tuple(cut(encode(layout(rows, columns, image)), image_token, num_crops(rows * columns)) for columns in sides)
        for rows in sides
    )
    return replace(geometry, texts=texts)


def cut(ids: list[int], image_token: int, crops: int) -> Pieces:
    """What stands in `ids` before, between and behind the image tokens of `crops` crops.

    Raises:
        ValueError: if there are more image tokens or fewer.
    """
    places = [i for i, token in enumerate(ids) if token == image_token]
    if len(places) != crops:
        raise ValueError(
            f"the tokenizer must find the image token {image_token} {crops} times in {crops} crops, found {len(places)}"
        )
    return tuple(tuple(ids[start + 1 : end]) for start, end in zip([-1, *places], [*places, len(ids)], strict=True))


def image_text(tokenizer: Any, image_token: int) -> str:
    """The text of the image token.

    Raises:
        ValueError: if the tokenizer has no such token.
    """
    text = tokenizer.convert_ids_to_tokens(image_token)
    if not isinstance(text, str):
        raise ValueError(f"its tokenizer must hold token {image_token}, the image token of config.json, found none")
    return text


def read(config: Any, processor: ImageProcessor, options: Options) -> Facts:
    """The facts about a SmolVLM2 or an Idefics3.

    Raises:
        ValueError: for options that do not fit tiles, an image processor that does not cut pictures into tiles of the
            tower's size, a language model that has not been tried, or a tokenizer that does not fit.
    """
    check_tile_options(options)
    if config.text_config.model_type != "llama":
        raise ValueError(f"text_config.model_type must be llama, got {config.text_config.model_type!r}")
    vision, settings = vision_shape(config), processor.settings
    for name in ("do_image_splitting", "do_resize"):
        if settings.get(name) is False:
            raise ValueError(
                f"the image processor's {name} must be true, got false; model.max_tiles=1 shows a picture in one tile"
            )
    side, edge = longest(settings, "max_image_size", SIDE), longest(settings, "size", EDGE)
    if side != vision.image_size:
        raise ValueError(f"the image processor's max_image_size must be the tower's {vision.image_size}, got {side}")
    most = ceil(edge / side) ** 2 if options.max_tiles is None else options.max_tiles
    image, tokenizer = config.image_token_id, processor.tokenizer()
    geometry = LabelledTiles(
        side=side,
        grid_side=isqrt(vision.num_tokens),
        edge=edge,
        max_tiles=most,
        background=processor.color,
        resample=FILTERS.get(settings.get("resample"), "lanczos"),
    )
    return Facts(
        geometry=with_texts(
            geometry,
            image_text(tokenizer, image),
            image,
            lambda text: tokenizer(text, add_special_tokens=False).input_ids,
        ),
        options=Options(max_tiles=most),
        vision=vision,
        image_token=image,
    )


def longest(settings: Mapping[str, Any], name: str, default: int) -> int:
    """The longest edge in pixels that a setting of the image processor names.

    Raises:
        ValueError: if the setting names something else.
    """
    stored = settings.get(name)
    if stored is None:
        return default
    edge = stored.get("longest_edge") if isinstance(stored, Mapping) else None
    if not isinstance(edge, int):
        raise ValueError(f"the image processor's {name} must name a longest_edge in pixels, got {stored}")
    return edge


def vision_shape(config: Any) -> VisionShape:
    """The tower, of whose patches the connector reads merge x merge as one with a single matrix.

    Raises:
        ValueError: if the tower's rows of patches do not make whole tokens.
    """
    vision, merge = config.vision_config, config.scale_factor
    patches = vision.image_size // vision.patch_size
    if merge < 1 or patches < merge or patches % merge:
        raise ValueError(
            f"scale_factor must divide the {patches} patches of a row of the tower (image_size {vision.image_size}, "
            f"patch_size {vision.patch_size}), got {merge}"
        )
    return VisionShape(
        hidden=vision.hidden_size,
        intermediate=vision.intermediate_size,
        layers=vision.num_hidden_layers,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        class_tokens=0,
        merge=merge,
        projector_matrices=1,
    )


def load_encoder(checkpoint: "Checkpoint", **place: Any) -> "InternVLEncoder":
    """The vision tower and the connector."""
    from otprune.models import smolvlm  # imports torch

    return smolvlm.load(checkpoint, **place)


def _family(name: str, title: str, architecture: str) -> Family:
    return Family(
        name=name,
        title=title,
        architecture=architecture,
        read=read,
        load_encoder=load_encoder,
        load_language_model=load_language_model,
        retention=RETENTION,
        refuses=refuses,
    )


SMOLVLM = _family("smolvlm", "SmolVLM", "SmolVLMForConditionalGeneration")
IDEFICS3 = _family("idefics3", "Idefics3", "Idefics3ForConditionalGeneration")
