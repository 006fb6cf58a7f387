"""Gemma 3 (4B, 12B, 27B): every picture is one square of 256 tokens, which see each other in both directions.

A picture is stretched to the tower's square, 896 x 896 pixels. The tower, SigLIP, makes 64 x 64 patches of it, and the
projector the mean of each 4 x 4 of them. The language model reads a prompt causally, but the tokens of one picture
attend to each other in both directions. Most of its layers see a window of earlier tokens alone.

After pruning, the kept tokens of a picture stand one behind the other, as LLaVA's do: they count as positions and in
the windows, the pruned ones do not, and the kept ones of a picture attend to each other in both directions.

Pan-and-scan, the crops of long pictures that the processor can cut, is off, as in the released checkpoints.
"""

from typing import TYPE_CHECKING, Any

from otprune.families.family import Facts, Family, ImageProcessor, Options, check_stored
from otprune.families.internvl import check_stored_size, refuses
from otprune.families.llava import FILTERS, Square, check_fixed_size
from otprune.families.mistral3 import token_ids
from otprune.shapes import VisionShape

if TYPE_CHECKING:  # these import torch
    from otprune.models.checkpoint import Checkpoint
    from otprune.models.internvl import InternVLEncoder

START, END = "<start_of_image>", "<end_of_image>"
"""What stands before and behind the tokens of a picture."""
RETENTION = 0.5
"""The share of visual tokens to keep by default: a cautious start and not a measured optimum.

A token is the mean of 16 patches already, and no picture has more than 256. `gate.min_quality` and a sweep decide for a
corpus.
"""


def read(config: Any, processor: ImageProcessor, options: Options) -> Facts:
    """The facts about a Gemma 3.

    Raises:
        ValueError: for options that do not fit a square, an image processor that cuts crops, another kind of tower or
            language model, or tokens that do not fit the configuration.
    """
    check_stored(processor)
    check_fixed_size(options)
    if options.aspect not in ("auto", "stretch"):
        raise ValueError(f"decode.aspect must be auto or stretch, as the model was trained, got {options.aspect}")
    settings, text = processor.settings, config.text_config
    if settings.get("do_pan_and_scan"):
        raise ValueError("the image processor's do_pan_and_scan must be false or null: its crops do not run here")
    if text.use_bidirectional_attention:
        raise ValueError("text_config.use_bidirectional_attention must be false, as in models that generate text")
    ids = {START: config.boi_token_index, END: config.eoi_token_index}
    stored = dict(zip(ids, token_ids(processor.tokenizer(), *ids), strict=True))
    if stored != ids:
        raise ValueError(f"the tokenizer's ids must be the configuration's {ids}, got {stored}")
    if config.image_token_index >= text.vocab_size:
        raise ValueError(
            f"image_token_index must be below the {text.vocab_size} of text_config.vocab_size, "
            f"got {config.image_token_index}"
        )
    vision = vision_shape(config)
    check_stored_size(settings, vision.image_size)
    geometry = Square(
        side=vision.image_size,
        num_tokens=vision.num_tokens,
        background=processor.color,
        fit="stretch",
        resample=FILTERS.get(settings.get("resample"), "bilinear"),
    )
    return Facts(
        geometry=geometry,
        options=Options(aspect="stretch"),
        vision=vision,
        image_token=config.image_token_index,
    )


def vision_shape(config: Any) -> VisionShape:
    """The tower, and the projector: the mean of merge x merge patches, and one matrix.

    Raises:
        ValueError: if the tower is not SigLIP's, or the tokens form no square that divides the patches.
    """
    vision = config.vision_config
    if vision.model_type != "siglip_vision_model":
        raise ValueError(f"vision_config.model_type must be siglip_vision_model, got {vision.model_type!r}")
    patches, tokens = vision.image_size // vision.patch_size, config.mm_tokens_per_image
    side = round(tokens**0.5)
    if side**2 != tokens or not side or patches % side:
        raise ValueError(
            f"mm_tokens_per_image must be a square whose side divides the {patches} patches of a row, got {tokens}"
        )
    return VisionShape(
        hidden=vision.hidden_size,
        intermediate=vision.intermediate_size,
        layers=vision.num_hidden_layers,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        class_tokens=0,
        merge=patches // side,
        averaged=True,
        projector_matrices=1,
    )


def wrap(prompt: str, image_token: str) -> str:
    """A prompt with what transformers' processor writes for each START: blank lines, START, the image token, END."""
    return prompt.replace(START, f"\n\n{START}{image_token}{END}\n\n")


def load_encoder(checkpoint: "Checkpoint", **place: Any) -> "InternVLEncoder":
    """The vision tower and the projector."""
    from otprune.models import gemma3  # imports torch

    return gemma3.load(checkpoint, **place)


def load_language_model(checkpoint: "Checkpoint", **place: Any) -> Any:
    """The language model, which takes the places of pictures for its masks."""
    from otprune.models import gemma3  # imports torch

    return gemma3.load_language_model(checkpoint, **place)


GEMMA3 = Family(
    name="gemma3",
    title="Gemma 3",
    architecture="Gemma3ForConditionalGeneration",
    read=read,
    load_encoder=load_encoder,
    load_language_model=load_language_model,
    retention=RETENTION,
    image_mark=START,
    finish_prompt=wrap,
    both_ways=True,
    refuses=refuses,
    refuses_vllm="Gemma 3 has not been compared with transformers on a GPU, and vLLM on a CPU reads pictures causally",
)
