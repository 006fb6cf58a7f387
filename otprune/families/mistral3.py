"""Mistral-Small-3.1 and 3.2: a picture keeps its own shape, and each row of its visual tokens has an end, a text token.

A picture whose longest side exceeds the model's is scaled down to it. Then both sides are stretched to multiples of a
token's side, so that tokens form a grid of `rows` x `columns`; 2 x 2 patches make one token. In the prompt, the tokens
of a row are [IMG], and behind each row stands [IMG_BREAK], behind the last one [IMG_END] in its place. The language
model counts all of these along one axis.

When tokens are pruned, the span is what the model knows as a picture of the rows that keep a token: [IMG_BREAK] behind
each of them, [IMG_END] behind the last. A row without kept tokens loses its [IMG_BREAK]. Why:

- Behind a row that keeps tokens, [IMG_BREAK] is all that tells the language model where the row ends: positions count
  on one axis and say nothing about rows. Without it, tokens of different rows would run together as one row.
- [IMG_BREAK] of an empty row would end nothing. Two of them in a row, and [IMG_BREAK] before [IMG_END], are in no
  picture that the model was trained on, and each would cost a row of the language model that holds no pixel.
- The gap in height that an empty row leaves is lost to the positions, as gaps between kept tokens are in every model
  with one axis. The tower's rotary positions still are in the tokens themselves.

So K kept tokens take K ids and one more for each row that keeps any: 342 and at most 28 of a photograph of 1024 x 768
pixels.

Departures:
- Pictures have at most `MOST_TOKENS` tokens unless the user says otherwise. transformers' image processor limits the
  longest side alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import floor
from typing import TYPE_CHECKING, Any

import numpy as np

from otprune.families.family import Facts, Family, ImageProcessor, Options
from otprune.families.geometry import Color, Filter, Frame, Size, Span, Way, line_span
from otprune.families.llava import FILTERS, check_no_tiles, load_language_model
from otprune.families.qwen_vl import grid_within, refuses, smaller_grid
from otprune.schedules import num_kept
from otprune.shapes import PatchVisionShape

if TYPE_CHECKING:  # these import torch
    from otprune.models.checkpoint import Checkpoint
    from otprune.models.mistral3 import PixtralEncoder

MOST_TOKENS = 1280
"""Visual tokens of the largest picture, unless the user asks for others. With a longest side of 1540 pixels alone, a
photo of 4000 x 3000 would have 2,310, and a square one 3,025."""
RETENTION = 0.33
"""The share of visual tokens to keep by default: Qwen's, and as there a cautious start and not a measured optimum.

These tokens too are merged from 2 x 2 patches of 14 pixels and grow with the picture, which is never enlarged: a
photograph has about as many of them as with Qwen2.5-VL. `gate.min_quality` and a sweep decide for a corpus.
"""
STORED_LONGEST = 1024
"""Longest side in pixels of a checkpoint that stores none, as transformers' image processor has it."""
BREAK, END = "[IMG_BREAK]", "[IMG_END]"
"""What stands behind a row of tokens, and behind the last one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchRows:
    """The geometry of a model whose pictures are rows of tokens, `token` x `token` pixels each, with an end each.

    With `retention` below 1 the pictures are sent smaller, so that the tower makes about that share of their tokens.
    """

    token: int
    longest: int
    """Longest side of a picture, in pixels."""
    max_pixels: int
    row_break: int
    """Token id behind each row but the last."""
    end: int
    """Token id behind the last row."""
    background: Color
    resample: Filter = "bicubic"
    retention: float = 1.0
    axes: int = 1
    fixed: int | None = None
    tiled: bool = False

    @property
    def most_visual(self) -> int:
        most = min(_tokens(self.longest, self.token) ** 2, self.max_pixels // self.token**2)
        return num_kept(self.retention, most)

    @property
    def most_bytes(self) -> int:
        return 3 * self.token**2 * self.most_visual

    def frame(self, size: Size) -> Frame:
        rows, columns = self.grid(size)
        return Frame(rows * self.token, columns * self.token, "stretch", self.resample)

    def num_visual(self, size: Size, way: Way = "joint") -> int:
        rows, columns = self.grid(size)
        return rows * columns

    def grid(self, size: Size) -> tuple[int, int]:
        rows, columns = full_grid(size, self.token, self.longest)
        rows, columns = grid_within(rows, columns, self.max_pixels // self.token**2)
        return (rows, columns) if self.retention == 1 else smaller_grid(rows, columns, self.retention)

    def span(self, size: Size, kept: np.ndarray, image_token: int) -> Span:
        """As of `Geometry`: the kept tokens, `row_break` behind each row that keeps any, `end` behind the last."""
        if len(kept) and kept.min() < 0:
            raise ValueError("every kept token must have a place in the picture, got one of no single place (-1)")
        _, columns = self.grid(size)
        row = np.asarray(kept, np.int64) // columns
        next_row = np.flatnonzero(np.diff(row)) + 1  # index of the first kept token of each row but the first
        tokens = np.insert(np.full(len(row), image_token, np.int64), next_row, self.row_break)
        return line_span(np.append(tokens, self.end))

    def shrunk(self, retention: float) -> "PatchRows":
        num_kept(retention, 1)  # checks the bounds
        return replace(self, retention=retention)


def full_grid(size: Size, token: int, longest: int) -> tuple[int, int]:
    """The rows and columns of tokens of a picture: the rule of the model's own image processor.

    A picture with a side above `longest` pixels is scaled down to it, its sides rounded down. Then each side is rounded
    up to a multiple of `token` pixels.

    Raises:
        ValueError: if the picture is so thin that nothing is left of its shorter side.
    """
    height, width = size
    ratio = max(height / longest, width / longest)
    if ratio > 1:
        height, width = floor(height / ratio), floor(width / ratio)
    if min(height, width) < 1:
        raise ValueError(f"{size[1]} x {size[0]} is thinner than one pixel at {longest} pixels of the longest side")
    return _tokens(height, token), _tokens(width, token)


def _tokens(side: int, token: int) -> int:
    """Tokens along a side of `side` pixels."""
    return (side - 1) // token + 1


def read(config: Any, processor: ImageProcessor, options: Options) -> Facts:
    """The facts about a Mistral-Small-3.1 or 3.2.

    Raises:
        ValueError: for options that do not fit pictures of free size that are never enlarged, a tower other than
            Pixtral's or not read at its end, a language model that has not been tried, or a tokenizer without the ends
            of rows.
    """
    if options.aspect != "auto":
        raise ValueError(f"decode.aspect must be auto, as pictures keep their shape, got {options.aspect}")
    check_no_tiles(options)
    if options.min_pixels is not None:
        raise ValueError(f"model.min_pixels must be null, as pictures are never enlarged, got {options.min_pixels}")
    for part, expected in (("vision", "pixtral"), ("text", "mistral")):
        kind = getattr(config, f"{part}_config").model_type
        if kind != expected:
            raise ValueError(f"{part}_config.model_type must be {expected}, got {kind!r}")
    if config.vision_feature_layer != -1:
        raise ValueError(f"vision_feature_layer must be -1, the tower's last, got {config.vision_feature_layer}")
    vision = vision_shape(config)
    token = vision.patch_size * vision.merge
    most = MOST_TOKENS * token**2 if options.max_pixels is None else options.max_pixels
    if most < token**2:
        raise ValueError(
            f"model.max_pixels must be at least {token**2}, the {token} x {token} of one token, got {most}"
        )
    row_break, end = token_ids(processor.tokenizer(), BREAK, END)
    geometry = PatchRows(
        token=token,
        longest=longest_side(processor.settings),
        max_pixels=most,
        row_break=row_break,
        end=end,
        background=processor.color,
        resample=FILTERS.get(processor.settings.get("resample"), "bicubic"),
    )
    return Facts(
        geometry=geometry,
        options=Options(max_pixels=most),
        vision=vision,
        image_token=config.image_token_index,
    )


def token_ids(tokenizer: Any, *texts: str) -> list[int]:
    """The ids of texts that are one token each.

    Raises:
        ValueError: if the tokenizer has no token for one of them.
    """
    ids = tokenizer.convert_tokens_to_ids(list(texts))
    # Of a text without a token, the id is that of the unknown token, or None.
    missing = [
        text for text, i in zip(texts, ids, strict=True) if i is None or tokenizer.convert_ids_to_tokens(i) != text
    ]
    if missing:
        raise ValueError(f"its tokenizer must have the tokens {', '.join(texts)}, found none for {', '.join(missing)}")
    return ids


def longest_side(settings: Mapping[str, Any]) -> int:
    """The longest side of a picture, in pixels.

    Raises:
        ValueError: if the image processor stores another kind of size.
    """
    size = settings.get("size") or {"longest_edge": STORED_LONGEST}
    longest = size.get("longest_edge") if isinstance(size, Mapping) else None
    if not isinstance(longest, int) or longest < 1:
        raise ValueError(f"the image processor's size must hold a longest_edge of at least 1 pixel, got {size}")
    return longest


def vision_shape(config: Any) -> PatchVisionShape:
    """The tower, and the projector that brings merged patches to the tower's width, and then to the language model's.

    Raises:
        ValueError: if patches are no squares.
    """
    vision, width = config.vision_config, config.text_config.hidden_size
    if not isinstance(vision.patch_size, int):
        raise ValueError(f"vision_config.patch_size must be one number, got {vision.patch_size}")
    return PatchVisionShape(
        hidden=vision.hidden_size,
        intermediate=vision.intermediate_size,
        layers=vision.num_hidden_layers,
        ffn_matrices=3,
        patch_size=vision.patch_size,
        frames=1,
        merge=config.spatial_merge_size,
        out=width,
        inner=(vision.hidden_size, width),
    )


def load_encoder(checkpoint: "Checkpoint", **place: Any) -> "PixtralEncoder":
    """The vision tower and the projector."""
    from otprune.models import mistral3  # imports torch

    return mistral3.load(checkpoint, **place)


MISTRAL3 = Family(
    name="mistral3",
    title="Mistral-Small-3",
    architecture="Mistral3ForConditionalGeneration",
    read=read,
    load_encoder=load_encoder,
    load_language_model=load_language_model,
    retention=RETENTION,
    refuses=refuses,
)
