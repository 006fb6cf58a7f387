"""The record of a model family: everything that the rest of the program may ask about the family.

A family is the checkpoints of one `model_type`. Its file defines a `Geometry` and the record; the modules that compute
(`otprune.models`) are imported when a record is asked to load. To add a family, write one file with its record and list
the record in FAMILIES (`__init__.py`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from otprune.families.geometry import Color, Geometry
from otprune.shapes import PatchVisionShape, VisionShape

if TYPE_CHECKING:  # this imports torch
    from otprune.models.encoder import Encoder

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What a user may choose about the pictures of a model."""

    aspect: Literal["auto", "pad", "crop", "stretch"] = "auto"
    """How a picture becomes a square; auto follows the checkpoint."""
    max_pixels: int | None = None
    """Largest picture that the tower gets, in pixels; None: the family's default."""
    min_pixels: int | None = None
    """Smallest picture that the tower gets, in pixels; None: the checkpoint's own."""
    max_tiles: int | None = None
    """Tiles of the largest picture, without its overview; None: the checkpoint's own."""
    original_tiles: bool = False
    """Whether `image_grid_pinpoints` are (width, height), as LLaVA's own code reads them, or (height, width)."""


def _no_tokenizer() -> Any:
    raise ValueError("its folder must hold a tokenizer")


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageProcessor:
    """The settings of a checkpoint's image processor."""

    mean: tuple[float, ...]
    """Of each channel, for values in [0, 1]."""
    std: tuple[float, ...]
    settings: Mapping[str, Any]
    """All of its settings, as stored; {} if the checkpoint stores none."""
    tokenizer: Callable[[], Any] = _no_tokenizer
    """Opens transformers' tokenizer of the checkpoint, for the ids of text that stands among a picture's tokens.

    Raises ValueError if there is none."""

    @property
    def color(self) -> Color:
        """The mean as a colour: int(255 * mean), LLaVA's rule; (122, 116, 104) for CLIP's mean."""
        red, green, blue = (int(255 * mean) for mean in self.mean)
        return red, green, blue


def check_stored(processor: ImageProcessor) -> None:
    """Raises ValueError if the checkpoint stores no image processor. Checkpoints of one family differ in theirs."""
    if not processor.settings:
        raise ValueError("its folder must have a preprocessor_config.json, which says how pictures are normalised")


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What a family reads from a checkpoint's configuration."""

    geometry: Geometry
    options: Options
    """The options with the checkpoint's own values in place of `auto` and None."""
    vision: VisionShape | PatchVisionShape
    """The tower, up to the layer that the model reads."""
    image_token: int
    """Token id of a picture's placeholder."""
    levels: int = 0
    """DeepStack levels: the language model gets rows of (1 + levels) times its width, one after the other."""
    class_attention: bool = False
    """Whether the encoder can compute a class token's attention to the patches that the projector reads."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """A model family as the rest of the program sees it."""

    name: str
    """`model_type` in config.json."""
    title: str
    """The family's name for people."""
    architecture: str
    """The class of the whole model in transformers and vLLM."""
    read: Callable[[Any, ImageProcessor, Options], Facts]
    """(transformers' configuration, image processor, options) -> facts.

    Raises ValueError for a checkpoint of the family that cannot run here, or for options that do not fit it."""
    load_encoder: Callable[..., "Encoder"]
    """(Checkpoint, dtype=, device=, attention=) -> vision tower and projector."""
    load_language_model: Callable[..., Any]
    """(Checkpoint, dtype=, device=) -> a causal language model of transformers, or what acts like one."""
    retention: float = 0.098
    """The share of visual tokens to keep where the user names none."""
    image_text: Callable[[str], str] = lambda image_token: image_token
    """(text of the image token) -> what stands for a picture in a prompt without a chat template."""
    image_mark: str | None = None
    """What the family's chat templates write for a picture, in place of which `finish_prompt` writes the image token;
    None: the image token."""
    finish_prompt: Callable[[str, str], str] = lambda prompt, image_token: prompt
    """(prompt that a chat template has written, text of the image token) -> the prompt with what the family's processor
    adds to it around an image token."""
    both_ways: bool = False
    """Whether rows of one picture attend to each other in both directions. The language model then gets, with a prompt,
    `pictures`: the number of the picture that each row belongs to."""
    refuses_vllm: str | None = None
    """Why the family does not run in vLLM; None if it does."""
    refuses: Callable[..., str | None] = lambda method, checkpoint, settings=None: None
    """(Method, Checkpoint, settings of the method or None) -> why the method cannot run in this family; None if it
    can."""


def collect(*families: Family) -> dict[str, Family]:
    """The families by name.

    Raises:
        ValueError: if two families have the same name.
    """
    by_name = {family.name: family for family in families}
    if len(by_name) < len(families):
        raise ValueError(f"families must have different names, got {', '.join(family.name for family in families)}")
    return by_name
