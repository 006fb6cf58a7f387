"""LLaVA-OneVision: tiles as LLaVA-1.6's, of which there may be many more, and their tokens are scaled down together.

A picture gets up to 6 x 6 tiles. The grid of their tokens, without the padding, is scaled down bilinearly to about
those of nine tiles (`vision_aspect_ratio` "anyres_max_9") before each row gets its newline token. SigLIP's tower gives
729 tokens a tile, so a picture has up to 8,829 (`Tiled.most_visual`).

Departures:
- Each picture of a prompt with several is cut into tiles, as transformers does with a flat list of pictures. The model
  was trained on prompts with several pictures of one overview each, 729 tokens and a newline token.
- A method that chooses in each tile by itself chooses among the tiles' own tokens, which are not scaled down: they are
  more than the model would get of a large picture, and so are those that a share of them leaves.
"""

import re
from typing import Any

from otprune.families.family import Facts, Family, ImageProcessor, Options
from otprune.families.llava import load_encoder, load_language_model
from otprune.families.llava_next import read_tiled, refuses


def read(config: Any, processor: ImageProcessor, options: Options) -> Facts:
    """The facts about a LLaVA-OneVision.

    Raises:
        ValueError: as `read_tiled`, or for another `vision_aspect_ratio` than anyres_max_<tiles>.
    """
    wanted = re.fullmatch(r"anyres_max_([1-9]\d*)", str(config.vision_aspect_ratio))
    if not wanted:
        raise ValueError(
            f"vision_aspect_ratio must be anyres_max_ and a number of tiles, got {config.vision_aspect_ratio!r}"
        )
    return read_tiled(config, processor, options, most_tiles=int(wanted[1]))


LLAVA_ONEVISION = Family(
    name="llava_onevision",
    title="LLaVA-OneVision",
    architecture="LlavaOnevisionForConditionalGeneration",
    read=read,
    load_encoder=load_encoder,
    load_language_model=load_language_model,
    refuses=refuses,
)
