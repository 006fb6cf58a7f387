"""The second demo model: the architecture of Qwen2.5-VL with 3.8 million parameters.

Vision tower: patch 14, windows of 112 pixels, whole-picture attention in two of five layers, relative positions only.
Merger: 2 x 2 patches become one visual token. Qwen2 of width 192 with 5 layers, M-RoPE and tied embeddings. A
word-level tokenizer. Pictures of any size: one visual token for 28 x 28 pixels.

Shape suffixes: B pictures of one size, N visual tokens of each, D width, P = 4 N patches.
"""

from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import get_vision_window_index

from demo.gallery.labels import in_tower_order
from demo.gallery.language import words
from demo.gallery.world import CELL, PATCH

VISION_WIDTH, VISION_LAYERS, TEXT_WIDTH, TEXT_LAYERS, HEAD_WIDTH = 128, 5, 192, 5, 32
WHOLE_LAYERS = [2, 4]  # the others attend within windows
MIDDLE_LAYER = 1  # training predicts masks from its output
WINDOW = 112
MAX_NEW_TOKENS = 256  # the longest caption has 190 tokens
START, END, PICTURE_START, PICTURE_END, PICTURE = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
)
_SPECIAL = ["<|endoftext|>", START, END, PICTURE_START, PICTURE_END, PICTURE, "<|video_pad|>", "<unk>"]
_ROLES = ["system", "user", "assistant"]
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # Qwen2.5-VL's
_CHAT_TEMPLATE = (  # Qwen2.5-VL's without the default system prompt, whose words the demo does not know
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the closed vocabulary; case matters ("A" is an option, "a" an article)."""
    vocabulary = {word: number for number, word in enumerate([*_SPECIAL, *_ROLES, *words()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token=END,
        unk_token="<unk>",
        additional_special_tokens=_SPECIAL[1:-1],
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        chat_template=_CHAT_TEMPLATE,
    )


def build_image_processor() -> Qwen2VLImageProcessorPil:
    """Sides become multiples of 28; pictures of more than 1,008 visual tokens are made smaller."""
    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": 16 * CELL**2, "longest_edge": 1008 * CELL**2},
        patch_size=PATCH,
        merge_size=2,
        temporal_patch_size=2,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """A randomly initialised model, float32, on the CPU. The global generator of torch is not changed."""
    ids = tokenizer.get_vocab()
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": VISION_LAYERS,
            "hidden_size": VISION_WIDTH,
            "intermediate_size": 3 * VISION_WIDTH,
            "num_heads": VISION_WIDTH // HEAD_WIDTH,
            "patch_size": PATCH,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "window_size": WINDOW,
            "fullatt_block_indexes": WHOLE_LAYERS,
            "out_hidden_size": TEXT_WIDTH,
        },
        text_config={
            "vocab_size": -(-len(tokenizer) // 64) * 64,
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": 512,
            "num_hidden_layers": TEXT_LAYERS,
            "num_attention_heads": TEXT_WIDTH // HEAD_WIDTH,
            "num_key_value_heads": TEXT_WIDTH // HEAD_WIDTH,
            "max_position_embeddings": 2048,
            "initializer_range": 0.05,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0},
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": ids[END],
            "pad_token_id": ids["<|endoftext|>"],
        },
        tie_word_embeddings=True,
        image_token_id=ids[PICTURE],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids[PICTURE_START],
        vision_end_token_id=ids[PICTURE_END],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2_5_VLForConditionalGeneration(config)


def to_patches(images: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B * P, 3 * 2 * 14 * 14] as the image processor gives, without resizing."""
    normalised = (images.astype(np.float32) / 255 - np.float32(_MEAN)) / np.float32(_STD)
    patches = np.concatenate([in_tower_order(image, PATCH) for image in normalised])
    once = torch.from_numpy(np.ascontiguousarray(patches.transpose(0, 3, 1, 2))).to(device)
    return once[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1)  # a still picture is two equal frames


def encode(model: Qwen2_5_VLForConditionalGeneration, images: np.ndarray) -> tuple[Tensor, Tensor]:
    """Visual tokens [B, N, D of the text] of equal-sized pictures; the tower's states [B, P, D] after MIDDLE_LAYER."""
    tower = model.model.visual
    count, height, width = images.shape[:3]
    grid = torch.tensor([[1, height // PATCH, width // PATCH]] * count, device=model.device)
    middle: list[Tensor] = []
    hook = tower.blocks[MIDDLE_LAYER].register_forward_hook(lambda *call: middle.append(call[2]))
    try:
        tokens = tower(to_patches(images, model.device), grid_thw=grid).pooler_output
    finally:
        hook.remove()
    order, _ = get_vision_window_index(grid, spatial_merge_size=2, window_size=WINDOW, patch_size=PATCH)
    hidden = middle[0].view(len(order), 4, -1)[order.argsort()]
    return tokens.view(count, -1, tokens.shape[-1]), hidden.reshape(count, -1, hidden.shape[-1])


def export(model: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes a float16 checkpoint for transformers and vLLM. The model itself is moved to the CPU and converted."""
    model = model.cpu().half()
    settings = model.generation_config
    settings.do_sample, settings.max_new_tokens = False, MAX_NEW_TOKENS
    settings.pad_token_id, settings.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    build_image_processor().save_pretrained(folder)  # their common processor asks for torchvision, for films
