"""Writes the files of a released checkpoint with random values: its names, shards, index and sizes, at full width.

    python benchmarks/released_files.py qwen2.5-vl-3b FOLDER        # or qwen3.5-0.8b, llava-1.5-7b
    python jobs/caption_corpus.py model.path=FOLDER model.dtype=bfloat16 input.limit=4 generate.max_new_tokens=8 ...

The captions mean nothing. What runs is everything else: the files are found and read by halves, each actor's memory is
that of the real model, and prompts have their real lengths. The tokenizer is a word-level stand-in whose special tokens
have the released ids, so the vocabulary of the model is the real one too.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

SHARD = "5GB"
CHATML = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}<|vision_start|> <|image_pad|> <|vision_end|> "
    "{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
VICUNA = (
    "{% for m in messages %}USER : {% for p in m.content %}{% if p.type == 'image' %}<image> {% else %}{{ p.text }}"
    "{% endif %}{% endfor %} ASSISTANT :{% endfor %}"
)
WORDS = ["user", "assistant", "USER", "ASSISTANT", ":", ".", "describe", "this", "image", "in", "detail"]


def qwen25_vl_3b(folder: Path) -> Any:
    """Qwen2.5-VL-3B-Instruct: 36 layers of 2048, a tower of 32 layers of 1280."""
    special = {
        "<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<|vision_start|>": 151652,
        "<|vision_end|>": 151653, "<|image_pad|>": 151655, "<|video_pad|>": 151656,
    }  # fmt: skip
    write_tokenizer(folder, special, CHATML, end="<|im_end|>", pad="<|endoftext|>")
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
        "min_pixels": 3136, "max_pixels": 12845056, "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
            "num_attention_heads": 16, "num_key_value_heads": 2, "max_position_embeddings": 128000,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
            "bos_token_id": 151643, "eos_token_id": 151645, "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048,
            "patch_size": 14, "spatial_merge_size": 2, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
        },
        image_token_id=151655, video_token_id=151656, vision_start_token_id=151652, vision_end_token_id=151653,
        tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration, config


def qwen35_08b(folder: Path) -> Any:
    """Qwen3.5-0.8B: 24 layers of 1024, every fourth with attention to all tokens, a tower of 12 layers of 768.

    Its config.json names the end of a document as end token, and its tokenizer the end of a turn. The released files
    hold the weights of a head that drafts tokens, too (`mtp.*`), which neither engine reads here.
    """
    special = {
        "<|endoftext|>": 248044, "<|im_start|>": 248045, "<|im_end|>": 248046, "<|vision_start|>": 248053,
        "<|vision_end|>": 248054, "<|image_pad|>": 248056, "<|video_pad|>": 248057, "<think>": 248068,
        "</think>": 248069,
    }  # fmt: skip
    template = CHATML.removesuffix("{% endif %}") + (
        "<think> {% if enable_thinking is not defined or not enable_thinking %}</think> {% endif %}{% endif %}"
    )
    write_tokenizer(folder, special, template, end="<|im_end|>", pad="<|endoftext|>")
    processor = {
        "image_processor_type": "Qwen2VLImageProcessorFast", "patch_size": 16, "temporal_patch_size": 2,
        "merge_size": 2, "size": {"shortest_edge": 65536, "longest_edge": 16777216}, "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    config = Qwen3_5Config(
        text_config={
            "vocab_size": 248320, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 24,
            "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256, "max_position_embeddings": 262144,
            "linear_num_key_heads": 16, "linear_num_value_heads": 16, "linear_key_head_dim": 128,
            "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "eos_token_id": 248044,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10000000.0, "mrope_section": [11, 11, 10],
                "mrope_interleaved": True, "partial_rotary_factor": 0.25,
            },
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 12, "hidden_size": 768, "intermediate_size": 3072, "num_heads": 12, "out_hidden_size": 1024,
            "patch_size": 16, "num_position_embeddings": 2304,
        },
        image_token_id=248056, video_token_id=248057, vision_start_token_id=248053, vision_end_token_id=248054,
        tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen3_5ForConditionalGeneration, config


def llava15_7b(folder: Path) -> Any:
    """LLaVA-1.5-7B: 32 layers of 4096, CLIP ViT-L/14-336."""
    special = {"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": 32000, "<pad>": 32001}
    write_tokenizer(folder, special, VICUNA, end="</s>", pad="<pad>")
    processor = {
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 336}, "do_center_crop": True,
        "crop_size": {"height": 336, "width": 336}, "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    config = LlavaConfig(
        text_config=LlamaConfig(
            vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
            max_position_embeddings=4096, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, pad_token_id=32001,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
            patch_size=14, projection_dim=768, vocab_size=32000,
        ),
        image_token_index=32000, image_seq_length=576, vision_feature_layer=-2,
        vision_feature_select_strategy="default", tie_word_embeddings=False,
    )  # fmt: skip
    return LlavaForConditionalGeneration, config


CHECKPOINTS = {"qwen2.5-vl-3b": qwen25_vl_3b, "qwen3.5-0.8b": qwen35_08b, "llava-1.5-7b": llava15_7b}


def write_tokenizer(folder: Path, special: dict[str, int], template: str, *, end: str, pad: str) -> None:
    """A tokenizer of whole words, with special tokens at their released ids."""
    free = (i for i in range(3, 10**6) if i not in special.values())
    vocabulary = dict(special) | {word: next(free) for word in WORDS}
    vocabulary.setdefault("<unk>", next(free))
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token=end, pad_token=pad)
    fast.add_special_tokens({"additional_special_tokens": [name for name in special if name not in (end, pad)]})
    fast.chat_template = template
    fast.save_pretrained(folder)


def write(name: str, folder: Path) -> None:
    """Writes the checkpoint `name` to `folder`, in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    cls, config = CHECKPOINTS[name](folder)
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = cls(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1:  # values of a trained model's size: larger ones would overflow after many layers
                parameter.normal_(0, 0.02, generator=generator)
            else:
                parameter.fill_(0.0 if parameter_name.endswith("bias") else 1.0)
    model.tie_weights()
    model.generation_config = GenerationConfig(eos_token_id=config.text_config.eos_token_id)
    model.save_pretrained(folder, max_shard_size=SHARD)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=CHECKPOINTS)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    write(options.name, options.folder)
    size = sum(file.stat().st_size for file in options.folder.glob("*.safetensors"))
    print(f"{options.name}: {size / 1e9:.1f} GB in {len(list(options.folder.glob('*.safetensors')))} files")


if __name__ == "__main__":
    main()
