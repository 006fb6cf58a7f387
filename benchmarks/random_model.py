"""A LLaVA checkpoint of any shape with random weights, for measuring speed and memory, which values do not change."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
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
    endless: bool = False,
) -> Path:
    """Writes a checkpoint with patches of 14 pixels, (image_size / 14)^2 visual tokens and the demo's tokenizer.

    Heads are 64 wide, in language models of width 4096 and more 128, as LLaMA's are. The vocabulary has 128 tokens,
    LLaVA-1.5's 32,000: at width 4096 its head would be another 0.13e9 parameters on the 6.5e9 of 32 layers, and an
    embedding as large would be held.

    Tensors are named as released checkpoints name them, since vLLM knows no other names. With `endless` the model never
    says the token that ends an answer: every answer has its full length.
    """
    if (folder / "config.json").is_file():
        return folder
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    num_tokens, num_heads = (image_size // 14) ** 2, max(1, width // (128 if width >= 4096 else 64))
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
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
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
    model = LlavaForConditionalGeneration(config).to(dtype)
    if endless:
        end = model.lm_head.weight[tokenizer.eos_token_id]
        torch.nn.init.zeros_(end)  # a logit of 0 is never the largest of 128
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((TOKENIZER / name).read_bytes())
    processor = json.loads((TOKENIZER / "processor_config.json").read_text())
    processor["image_processor"] |= {
        "size": {"shortest_edge": image_size},
        "crop_size": {"height": image_size, "width": image_size},
    }
    (folder / "processor_config.json").write_text(json.dumps(processor))
    path = folder / "model.safetensors"
    renamed = {
        re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name): tensor
        for name, tensor in load_file(path).items()
    }
    save_file(renamed, path, {"format": "pt"})
    return folder
