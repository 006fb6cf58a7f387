"""A LLaVA checkpoint of any shape with random weights, for measuring speed and memory, which values do not change."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

TOKENIZER = Path(__file__).resolve().parent.parent / "demo" / "checkpoint"


def make_checkpoint(
    folder: Path,
    *,
    image_size: int = 336,
    vision_width: int = 64,
    vision_layers: int = 2,
    width: int = 64,
    layers: int = 2,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """Writes a checkpoint with patches of 14 pixels, (image_size / 14)^2 visual tokens and the demo's tokenizer."""
    if (folder / "config.json").is_file():
        return folder
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    num_tokens = (image_size // 14) ** 2
    vision = CLIPVisionConfig(
        hidden_size=vision_width,
        intermediate_size=4 * vision_width,
        num_hidden_layers=vision_layers,
        num_attention_heads=max(1, vision_width // 64),
        image_size=image_size,
        patch_size=14,
        projection_dim=vision_width,
    )
    text = LlamaConfig(
        vocab_size=128,
        hidden_size=width,
        intermediate_size=int(width * 2.6875) // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        num_key_value_heads=max(1, width // 64),
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=image_token, image_seq_length=num_tokens
    )
    torch.manual_seed(seed)
    LlavaForConditionalGeneration(config).to(dtype).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((TOKENIZER / name).read_bytes())
    return folder
