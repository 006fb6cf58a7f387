"""LLaVA-1.6 (LLaVA-NeXT): a picture is an overview and the tiles of the resolution that suits it best.

The tokens of the overview come first, then those of the tiles as they lie in the picture, without the padding, with a
newline token behind each row (`otprune.anyres`).

Where two resolutions suit a picture equally, the first one of the checkpoint's list is taken. LLaVA's own code reads
[336, 672] as 336 wide and 672 high, transformers as 336 high and 672 wide. Both know the same set of resolutions, and
ties are those of pictures with no side above 336: LLaVA cuts each of them into an upper and a lower tile, transformers
(and vLLM) into a left and a right one. `Options.original_tiles` chooses. The default is transformers', because a
checkpoint that runs here is a conversion for transformers, whose captions then equal what transformers and vLLM make of
it. LLaVA's own is what the weights were trained with, and what published numbers rest on.

The language model may be any that transformers knows: Vicuna, Mistral, Llama 3, Qwen, Yi. Its chat template comes with
the checkpoint.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any

import numpy as np

from otprune.families.family import Facts, Family, ImageProcessor, Options
from otprune.families.geometry import Color, Frame, Size, Span, Way, line_span
from otprune.families.llava import (
    check_fixed_size,
    check_side,
    has_class_attention,
    load_encoder,
    load_language_model,
    vision_shape,
)
from otprune.families.llava import refuses as refuses_of_squares

if TYPE_CHECKING:  # these import torch
    from otprune.methods import Method
    from otprune.models.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiled:
    """The geometry of a model that sees square crops of `side` pixels, `grid_side` x `grid_side` tokens each."""

    side: int
    grid_side: int
    resolutions: tuple[Size, ...]  # (height, width) in pixels, multiples of `side`
    background: Color
    most_tiles: int = 0  # the tokens of all tiles are scaled down to those of so many tiles (`scaled_down`); 0: never
    axes: int = 1
    fixed: int | None = None
    tiled: bool = True

    def __post_init__(self) -> None:
        check_side(self.side)

    @property
    def num_tokens(self) -> int:
        """Tokens of one crop."""
        return self.grid_side**2

    @property
    def most_visual(self) -> int:
        """An upper bound for any shape of picture.

        It is reached by a picture that fills its tiles or, where the tokens of large ones are scaled down, by one that
        fills them so far that they just are not.
        """
        most = 0
        for height, width in self.resolutions:
            rows, columns = height // self.side * self.grid_side, width // self.side * self.grid_side
            # Equal margins are cut off two sides, so a picture covers as many rows as there are, or 2, 4, .. fewer.
            covered = [(covered, columns) for covered in range(rows, 0, -2)]
            covered += [(rows, covered) for covered in range(columns, 0, -2)]
            most = max(most, *(self._packed(*grid) for grid in covered))
        return self.num_tokens + most

    def _packed(self, rows: int, columns: int) -> int:
        """Tokens of the tiles of a picture that covers `rows` x `columns` of them, with a newline token a row."""
        rows, columns = scaled_down(rows, columns, self.most_tiles * self.num_tokens)
        return rows * (columns + 1)

    @property
    def most_bytes(self) -> int:
        return 3 * self.side**2 + 3 * max((height * width for height, width in self.resolutions), default=0)

    def shrunk(self, retention: float) -> None:
        return None

    def frame(self, size: Size) -> Frame:
        if min(size) * self.side < max(size):
            raise ValueError(f"{size[1]} x {size[0]} is thinner than one pixel at {self.side} x {self.side}")
        height, width = best_resolution(size, self.resolutions)
        return Frame(height, width, "contain", tile=self.side)

    def num_visual(self, size: Size, way: Way = "joint") -> int:
        frame = self.frame(size)
        if way == "tiles":  # every patch of every crop, and no newline tokens
            return frame.num_crops * self.num_tokens
        rows, columns = unpadded(frame.rows * self.grid_side, frame.columns * self.grid_side, size)
        return self.num_tokens + self._packed(len(rows), len(columns))

    def grid(self, size: Size) -> tuple[int, int]:
        return self.grid_side, self.grid_side

    def raster_order(self, size: Size, kept: np.ndarray) -> np.ndarray:
        """The order int64 that sorts tokens as the picture shows them: the overview's, then row by row of all tiles.

        Args:
            kept: the index of each token among those of all crops, one crop after the other, as of way "tiles".
        """
        crop, token = np.divmod(kept, self.num_tokens)
        tile_row, tile_column = np.divmod(crop - 1, self.frame(size).columns)  # crop 0 is the overview
        row, column = np.divmod(token, self.grid_side)
        row, column = row + tile_row * self.grid_side, column + tile_column * self.grid_side
        overview = crop == 0
        return np.lexsort((np.where(overview, token, column), np.where(overview, 0, row), ~overview))

    def span(self, size: Size, kept: np.ndarray, image_token: int) -> Span:
        return line_span(np.full(len(kept), image_token))


def best_resolution(size: Size, resolutions: Sequence[Size]) -> Size:
    """The resolution that shows most pixels of the picture. The smallest waste breaks ties."""
    height, width = size

    def effective_pixels_and_waste(resolution: Size) -> tuple[int, int]:
        scale = min(resolution[1] / width, resolution[0] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)  # enlarging adds no detail
        return effective, effective - resolution[0] * resolution[1]

    best = max(resolutions, key=effective_pixels_and_waste)
    return best[0], best[1]


def unpadded(rows: int, columns: int, size: Size) -> tuple[range, range]:
    """The rows and columns of a grid that the picture covers, when it is scaled to fit and centred.

    The rounding to 7 digits is that of transformers' `unpad_image`, so that both give the same number of tokens.
    """
    height, width = size
    if width / height > columns / rows:
        covered = int(round(height * (columns / width), 7))
        margin = (rows - covered) // 2
        return range(margin, rows - margin), range(columns)
    covered = int(round(width * (rows / height), 7))
    margin = (columns - covered) // 2
    return range(rows), range(margin, columns - margin)


def scaled_down(rows: int, columns: int, most: int) -> tuple[int, int]:
    """The grid to which one of rows x columns tokens is scaled, so that it has about `most`; 0: it stays.

    A grid of at most 1.21 times as many stays too: LLaVA-OneVision's rule, with the roundings of transformers'
    `pack_image_features`.
    """
    ratio = sqrt(rows * columns / most) if most else 0.0
    return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)


def read(config: Any, processor: ImageProcessor, options: Options) -> Facts:
    """The facts about a LLaVA-1.6.

    Raises:
        ValueError: as `read_tiled`.
    """
    return read_tiled(config, processor, options)


def read_tiled(config: Any, processor: ImageProcessor, options: Options, *, most_tiles: int = 0) -> Facts:
    """The facts about a model whose pictures are cut into tiles.

    Args:
        most_tiles: as of `Tiled`.

    Raises:
        ValueError: for an option that takes pictures of free size, a tower whose crops do not give a square of tokens,
            or resolutions that are not made of whole tiles.
    """
    check_fixed_size(options)
    vision = vision_shape(config)
    fitting = "default" if vision.class_tokens else "full"
    if config.vision_feature_select_strategy != fitting:  # the projector would read a class token, or lack a patch
        raise ValueError(
            f"vision_feature_select_strategy must be {fitting!r}, so that the tokens of a tile form a square, got "
            f"{config.vision_feature_select_strategy!r}"
        )
    resolutions = tuple((first, second) for first, second in config.image_grid_pinpoints)
    if options.original_tiles:
        resolutions = tuple((height, width) for width, height in resolutions)
    side = vision.image_size
    if not resolutions or any(min(size) < side or size[0] % side or size[1] % side for size in resolutions):
        raise ValueError(
            f"image_grid_pinpoints must be sizes in whole tiles of {side} x {side} pixels, got {list(resolutions)}"
        )
    geometry = Tiled(
        side=side,
        grid_side=side // vision.patch_size,
        resolutions=resolutions,
        background=processor.color,
        most_tiles=most_tiles,
    )
    aspect = "pad" if options.aspect == "auto" else options.aspect  # has no effect: the picture is cut into tiles
    return Facts(
        geometry=geometry,
        options=Options(aspect=aspect, original_tiles=options.original_tiles),
        vision=vision,
        image_token=config.image_token_index,
        class_attention=has_class_attention(config),
    )


def refuses(method: "Method", checkpoint: "Checkpoint", settings: Mapping[str, Any] | None = None) -> str | None:
    """As LLaVA-1.5; and methods that fix a number of tokens cannot prune pictures of different numbers of tokens."""
    if method.inside_model and not method.takes_tiles:
        return f"method {method.name} takes images of one size alone, so it cannot prune {checkpoint.record.title}"
    return refuses_of_squares(method, checkpoint, settings)


LLAVA_NEXT = Family(
    name="llava_next",
    title="LLaVA-1.6",
    architecture="LlavaNextForConditionalGeneration",
    read=read,
    load_encoder=load_encoder,
    load_language_model=load_language_model,
    refuses=refuses,
)
