"""The sizes of the released checkpoints that conf/ names, as their config.json and image processor state them.

Only what the geometry of pictures and the multiply-adds depend on; transformers' defaults fill in the rest.
"""

from dataclasses import dataclass, field
from typing import Any

CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip
SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
    "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
}  # fmt: skip
VICUNA_7B = {
    "model_type": "llama", "vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32,
}  # fmt: skip
LLAMA_3_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
QWEN_7B = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4,
}  # fmt: skip
ANYRES_336 = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
ANYRES_384 = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
CLIP_PROCESSOR = {"image_processor_type": "CLIPImageProcessor", "do_center_crop": True}


@dataclass(frozen=True)
class Released:
    """One released checkpoint."""

    name: str  # of its hub repository, as in the configuration
    conf: str  # configuration under conf/ that names it
    config: dict[str, Any]
    processor: dict[str, Any] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)  # texts whose ids its configuration states too


RELEASED = (
    Released(
        "llava-hf/llava-1.5-7b-hf",
        "llava15_7b",
        {
            "model_type": "llava", "text_config": VICUNA_7B, "vision_config": CLIP, "image_token_index": 32000,
            "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
        },
        CLIP_PROCESSOR,
    ),
    Released(
        "fancyfeast/llama-joycaption-beta-one-hf-llava",
        "joycaption",
        {
            "model_type": "llava", "text_config": LLAMA_3_8B, "vision_config": SIGLIP, "image_token_index": 128077,
            "vision_feature_layer": -2, "vision_feature_select_strategy": "full",
        },
        {"image_processor_type": "SiglipImageProcessor"},
    ),
    Released(
        "llava-hf/llava-v1.6-vicuna-7b-hf",
        "llava16_7b",
        {
            "model_type": "llava_next", "text_config": VICUNA_7B, "vision_config": CLIP, "image_token_index": 32000,
            "image_grid_pinpoints": ANYRES_336, "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
        },
    ),
    Released(
        "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        "llava_onevision_7b",
        {
            "model_type": "llava_onevision",
            "text_config": {**QWEN_7B, "model_type": "qwen2", "vocab_size": 152000},
            "vision_config": {**SIGLIP, "num_hidden_layers": 26}, "image_token_index": 151646,
            "image_grid_pinpoints": ANYRES_384, "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_9",
        },
    ),
    Released(
        "Qwen/Qwen2.5-VL-7B-Instruct",
        "qwen25_vl_7b",
        {
            "model_type": "qwen2_5_vl", "text_config": {**QWEN_7B, "vocab_size": 152064}, "image_token_id": 151655,
            "vision_config": {
                "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
                "patch_size": 14, "spatial_merge_size": 2, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
            },
        },
        {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "merge_size": 2},
    ),
    Released(
        "Qwen/Qwen3-VL-8B-Instruct",
        "qwen3_vl_8b",
        {
            "model_type": "qwen3_vl", "image_token_id": 151655,
            "text_config": {
                "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
                "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            },
            "vision_config": {
                "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 4096,
                "patch_size": 16, "spatial_merge_size": 2, "num_position_embeddings": 2304,
                "deepstack_visual_indexes": [8, 16, 24],
            },
        },
        {"size": {"shortest_edge": 65536, "longest_edge": 16777216}, "patch_size": 16, "merge_size": 2},
    ),
    Released(
        "OpenGVLab/InternVL3-8B-hf",
        "internvl3_8b",
        {
            "model_type": "internvl", "text_config": {**QWEN_7B, "model_type": "qwen2", "vocab_size": 151674},
            "image_token_id": 151667, "downsample_ratio": 0.5, "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default",
            "vision_config": {
                "model_type": "internvl_vision", "hidden_size": 1024, "intermediate_size": 4096,
                "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": [448, 448], "patch_size": [14, 14],
            },
        },
        {"size": {"height": 448, "width": 448}, "min_patches": 1, "max_patches": 12},
    ),
    Released(
        "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
        "mistral_small_24b",
        {
            "model_type": "mistral3", "image_token_index": 10, "vision_feature_layer": -1, "spatial_merge_size": 2,
            "text_config": {
                "model_type": "mistral", "vocab_size": 131072, "hidden_size": 5120, "intermediate_size": 32768,
                "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            },
            "vision_config": {
                "model_type": "pixtral", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                "num_attention_heads": 16, "image_size": 1540, "patch_size": 14,
            },
        },
        {"size": {"longest_edge": 1540}, "patch_size": 14},
    ),
    Released(
        "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
        "smolvlm2_2b",
        {
            "model_type": "smolvlm", "image_token_id": 49190, "scale_factor": 3,
            "text_config": {
                "model_type": "llama", "vocab_size": 49280, "hidden_size": 2048, "intermediate_size": 8192,
                "num_hidden_layers": 24, "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 64,
            },
            "vision_config": {
                "model_type": "smolvlm_vision", "hidden_size": 1152, "intermediate_size": 4304,
                "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
            },
        },
        {"size": {"longest_edge": 1536}, "max_image_size": {"longest_edge": 384}},
    ),
    Released(
        "Qwen/Qwen3.5-0.8B",
        "qwen35_08b",
        {
            "model_type": "qwen3_5", "image_token_id": 248056,
            "text_config": {
                "vocab_size": 248320, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 24,
                "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256, "linear_num_key_heads": 16,
                "linear_num_value_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
            },
            "vision_config": {
                "depth": 12, "hidden_size": 768, "intermediate_size": 3072, "num_heads": 12, "out_hidden_size": 1024,
                "patch_size": 16, "spatial_merge_size": 2, "num_position_embeddings": 2304,
            },
        },
        {"size": {"shortest_edge": 65536, "longest_edge": 16777216}, "patch_size": 16, "merge_size": 2},
    ),
    Released(
        "google/gemma-3-4b-it",
        "gemma3_4b",
        {
            "model_type": "gemma3", "image_token_index": 262144, "mm_tokens_per_image": 256,
            "text_config": {
                "model_type": "gemma3_text", "vocab_size": 262208, "hidden_size": 2560, "intermediate_size": 10240,
                "num_hidden_layers": 34, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
            },
            "vision_config": {**SIGLIP, "image_size": 896, "vision_use_head": False},
        },
        {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 896, "width": 896}},
        {"<start_of_image>": 255999, "<end_of_image>": 256000},
    ),
)  # fmt: skip
"""In the order of README's table."""
