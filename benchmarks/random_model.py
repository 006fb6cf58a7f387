"""Makes LLaVA checkpoints of any shape with random weights, to measure speed and memory: weights affect neither."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
)

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

    Attention heads are 64 wide, and 128 wide in language models of width 4096 and more, as in LLaMA. The vocabulary has
    128 tokens, while LLaVA-1.5 has 32,000: at width 4096, its output head would add 0.13e9 parameters to the 6.5e9 of
    32 layers, and its embedding would add as many.

    Tensors have the names of released checkpoints, because vLLM knows no other names. With `endless`, the model never
    generates the token that ends an answer, so every answer has its full length. A folder that holds a checkpoint is
    returned as it is.
    """
    if (folder / "config.json").is_file():
        return folder
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    config = LlavaConfig(
        vision_config=_vision_config(image_size, vision_width, vision_layers),
        text_config=_text_config(tokenizer, width, layers),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(image_size // 14) ** 2,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).to(dtype)
    if endless:
        end = model.lm_head.weight[tokenizer.eos_token_id]
        torch.nn.init.zeros_(end)  # its logit is always 0, which is never the largest of 128
    model.save_pretrained(folder)
    _write_processor(folder, image_size)
    _rename_tensors(folder / "model.safetensors")
    return folder


def _vision_config(image_size: int, vision_width: int, vision_layers: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=vision_width,
        intermediate_size=4 * vision_width,
        num_hidden_layers=vision_layers,
        num_attention_heads=max(1, vision_width // 64),
        image_size=image_size,
        patch_size=14,
        projection_dim=vision_width,
    )


def _text_config(tokenizer: PreTrainedTokenizerBase, width: int, layers: int) -> LlamaConfig:
    num_heads = max(1, width // (128 if width >= 4096 else 64))
    return LlamaConfig(
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


def _write_processor(folder: Path, image_size: int) -> None:
    """Writes the demo's tokenizer, and the demo's image processor with another image size."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((TOKENIZER / name).read_bytes())
    processor = json.loads((TOKENIZER / "processor_config.json").read_text())
    processor["image_processor"] |= {
        "size": {"shortest_edge": image_size},
        "crop_size": {"height": image_size, "width": image_size},
    }
    (folder / "processor_config.json").write_text(json.dumps(processor))


def _rename_tensors(path: Path) -> None:
    """Renames the tensors in a file as released checkpoints name them."""
    renamed = {
        re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name): tensor
        for name, tensor in load_file(path).items()
    }
    save_file(renamed, path, {"format": "pt"})
