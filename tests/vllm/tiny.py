"""Tiny checkpoints with random weights of the architectures that take spans: the whole model and a tokenizer of words.

They have no image processor: the span plugin never asks for one.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

IMAGE, START, END, VIDEO = 4, 5, 6, 7  # token ids: a picture's placeholder, and what stands before and behind it
BREAK = 5  # of Mistral: behind each row of a picture but the last, which END ends
VOCABULARY = 200
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<start>", "<end>", "<video>"]

TEXT: dict[str, Any] = {  # vLLM's CPU build refuses heads of 16
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 1,
    "intermediate_size": 64,
    "patch_size": 14,
    "projection_dim": 32,
}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 1,
    "intermediate_size": 64,
    "patch_size": 14,
    "image_size": 56,
    "vision_use_head": False,
}
QWEN_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 64,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "tie_word_embeddings": False,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}


def rope(sections: list[int], **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections, **more}


def llava() -> torch.nn.Module:
    return LlavaForConditionalGeneration(
        LlavaConfig(
            text_config={**TEXT, "model_type": "llama"},
            vision_config={**CLIP, "image_size": 112},
            image_token_index=IMAGE,
            vision_feature_layer=-2,
            tie_word_embeddings=False,
        )
    )


def llava_next() -> torch.nn.Module:
    return LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            text_config={**TEXT, "model_type": "mistral", "sliding_window": None},
            vision_config={**CLIP, "image_size": 56},
            image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]],
            image_token_index=IMAGE,
            vision_feature_layer=-2,
            tie_word_embeddings=False,
        )
    )


def llava_onevision() -> torch.nn.Module:
    """The tokens of its four tiles are scaled down to those of two."""
    text = {key: value for key, value in TEXT.items() if key != "head_dim"}
    return LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            text_config={**text, "model_type": "qwen2"},
            vision_config=SIGLIP,
            image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]],
            vision_aspect_ratio="anyres_max_2",
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            tie_word_embeddings=False,
        )
    )


def qwen2_5_vl() -> torch.nn.Module:
    tower = {**QWEN_TOWER, "depth": 2, "patch_size": 14, "window_size": 112, "fullatt_block_indexes": [1]}
    text = {key: value for key, value in TEXT.items() if key != "head_dim"}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config={**text, "rope_parameters": rope([4, 6, 6])}, vision_config=tower, **QWEN_TOKENS)
    )


def qwen3_tower() -> dict[str, Any]:
    return {
        **QWEN_TOWER,
        "depth": 3,
        "patch_size": 16,
        "num_position_embeddings": 256,
        "deepstack_visual_indexes": [0, 1],
    }


def qwen3_vl() -> torch.nn.Module:
    text = {**TEXT, "rope_parameters": rope([6, 5, 5], mrope_interleaved=True)}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=qwen3_tower(), **QWEN_TOKENS))


def qwen3_vl_moe() -> torch.nn.Module:
    text = {**TEXT, **EXPERTS, "rope_parameters": rope([6, 5, 5], mrope_interleaved=True)}
    return Qwen3VLMoeForConditionalGeneration(
        Qwen3VLMoeConfig(text_config=text, vision_config=qwen3_tower(), **QWEN_TOKENS)
    )


def qwen3_5() -> torch.nn.Module:
    """Half of the layers have linear attention, whose heads must be 128 wide in vLLM's CPU build."""
    linear = {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
    linear |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    text = {
        **TEXT,
        **linear,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "rope_parameters": rope([3, 3, 2], mrope_interleaved=True, partial_rotary_factor=0.5),
    }
    tower = {**QWEN_TOWER, "depth": 2, "patch_size": 16, "num_position_embeddings": 256}
    return Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=tower, **QWEN_TOKENS))


def internvl() -> torch.nn.Module:
    text = {key: value for key, value in TEXT.items() if key != "head_dim"}
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1}
    return InternVLForConditionalGeneration(
        InternVLConfig(
            text_config={**text, "model_type": "qwen2"},
            vision_config={**tower, "model_type": "internvl_vision", "image_size": [56, 56], "patch_size": [14, 14]},
            image_token_id=IMAGE,
            image_seq_length=4,
            tie_word_embeddings=False,
        )
    )


def mistral3() -> torch.nn.Module:
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return Mistral3ForConditionalGeneration(
        Mistral3Config(
            text_config={**TEXT, "model_type": "mistral", "sliding_window": None},
            vision_config={**tower, "model_type": "pixtral", "image_size": 280, "patch_size": 14},
            image_token_index=IMAGE,
            tie_word_embeddings=False,
        )
    )


def smolvlm() -> torch.nn.Module:
    return SmolVLMForConditionalGeneration(SmolVLMConfig(**idefics3_parts("smolvlm_vision")))


def idefics3() -> torch.nn.Module:
    return Idefics3ForConditionalGeneration(Idefics3Config(**idefics3_parts("idefics3_vision")))


def idefics3_parts(tower: str) -> dict[str, Any]:
    vision = {name: SIGLIP[name] for name in ("hidden_size", "num_attention_heads", "intermediate_size", "image_size")}
    return {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**vision, "model_type": tower, "num_hidden_layers": 2, "patch_size": 14},
        "scale_factor": 2,
        "image_token_id": IMAGE,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }


FAMILIES: dict[str, Callable[[], torch.nn.Module]] = {
    build.__name__: build
    for build in (
        *(llava, llava_next, llava_onevision, qwen2_5_vl, qwen3_vl, qwen3_vl_moe),
        *(internvl, mistral3, smolvlm, idefics3),
    )
}


HYBRID: dict[str, Callable[[], torch.nn.Module]] = {"qwen3_5": qwen3_5}
"""Families with linear attention, which vLLM's CPU build runs in bfloat16 alone."""


def make(family: str, folder: Path) -> Any:
    """Writes a checkpoint of the family and returns its model, float32, in `eval` mode.

    The weights of a hybrid family are bfloat16 numbers, so that an engine in bfloat16 has the same.
    """
    model: Any = (FAMILIES | HYBRID)[family]().float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if name.endswith("A_log"):
                weight.copy_(0.1 * noise - 4)  # linear attention then forgets about 1 % of its state with each token
            elif weight.dim() == 1:
                weight.copy_(("norm" in name and name.endswith("weight")) + 0.05 * noise)
            else:  # wider than usual, so that each token counts in the answer
                weight.copy_(noise * (1 if "embed" in name else 2 / weight[0].numel() ** 0.5))
            if family in HYBRID:
                weight.copy_(weight.bfloat16())
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    transpose_experts(folder / "model.safetensors")
    words = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), VOCABULARY))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    special = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=False))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return model


def transpose_experts(file: Path) -> None:
    """Stores experts as released checkpoints do, [experts, in, out]; a model made here is saved [experts, out, in]."""
    weights = load_file(file)
    if experts := [name for name in weights if ".experts." in name]:
        save_file(weights | {name: weights[name].mT.contiguous() for name in experts}, file, {"format": "pt"})
