"""The model families that can caption, one record each; `family.py` defines the records.

To add a family, write one file with its record, then import the record here and list it in FAMILIES.
"""

from otprune.families.family import Facts, Family, ImageProcessor, Options, collect
from otprune.families.gemma3 import GEMMA3
from otprune.families.geometry import Frame, Geometry, Size, Span, Way, overview_tokens
from otprune.families.internvl import INTERNVL
from otprune.families.llava import LLAVA
from otprune.families.llava_next import LLAVA_NEXT
from otprune.families.llava_onevision import LLAVA_ONEVISION
from otprune.families.mistral3 import MISTRAL3
from otprune.families.qwen_vl import QWEN2_5_VL, QWEN3_5, QWEN3_5_MOE, QWEN3_VL, QWEN3_VL_MOE
from otprune.families.smolvlm import IDEFICS3, SMOLVLM

__all__ = [
    "FAMILIES",
    "Facts",
    "Family",
    "Frame",
    "Geometry",
    "ImageProcessor",
    "Options",
    "Size",
    "Span",
    "Way",
    "collect",
    "overview_tokens",
]

FAMILIES = collect(
    *(LLAVA, LLAVA_NEXT, LLAVA_ONEVISION, QWEN2_5_VL, QWEN3_VL, QWEN3_VL_MOE, QWEN3_5, QWEN3_5_MOE),
    *(INTERNVL, MISTRAL3, SMOLVLM, IDEFICS3, GEMMA3),
)
"""`model_type` -> family."""
