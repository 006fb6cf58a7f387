"""InternVL2.5, 3 and 3.5 in Hugging Face format: tiles of a picture stretched to them, and behind them the whole of it.

A picture is stretched to the grid of square tiles whose shape is nearest to its own. Of more than one tile, the whole
picture, squeezed into one tile more, stands behind them: the overview. In each tile 2 x 2 patches of the tower make one
visual token (pixel shuffle): 256 of a tile of 448 pixels. The tokens of a tile are in raster order, one tile follows
the other, and nothing stands between them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from otprune.families.family import Facts, Family, ImageProcessor, Options, check_stored
from otprune.families.geometry import Color, Filter, Frame, Size, Span, Way, line_span
from otprune.families.llava import FILTERS, check_side, load_language_model
from otprune.schedules import num_kept
from otprune.shapes import VisionShape

if TYPE_CHECKING:  # these import torch
    from otprune.methods import Method
    from otprune.models.checkpoint import Checkpoint
    from otprune.models.internvl import InternVLEncoder

MOST_TILES = 12
"""Tiles of the largest picture, without its overview, of a checkpoint that stores no number. The models were trained
with up to 12."""
RETENTION = 0.2
"""The share of visual tokens to keep by default: a cautious start and not a measured optimum.

Small photographs are enlarged to fill their tiles, and shown a second time in the overview: one of 1024 x 768 pixels
has 3,328 tokens, where Qwen2.5-VL, without either, has 999. So a smaller share than Qwen's should do.
`gate.min_quality` and a sweep decide for a corpus.
"""
DECODERS = ("llama", "qwen2", "qwen3")
"""`model_type` of the language models that run here."""
START, END = "<img>", "</img>"
"""What stands before and behind the tokens of a picture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StretchedTiles:
    """The geometry of a model that sees square tiles of `side` pixels, `grid_side` x `grid_side` tokens each.

    With `retention` below 1 the pictures get fewer tiles, so that they have at most that share of their tokens, but one
    tile at least.
    """

    side: int
    grid_side: int
    min_tiles: int
    max_tiles: int
    background: Color
    resample: Filter = "bicubic"
    retention: float = 1.0
    axes: int = 1
    fixed: int | None = None
    tiled: bool = True

    def __post_init__(self) -> None:
        check_side(self.side)
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise ValueError(
                f"model.max_tiles must be at least {max(1, self.min_tiles)}, the fewest tiles of a picture, "
                f"got {self.max_tiles}"
            )

    @property
    def num_tokens(self) -> int:
        """Tokens of one tile."""
        return self.grid_side**2

    @property
    def most_visual(self) -> int:
        return self.num_tokens * num_crops(self._most_tiles)

    @property
    def most_bytes(self) -> int:
        return 3 * self.side**2 * num_crops(self._most_tiles)

    @property
    def _most_tiles(self) -> int:
        """Tiles of the picture that has most of them."""
        return self.max_tiles if self.retention == 1 else self._fewer(self.max_tiles)

    def frame(self, size: Size) -> Frame:
        if min(size) * self.side < max(size):  # this check also bounds the memory of resizing
            raise ValueError(f"{size[1]} x {size[0]} is thinner than one pixel at {self.side} x {self.side}")
        rows, columns = self.tiles(size)
        height, width = rows * self.side, columns * self.side
        if rows * columns == 1:
            return Frame(height, width, "stretch", self.resample)
        return Frame(height, width, "stretch", self.resample, tile=self.side, overview="last")

    def tiles(self, size: Size) -> tuple[int, int]:
        """The rows and columns of tiles of a picture."""
        rows, columns = best_tiles(size, self.side, self.min_tiles, self.max_tiles)
        if self.retention == 1:
            return rows, columns
        # A larger limit never means fewer tiles: only grids of more tiles join those to choose from.
        limit = self._fewer(rows * columns)
        return best_tiles(size, self.side, min(self.min_tiles, limit), limit)

    def _fewer(self, tiles: int) -> int:
        """The most tiles with at most the tokens that `retention` keeps of those of `tiles`; 1 at least."""
        crops = num_kept(self.retention, self.num_tokens * num_crops(tiles)) // self.num_tokens
        return max(1, crops - 1)  # one of the crops is the overview

    def num_visual(self, size: Size, way: Way = "joint") -> int:
        rows, columns = self.tiles(size)
        return self.num_tokens * num_crops(rows * columns)

    def grid(self, size: Size) -> tuple[int, int]:
        return self.grid_side, self.grid_side

    def span(self, size: Size, kept: np.ndarray, image_token: int) -> Span:
        return line_span(np.full(len(kept), image_token))

    def shrunk(self, retention: float) -> "StretchedTiles":
        num_kept(retention, 1)  # checks the bounds
        return replace(self, retention=retention)


def num_crops(tiles: int) -> int:
    """Pictures that the tower reads: the tiles and, if there are several, the overview."""
    return tiles + 1 if tiles > 1 else 1


def best_tiles(size: Size, side: int, least: int, most: int) -> tuple[int, int]:
    """The rows and columns of tiles of a picture: the rule of the model's own image processor.

    Of all grids of `least` to `most` tiles, those count whose width : height is nearest to the picture's. Of several,
    the last one counts that has less than twice the picture's area, in the order of their numbers of tiles and then of
    columns; if none has, the first.
    """
    height, width = size
    grids = [
        (rows, columns)
        for rows in range(1, most + 1)
        for columns in range(1, most // rows + 1)
        if rows * columns >= least
    ]
    grids.sort(key=lambda grid: (grid[0] * grid[1], grid[1]))
    differences = [abs(width / height - columns / rows) for rows, columns in grids]
    least_difference = min(differences)
    nearest = [grid for grid, difference in zip(grids, differences, strict=True) if difference == least_difference]
    small = [grid for grid in nearest if grid[0] * grid[1] * side**2 < 2 * height * width]
    return small[-1] if small else nearest[0]


def read(config: Any, processor: ImageProcessor, options: Options) -> Facts:
    """The facts about an InternVL.

    Raises:
        ValueError: for options that do not fit tiles, a tower whose last layer's patches the projector does not read,
            a language model that has not been tried, or without an image processor.
    """
    check_stored(processor)
    check_tile_options(options)
    if config.vision_feature_layer != -1 or config.vision_feature_select_strategy != "default":
        raise ValueError(
            "vision_feature_layer and vision_feature_select_strategy must be -1 and 'default', got "
            f"{config.vision_feature_layer} and {config.vision_feature_select_strategy!r}"
        )
    if config.text_config.model_type not in DECODERS:
        raise ValueError(
            f"text_config.model_type must be one of {', '.join(DECODERS)}, got {config.text_config.model_type!r}"
        )
    vision, settings = vision_shape(config), processor.settings
    stored = settings.get("max_patches") or MOST_TILES
    most = stored if options.max_tiles is None else options.max_tiles
    geometry = StretchedTiles(
        side=vision.image_size,
        grid_side=vision.image_size // vision.patch_size // vision.merge,
        min_tiles=settings.get("min_patches") or 1,
        max_tiles=most,
        background=processor.color,
        resample=FILTERS.get(settings.get("resample"), "bicubic"),
    )
    check_stored_size(settings, vision.image_size)
    return Facts(
        geometry=geometry,
        options=Options(max_tiles=most),
        vision=vision,
        image_token=config.image_token_id,
    )


def check_tile_options(options: Options) -> None:
    """Raises ValueError for options that say how a picture becomes a square or how large it may be."""
    if options.aspect != "auto":
        raise ValueError(f"decode.aspect must be auto, as pictures are stretched to their tiles, got {options.aspect}")
    if options.max_pixels is not None or options.min_pixels is not None:
        raise ValueError("model.max_pixels and model.min_pixels must be null: model.max_tiles limits the tiles")


def check_stored_size(settings: Mapping[str, Any], side: int) -> None:
    """Raises ValueError if the image processor makes tiles of another size than the tower reads."""
    size = settings.get("size") or {}
    if size and (size.get("height"), size.get("width")) != (side, side):
        raise ValueError(f"the image processor's size must be the tower's {side} x {side}, got {dict(size)}")


def vision_shape(config: Any) -> VisionShape:
    """The tower, whose projector reads merge x merge patches as one.

    Raises:
        ValueError: if pictures, patches or what is merged are no squares.
    """
    vision, merge = config.vision_config, round(1 / config.downsample_ratio)
    (side, *_), (patch, *_) = vision.image_size, vision.patch_size
    if set(vision.image_size) != {side} or set(vision.patch_size) != {patch} or side % (patch * merge):
        raise ValueError(
            "vision_config must have square pictures that square patches and tokens fill, got image_size "
            f"{list(vision.image_size)}, patch_size {list(vision.patch_size)} and downsample_ratio "
            f"{config.downsample_ratio}"
        )
    return VisionShape(
        hidden=vision.hidden_size,
        intermediate=vision.intermediate_size,
        layers=vision.num_hidden_layers,
        image_size=side,
        patch_size=patch,
        merge=merge,
    )


def refuses(method: "Method", checkpoint: "Checkpoint", settings: Mapping[str, Any] | None = None) -> str | None:
    """Methods that look inside the language model or at a class token, or that make tokens of several."""
    title = checkpoint.record.title
    if method.inside_model:
        return f"method {method.name} looks inside the language model, which runs for LLaVA alone"
    if method.requires & {"keys", "class_attention"}:
        return f"method {method.name} reads the attention of a class token, which runs for LLaVA alone"
    if method.makes_tokens:
        return f"method {method.name} makes tokens of several, which has not been tried with {title}"
    if (settings or {}).get("relevance") == "clip":
        return f"settings.relevance of {method.name} must be words or none, as no CLIP has {title}'s tower"
    return None


def wrap(prompt: str, image_token: str) -> str:
    """A prompt with START and END around each image token.

    Chat templates of the family write the image token alone, and transformers' processor writes the two around it.
    """
    bare = prompt.replace(f"{START}{image_token}{END}", image_token)
    return bare.replace(image_token, f"{START}{image_token}{END}")


def load_encoder(checkpoint: "Checkpoint", **place: Any) -> "InternVLEncoder":
    """The vision tower and the projector."""
    from otprune.models import internvl  # imports torch

    return internvl.load(checkpoint, **place)


INTERNVL = Family(
    name="internvl",
    title="InternVL",
    architecture="InternVLForConditionalGeneration",
    read=read,
    load_encoder=load_encoder,
    load_language_model=load_language_model,
    retention=RETENTION,
    image_text=lambda image_token: wrap(image_token, image_token),
    finish_prompt=wrap,
    refuses=refuses,
)
