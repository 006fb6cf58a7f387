"""Qwen2.5-VL, Qwen3-VL and Qwen3.5: a picture keeps its own shape, and 2 x 2 patches make one visual token.

A picture is stretched to a frame whose sides are multiples of a token's side, so that its tokens form a grid of `rows`
x `columns`. Positions have three axes, time, row and column: a token keeps those of its place in the grid when others
are pruned, and the text behind the picture stands where the whole picture would have put it.

In Qwen3-VL a token has several rows for the language model: one for the input and one for each DeepStack level.

Most layers of Qwen3.5 have linear attention, which keeps one state of fixed size: they go through the tokens in order,
whatever the positions say. Kept tokens stand one behind the other for them, as if the others had never been there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil, floor, log, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np

from otprune.families.family import Facts, Family, ImageProcessor, Options, check_stored
from otprune.families.geometry import Color, Frame, Size, Span, Way
from otprune.families.llava import check_no_tiles
from otprune.schedules import num_kept
from otprune.shapes import PatchVisionShape

if TYPE_CHECKING:  # these import torch
    from otprune.methods import Method
    from otprune.models.checkpoint import Checkpoint
    from otprune.models.qwen_vl import QwenEncoder

MOST_TOKENS = 1280
"""Visual tokens of the largest picture, unless the user asks for others or the checkpoint allows fewer. The released
checkpoints allow 16,384: a photo of 4000 x 3000 would have 15,301 tokens."""
RETENTION = 0.33
"""The share of visual tokens to keep by default.

These tokens are merged from 2 x 2 patches already and grow with the picture, so they are less redundant than LLaVA's:
at 10 % published methods keep 70 to 92 % of the accuracy, against about 95 % on LLaVA-1.5. A third is a cautious start
and not a measured optimum: `gate.min_quality` and a sweep decide for a corpus.
"""
THINNEST = 200
"""Largest ratio of a picture's sides that the models' own image processor takes."""
STORED_MIN, STORED_MAX = 56 * 56, 1280 * 28 * 28
"""Limits in pixels of a checkpoint that stores none, as transformers' image processor of both families has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patches:
    """The geometry of a model that sees pictures of any size, `token` x `token` pixels for each visual token.

    With `retention` below 1 the pictures are sent smaller, so that the tower makes about that share of their tokens.
    """

    token: int
    min_pixels: int
    max_pixels: int
    background: Color
    retention: float = 1.0
    axes: int = 3
    fixed: int | None = None
    tiled: bool = False

    @property
    def most_visual(self) -> int:
        """An upper bound for any shape of picture."""
        least, most = self.min_pixels / self.token**2, self.max_pixels / self.token**2
        # A frame of one row may exceed max_pixels, as it has at least one row. Of frames brought up to min_pixels, both
        # sides are rounded up: (sqrt(m / a) + 1) (sqrt(m a) + 1) tokens at an aspect ratio of a.
        one_row = floor(sqrt(THINNEST * most)) if most < THINNEST else 0
        rounded_up = floor((sqrt(least / THINNEST) + 1) * (sqrt(least * THINNEST) + 1))
        return num_kept(self.retention, max(floor(most), one_row, rounded_up))

    @property
    def most_bytes(self) -> int:
        return 3 * self.token**2 * self.most_visual

    def frame(self, size: Size) -> Frame:
        rows, columns = self.grid(size)
        return Frame(rows * self.token, columns * self.token, "stretch")

    def num_visual(self, size: Size, way: Way = "joint") -> int:
        rows, columns = self.grid(size)
        return rows * columns

    def grid(self, size: Size) -> tuple[int, int]:
        rows, columns = full_grid(size, self.token, self.min_pixels, self.max_pixels)
        return (rows, columns) if self.retention == 1 else smaller_grid(rows, columns, self.retention)

    def span(self, size: Size, kept: np.ndarray, image_token: int) -> Span:
        rows, columns = self.grid(size)
        if len(kept) and kept.min() < 0:
            raise ValueError("every kept token must have a place in the picture, got one of no single place (-1)")
        places = np.asarray(kept, np.int64)
        positions = np.stack([np.zeros_like(places), places // columns, places % columns])
        return Span(np.full(len(places), image_token, np.int64), positions, max(rows, columns))

    def shrunk(self, retention: float) -> "Patches":
        num_kept(retention, 1)  # checks the bounds
        return replace(self, retention=retention)


def full_grid(size: Size, token: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The rows and columns of tokens of a picture: the rule of the models' own image processor.

    Each side is rounded to the nearest multiple of `token` pixels. A frame of more than `max_pixels` or less than
    `min_pixels` is made anew: both sides are scaled by the same factor to exactly this limit, and rounded down or up.

    Raises:
        ValueError: if the picture is thinner than 1 : 200.
    """
    height, width = size
    if max(size) > THINNEST * min(size):
        raise ValueError(f"{width} x {height} is thinner than 1 : {THINNEST}, which the model does not take")
    rows, columns = round(height / token), round(width / token)
    if rows * columns * token**2 > max_pixels:
        shrink = sqrt(height * width / max_pixels)
        return max(1, floor(height / shrink / token)), max(1, floor(width / shrink / token))
    if rows * columns * token**2 < min_pixels:
        grow = sqrt(min_pixels / (height * width))
        return ceil(height * grow / token), ceil(width * grow / token)
    return rows, columns


def smaller_grid(rows: int, columns: int, retention: float) -> tuple[int, int]:
    """The grid of about the shape of rows x columns with at most the tokens that retention keeps (`grid_within`).

    Raises:
        ValueError: if retention is outside (0, 1].
    """
    return grid_within(rows, columns, num_kept(retention, rows * columns))


def grid_within(rows: int, columns: int, k: int) -> tuple[int, int]:
    """The grid of about the shape of rows x columns with at most k tokens; rows x columns itself if it fits.

    The ideal sides are sqrt(k rows / columns) and sqrt(k columns / rows). Each is rounded down or up, to 1 at least and
    k at most. Of the grids that do not exceed k tokens, the one with most of them counts; of several, the nearest in
    shape.
    """
    if rows * columns <= k:
        return rows, columns

    def sides(ideal: float) -> set[int]:
        return {min(max(1, side), k) for side in (floor(ideal), ceil(ideal))}

    def merit(grid: tuple[int, int]) -> tuple[int, float]:
        return grid[0] * grid[1], -abs(log(grid[0] * columns / (grid[1] * rows)))

    grids = [(r, c) for r in sides(sqrt(k * rows / columns)) for c in sides(sqrt(k * columns / rows)) if r * c <= k]
    return max(sorted(grids), key=merit)


def read(config: Any, processor: ImageProcessor, options: Options) -> Facts:
    """The facts about a Qwen2.5-VL, Qwen3-VL or Qwen3.5.

    Raises:
        ValueError: for an aspect other than auto, limits of pixels that no picture can meet, or without an image
            processor.
    """
    check_stored(processor)
    if options.aspect != "auto":
        raise ValueError(f"decode.aspect must be auto, as pictures keep their shape, got {options.aspect}")
    check_no_tiles(options)
    vision = config.vision_config
    token = vision.patch_size * vision.spatial_merge_size
    min_pixels, max_pixels = pixel_limits(processor.settings, options, token)
    levels = len(getattr(vision, "deepstack_visual_indexes", ()))
    return Facts(
        geometry=Patches(token=token, min_pixels=min_pixels, max_pixels=max_pixels, background=processor.color),
        options=Options(min_pixels=min_pixels, max_pixels=max_pixels),
        vision=PatchVisionShape.from_config(vision, mergers=1 + levels),
        image_token=config.image_token_id,
        levels=levels,
    )


def pixel_limits(settings: Mapping[str, Any], options: Options, token: int) -> tuple[int, int]:
    """(min_pixels, max_pixels) of a frame.

    An image processor stores them as `min_pixels` and `max_pixels`, or as the `shortest_edge` and `longest_edge` of
    `size`, which in spite of their names are numbers of pixels too. The former win, as in transformers.

    Raises:
        ValueError: if a limit is below one token, or the largest picture is below the smallest.
    """
    edges = settings.get("size") or {}
    stored_min = settings.get("min_pixels") or edges.get("shortest_edge") or STORED_MIN
    stored_max = settings.get("max_pixels") or edges.get("longest_edge") or STORED_MAX
    least = stored_min if options.min_pixels is None else options.min_pixels
    most = min(stored_max, MOST_TOKENS * token**2) if options.max_pixels is None else options.max_pixels
    if least < token**2:
        raise ValueError(
            f"model.min_pixels must be at least {token**2}, the {token} x {token} of one token, got {least}"
        )
    if most < least:
        raise ValueError(f"model.max_pixels must be at least model.min_pixels, {least} here, got {most}")
    return least, most


def refuses(method: "Method", checkpoint: "Checkpoint", settings: Mapping[str, Any] | None = None) -> str | None:
    """Methods that look inside the language model or at a class token, or whose tokens have no place of their own."""
    title = checkpoint.record.title
    if method.inside_model and checkpoint.language.linear is not None:
        return (
            f"method {method.name} works on the attention and the key-value cache of every layer, and {title} has "
            "layers with linear attention, which have neither"
        )
    if method.inside_model:
        return f"method {method.name} looks inside the language model, which runs for LLaVA alone"
    if method.requires & {"keys", "class_attention"}:
        return f"method {method.name} reads the attention of a class token, which {title}'s tower does not have"
    if method.makes_tokens:
        return f"method {method.name} makes tokens of several places, and {title} needs the place of each token"
    if (settings or {}).get("relevance") == "clip":
        return f"settings.relevance of {method.name} must be words or none, as no CLIP has {title}'s tower"
    return None


def load_encoder(checkpoint: "Checkpoint", **place: Any) -> "QwenEncoder":
    """The vision tower and its mergers."""
    from otprune.models import qwen_vl  # imports torch

    return qwen_vl.load(checkpoint, **place)


def load_language_model(checkpoint: "Checkpoint", **place: Any) -> Any:
    """The language model alone."""
    from otprune.models import qwen_vl  # imports torch

    return qwen_vl.load_language_model(checkpoint, **place)


def _family(name: str, title: str, architecture: str) -> Family:
    return Family(
        name=name,
        title=title,
        architecture=architecture,
        read=read,
        load_encoder=load_encoder,
        load_language_model=load_language_model,
        retention=RETENTION,
        image_text=lambda image_token: f"<|vision_start|>{image_token}<|vision_end|>",
        refuses=refuses,
    )


QWEN2_5_VL = _family("qwen2_5_vl", "Qwen2.5-VL", "Qwen2_5_VLForConditionalGeneration")
QWEN3_VL = _family("qwen3_vl", "Qwen3-VL", "Qwen3VLForConditionalGeneration")
QWEN3_VL_MOE = _family("qwen3_vl_moe", "Qwen3-VL with experts", "Qwen3VLMoeForConditionalGeneration")
QWEN3_5 = _family("qwen3_5", "Qwen3.5", "Qwen3_5ForConditionalGeneration")
QWEN3_5_MOE = _family("qwen3_5_moe", "Qwen3.5 with experts", "Qwen3_5MoeForConditionalGeneration")
