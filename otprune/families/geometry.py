"""The geometry of a model family: everything about a picture's pixels and tokens that follows from its size alone.

A size is (height, width), in pixels, of the upright picture. From a size follow the pixels that the vision tower gets
(`Frame`), the number of visual tokens, and where the kept tokens stand in the prompt (`Span`). So stages on CPUs and
the driver know all of it without a model, and arrays between stages carry nothing but sizes and indices.

This module and the families' own import neither torch nor transformers: tasks that decode pictures import them.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

Size = tuple[int, int]
"""(height, width) in pixels of an upright picture."""

Fit = Literal["pad", "crop", "stretch", "contain"]
"""How a picture is brought to another shape: bars in the background colour, the centre cut out, both sides scaled by
themselves, or black bars around the largest copy of the picture that fits."""

Filter = Literal["bicubic", "lanczos", "bilinear"]
"""How pixels are resampled."""

Overview = Literal["first", "last"]
"""Where the overview stands among a picture's crops: in front of its tiles or behind them."""

Way = Literal["joint", "tiles", "grid"]
"""Among which tokens a method chooses: all of a picture's, each tile's by themselves, or each tile's so that a smaller
square grid of tokens stays."""

Color = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Frame:
    """The pixels of one picture as the vision tower gets them: an array uint8 of `shape`."""

    height: int  # pixels
    width: int
    fit: Fit
    resample: Filter = "bicubic"  # where the fit is stretch; every other fit is bicubic
    tile: int = 0  # side of the square tiles that the frame is cut into, with an overview besides; 0: no tiles
    overview: Overview = "first"  # where the overview stands, if there are tiles
    via: Size | None = None  # what the picture is stretched to first; its overview is then made of the frame

    @property
    def rows(self) -> int:
        """Rows of tiles; 0 without tiles."""
        return self.height // self.tile if self.tile else 0

    @property
    def columns(self) -> int:
        """Columns of tiles; 0 without tiles."""
        return self.width // self.tile if self.tile else 0

    @property
    def num_crops(self) -> int:
        """Pictures that the tower reads: the overview and the tiles, or the frame itself."""
        return 1 + self.rows * self.columns if self.tile else 1

    @property
    def shape(self) -> tuple[int, ...]:
        """[height, width, 3], or [crops, tile, tile, 3]."""
        return (self.num_crops, self.tile, self.tile, 3) if self.tile else (self.height, self.width, 3)


@dataclass(frozen=True, slots=True)
class Span:
    """What stands in a prompt for one picture: L token ids, of which K are the image token and take its visual tokens.

    Positions count from where the span begins. `extent` is by how much the span moves the positions of the text behind
    it: L for models that count along one axis.
    """

    tokens: np.ndarray  # int64 [L]
    positions: np.ndarray  # int64 [axes, L]
    extent: int

    def __len__(self) -> int:
        return len(self.tokens)


def line_span(tokens: np.ndarray) -> Span:
    """The span of tokens that take one position each, on one axis."""
    return Span(tokens, np.arange(len(tokens))[None], len(tokens))


class Geometry(Protocol):
    """The geometry of one checkpoint. Implementations are frozen dataclasses, which can be pickled and compared."""

    @property
    def axes(self) -> int:
        """Axes of positions: 1, or 3 with M-RoPE."""
        ...

    @property
    def background(self) -> Color:
        """The colour of bars and behind transparent pixels."""
        ...

    @property
    def fixed(self) -> int | None:
        """The number of visual tokens that every picture has; None if it depends on the size."""
        ...

    @property
    def tiled(self) -> bool:
        """Whether pictures are cut into tiles."""
        ...

    @property
    def most_visual(self) -> int:
        """Visual tokens of the largest picture."""
        ...

    @property
    def most_bytes(self) -> int:
        """Bytes of the largest frame, uint8."""
        ...

    def shrunk(self, retention: float) -> "Geometry | None":
        """The geometry of the same model that gets each picture smaller.

        A picture has as many tokens as possible, but not more than `retention` keeps of the whole picture's; only one
        that has a single tile left may have more. None if the tower takes one size alone.
        """
        ...

    def frame(self, size: Size) -> Frame:
        """The pixels that the tower gets of a picture.

        Raises:
            ValueError: if the picture is too narrow for the model.
        """
        ...

    def num_visual(self, size: Size, way: Way = "joint") -> int:
        """Visual tokens of a picture before pruning, among which a method chooses."""
        ...

    def grid(self, size: Size) -> tuple[int, int]:
        """(rows, columns) of the tokens that cover the whole picture in raster order.

        They come first in the picture's sequence, or last if that is where the frame has its overview. (0, 0) if there
        are none.
        """
        ...

    def span(self, size: Size, kept: np.ndarray, image_token: int) -> Span:
        """The span of a picture's kept tokens.

        Args:
            kept: int [K], the index of each kept token in the picture's sequence, in order; -1 for a token that
                belongs to no single place.

        Raises:
            ValueError: if positions need a place for a token that has none.
        """
        ...


def overview_tokens(geometry: Geometry, size: Size, num_visual: int) -> range | None:
    """The indices of the overview's tokens in a picture's sequence of `num_visual`; None without tiles besides."""
    if not geometry.tiled or not (frame := geometry.frame(size)).tile:
        return None
    rows, columns = geometry.grid(size)
    begin = num_visual - rows * columns if frame.overview == "last" else 0
    return range(begin, begin + rows * columns)
