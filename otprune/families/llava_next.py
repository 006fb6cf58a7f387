"""LLaVA-1.6 (LLaVA-NeXT): a picture is an overview and the tiles of the resolution that suits it best.

The tokens of the overview come first, then those of the tiles as they lie in the picture, without the padding, with a
newline token behind each row (`otprune.anyres`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
        """Those of a picture that fills its tiles: overview, patches of all tiles, a newline token a row of them."""

        def tokens(resolution: Size) -> int:
            rows, columns = (length // self.side * self.grid_side for length in resolution)
            return rows * (columns + 1)

        return self.num_tokens + max(map(tokens, self.resolutions), default=0)

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
        return self.num_tokens + len(rows) * (len(columns) + 1)

    def grid(self, size: Size) -> tuple[int, int]:
        return self.grid_side, self.grid_side

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


def read(config: Any, processor: ImageProcessor, options: Options) -> Facts:
    """The facts about a LLaVA-1.6.

    Raises:
        ValueError: for an option that takes pictures of free size.
    """
    check_fixed_size(options)
    vision = vision_shape(config)
    geometry = Tiled(
        side=vision.image_size,
        grid_side=vision.image_size // vision.patch_size,
        resolutions=tuple((height, width) for height, width in config.image_grid_pinpoints),
        background=processor.color,
    )
    aspect = "pad" if options.aspect == "auto" else options.aspect  # has no effect: the picture is cut into tiles
    return Facts(
        geometry=geometry,
        options=Options(aspect=aspect),
        vision=vision,
        image_token=config.image_token_index,
        class_attention=has_class_attention(config),
    )


def refuses(method: "Method", checkpoint: "Checkpoint", settings: Mapping[str, Any] | None = None) -> str | None:
    """As LLaVA-1.5; and methods that fix a number of tokens cannot prune pictures of different numbers of tokens."""
    if method.inside_model and not method.takes_tiles:
        return f"method {method.name} takes images of one size alone, so it cannot prune LLaVA-1.6"
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
