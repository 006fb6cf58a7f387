"""Tiny checkpoints of the families, with random weights, as transformers saves them: made in a second, offline.

The weights are wide enough that the answer depends on every token, its position and its DeepStack rows.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3Config,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message.role.upper() }}: {% for part in message.content %}"
    "{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Qwen3.5's, whose larger checkpoints think unless they are told not to.
QWEN3_5_TEMPLATE = QWEN_TEMPLATE.removesuffix("{% endif %}") + (
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% else %}<think>\n{% endif %}{% endif %}"
)
# LLaVA-OneVision's ChatML: a space behind the role, and no line break between the turns.
ONEVISION_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }} {% for part in message.content %}"
    "{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INTERNVL_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content is string %}"
    "{{ message.content }}{% else %}{% for part in message.content %}{% if part.type == 'image' %}<IMG_CONTEXT>\n"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Mistral's writes <s> itself, and pictures where they stand among the parts.
MISTRAL_TEMPLATE = (
    "<s>{% for message in messages %}{% if message.role == 'system' %}[SYSTEM_PROMPT]{% if message.content is string %}"
    "{{ message.content }}{% else %}{{ message.content[0].text }}{% endif %}[/SYSTEM_PROMPT]{% else %}[INST]"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% else %}[IMG]{% endif %}{% endfor %}"
    "[/INST]{% endif %}{% endfor %}"
)
MISTRAL_TOKENS = ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG_END]", "[IMG]", "[IMG_BREAK]")
# SmolVLM2's: no space behind the colon where a picture follows.
SMOLVLM_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message.role | capitalize }}:"
    "{% if message.content[0].type != 'image' %} {% endif %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
SMOLVLM_TOKENS = (
    *("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", "<|im_start|>"),
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)
# Gemma's writes <s> itself, the system message in front of the user's, and a mark where the processor puts a picture.
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% set ns = namespace(said='') %}{% for message in messages %}{% if message.role == 'system' %}"
    "{% set ns.said = (message.content if message.content is string else message.content[0].text) + '\n\n' %}"
    "{% else %}<start_of_turn>{{ message.role }}\n{{ ns.said }}{% for part in message.content %}"
    "{% if part.type == 'image' %}<start_of_image>{% else %}{{ part.text | trim }}{% endif %}{% endfor %}"
    "<end_of_turn>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
GEMMA_TOKENS = ("<start_of_image>", "<end_of_image>", "<image_soft_token>", "<start_of_turn>", "<end_of_turn>")
INTERNVL_TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>", "<|im_start|>", "<|im_end|>")
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")

TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CLIP: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
    "projection_dim": 32,
}


def save_tokenizer(
    folder: Path, special: tuple[str, ...], template: str, *, begin: bool = False
) -> PreTrainedTokenizerFast:
    """A tokenizer with one token a byte, which knows the `special` tokens, saved with its chat template.

    Args:
        begin: whether it puts the BOS token in front of every text.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *special, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=list(special),
        chat_template=template,
    )
    wrapped.save_pretrained(folder)
    return wrapped


@torch.no_grad()
def randomize(model: Any, seed: int = 0) -> Any:
    """Draws every weight anew: matrices that keep the size of what they multiply, norms around 1, biases around 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        drawn = torch.randn(weight.shape, generator=generator)
        if "embed" in name and "patch" not in name:
            weight.copy_(drawn)
        elif name.endswith("A_log"):
            weight.copy_(drawn * 0.1 - 4)  # linear attention then forgets about 1 % of its state with each token
        elif weight.dim() >= 2:  # experts are [experts, out, in]
            weight.copy_(drawn * 1.3 / (weight.shape[-1] if weight.dim() == 3 else weight[0].numel()) ** 0.5)
        else:
            weight.copy_(drawn * 0.1 + (1 if "norm" in name and name.endswith("weight") else 0))
    return model.float().eval()


def save(model: Any, folder: Path, processor: Any, **options: Any) -> Path:
    model.generation_config.eos_token_id = 2
    randomize(model).save_pretrained(folder, **options)
    processor.save_pretrained(folder)
    return folder


def make_llava(folder: Path) -> Path:
    vocabulary = len(tokenizer := save_tokenizer(folder, ("<image>",), LLAVA_TEMPLATE))
    text = LlamaConfig(**TEXT, vocab_size=vocabulary, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    image: Any = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(text_config=text, vision_config=CLIPVisionConfig(**CLIP), image_token_index=image)
    return save(LlavaForConditionalGeneration(config), folder, CLIPImageProcessorPil(size=56, crop_size=56))


def make_llava_next(folder: Path) -> Path:
    tokenizer = save_tokenizer(folder, ("<image>",), LLAVA_TEMPLATE)
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return save_llava_next(folder, tokenizer, LlamaConfig(**TEXT, vocab_size=len(tokenizer), rope_parameters=rope))


def save_llava_next(folder: Path, tokenizer: PreTrainedTokenizerFast, text: Any, **of_config: Any) -> Path:
    """A LLaVA-1.6 with a language model of the configuration `text`."""
    pinpoints = [[56, 112], [112, 56], [112, 112]]
    image: Any = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaNextConfig(
        text_config=text,
        vision_config=CLIPVisionConfig(**CLIP),
        image_token_index=image,
        image_grid_pinpoints=pinpoints,
        **of_config,
    )
    processor = LlavaNextImageProcessorPil(size=56, crop_size=56, image_grid_pinpoints=pinpoints)
    return save(LlavaNextForConditionalGeneration(config), folder, processor)


def make_llava_onevision(folder: Path, *, tie: bool = False, **of_config: Any) -> Path:
    """Tiles of 44 x 44 pixels, 3 x 3 tokens and 2 pixels left over, as the released 384 x 384 have 27 x 27 and 6.

    Up to 4 x 4 tiles, whose tokens are scaled down to those of 4.
    """
    tokenizer = save_tokenizer(folder, ("<|im_start|>", "<|im_end|>", "<image>", "<video>"), ONEVISION_TEMPLATE)
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = Qwen2Config(**TEXT, vocab_size=len(tokenizer), rope_parameters=rope, tie_word_embeddings=tie)
    vision = {name: value for name, value in CLIP.items() if name != "projection_dim"}
    pinpoints = [[44 * rows, 44 * columns] for rows in range(1, 5) for columns in range(1, 5)]
    image, video = (tokenizer.convert_tokens_to_ids(token) for token in ("<image>", "<video>"))
    config = LlavaOnevisionConfig(
        text_config=text,
        vision_config=SiglipVisionConfig(**{**vision, "image_size": 44, "vision_use_head": False}),
        **{
            "image_token_index": image,
            "video_token_index": video,
            "image_grid_pinpoints": pinpoints,
            "vision_aspect_ratio": "anyres_max_4",
            "tie_word_embeddings": tie,
            **of_config,
        },
    )
    mean = [0.5, 0.5, 0.5]
    processor = LlavaOnevisionImageProcessorPil(
        size={"height": 44, "width": 44}, image_grid_pinpoints=pinpoints, image_mean=mean, image_std=mean
    )
    return save(LlavaOnevisionForConditionalGeneration(config), folder, processor)


def make_internvl(folder: Path, *, decoder: str = "qwen2", tie: bool = False, **options: Any) -> Path:
    tokenizer = save_tokenizer(folder, INTERNVL_TOKENS, INTERNVL_TEMPLATE)
    text = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}[decoder](
        **TEXT,
        **({"head_dim": 32} if decoder == "qwen3" else {}),
        vocab_size=len(tokenizer),
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=tie,
    )
    vision = InternVLVisionConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=56,
        patch_size=7,
        attention_bias=True,
        use_qk_norm=decoder == "llama",  # as the larger of the family's two towers
        norm_type="rms_norm" if decoder == "llama" else "layer_norm",
    )
    image: Any = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    config = InternVLConfig(
        text_config=text, vision_config=vision, image_token_id=image, image_seq_length=16, tie_word_embeddings=tie
    )
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    processor = GotOcr2ImageProcessorPil(
        size={"height": 56, "width": 56}, image_mean=mean, image_std=std, max_patches=6
    )
    return save(InternVLForConditionalGeneration(config), folder, processor, **options)


def make_smolvlm(folder: Path, *, tie: bool = False, **options: Any) -> Path:
    return _make_smolvlm(folder, SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMImageProcessorPil, tie, options)


def make_idefics3(folder: Path, *, tie: bool = False, **options: Any) -> Path:
    return _make_smolvlm(
        folder, Idefics3Config, Idefics3ForConditionalGeneration, Idefics3ImageProcessorPil, tie, options
    )


def _make_smolvlm(folder: Path, config: Any, model: Any, images: Any, tie: bool, options: dict[str, Any]) -> Path:
    """Tiles of 58 x 58 pixels, 8 x 8 patches of 7 and 2 pixels left over, as the released 384 have 27 x 27 and 6."""
    tokenizer = save_tokenizer(folder, SMOLVLM_TOKENS, SMOLVLM_TEMPLATE)
    vision = {name: CLIP[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = LlamaConfig(**TEXT, vocab_size=len(tokenizer), rope_parameters=rope, tie_word_embeddings=tie)
    described = config(
        text_config=text,
        vision_config={**vision, "num_attention_heads": 2, "image_size": 58, "patch_size": 7},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
        tie_word_embeddings=tie,
    )
    mean = [0.5, 0.5, 0.5]
    processor = images(
        size={"longest_edge": 3 * 58}, max_image_size={"longest_edge": 58}, image_mean=mean, image_std=mean
    )
    return save(model(described), folder, processor, **options)


def make_qwen2_5_vl(folder: Path, *, tie: bool = False, **options: Any) -> Path:
    tokenizer = save_tokenizer(folder, (*VISION_TOKENS, "<|im_start|>", "<|im_end|>"), QWEN_TEMPLATE)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_heads": 2,
        "out_hidden_size": TEXT["hidden_size"],
        "patch_size": 14,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "vocab_size": len(tokenizer), "rope_parameters": rope, "tie_word_embeddings": tie},
        vision_config=vision,
        tie_word_embeddings=tie,
        **vision_token_ids(tokenizer),
    )
    processor = Qwen2VLImageProcessorPil(min_pixels=4 * 28 * 28, max_pixels=16384 * 28 * 28)
    return save(Qwen2_5_VLForConditionalGeneration(config), folder, processor, **options)


def make_qwen3_vl(folder: Path, *, tie: bool = False, **options: Any) -> Path:
    return _make_qwen3(folder, Qwen3VLConfig, Qwen3VLForConditionalGeneration, {"intermediate_size": 96}, tie, options)


def make_qwen3_vl_moe(folder: Path, *, tie: bool = False, **options: Any) -> Path:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    return _make_qwen3(folder, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration, experts, tie, options)


def _make_qwen3(folder: Path, config: Any, model: Any, ffn: dict[str, int], tie: bool, options: dict[str, Any]) -> Path:
    tokenizer = save_tokenizer(folder, (*VISION_TOKENS, "<|im_start|>", "<|im_end|>"), QWEN_TEMPLATE)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    text = {**TEXT, **ffn, "head_dim": 32, "vocab_size": len(tokenizer), "rope_parameters": rope}
    vision = {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_heads": 2,
        "out_hidden_size": TEXT["hidden_size"],
        "patch_size": 16,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 2],
    }
    described = config(
        text_config={**text, "tie_word_embeddings": tie},
        vision_config=vision,
        tie_word_embeddings=tie,
        **vision_token_ids(tokenizer),
    )
    edges = {"shortest_edge": 4 * 32 * 32, "longest_edge": 16384 * 32 * 32}
    mean = [0.5, 0.5, 0.5]
    processor = Qwen2VLImageProcessorPil(patch_size=16, size=edges, image_mean=mean, image_std=mean)
    return save(model(described), folder, processor, **options)


def make_qwen3_5(folder: Path, *, tie: bool = False, **options: Any) -> Path:
    return _make_qwen3_5(folder, Qwen3_5Config, Qwen3_5ForConditionalGeneration, {}, tie, options)


def make_qwen3_5_moe(folder: Path, *, tie: bool = False, **options: Any) -> Path:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    experts |= {"shared_expert_intermediate_size": 20}
    return _make_qwen3_5(folder, Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration, experts, tie, options)


def _make_qwen3_5(folder: Path, config: Any, model: Any, ffn: dict[str, int], tie: bool, options: Any) -> Path:
    """Layers of linear attention, and as many that attend to every token and rotate half of each head.

    The released models have three of the former for one of the latter, too few for tiny ones to see positions well.
    """
    special = (*VISION_TOKENS, "<|im_start|>", "<|im_end|>", "<think>", "</think>")
    tokenizer = save_tokenizer(folder, special, QWEN3_5_TEMPLATE)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2], "mrope_interleaved": True}
    text = {
        **TEXT,
        **ffn,
        "head_dim": 32,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 24,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "vocab_size": len(tokenizer),
        "rope_parameters": {**rope, "partial_rotary_factor": 0.5},
        "tie_word_embeddings": tie,
    }
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_heads": 2,
        "out_hidden_size": TEXT["hidden_size"],
        "patch_size": 16,
        "num_position_embeddings": 64,
    }
    described = config(text_config=text, vision_config=vision, tie_word_embeddings=tie, **vision_token_ids(tokenizer))
    edges = {"shortest_edge": 4 * 32 * 32, "longest_edge": 16384 * 32 * 32}
    mean = [0.5, 0.5, 0.5]
    processor = Qwen2VLImageProcessorPil(patch_size=16, size=edges, image_mean=mean, image_std=mean)
    return save(model(described), folder, processor, **options)


def make_mistral3(folder: Path, *, tie: bool = False, longest: int = 150, head_dim: int = 24, **options: Any) -> Path:
    """Tokens of 14 x 14 pixels, in pictures of up to `longest` pixels a side, which is no multiple of them."""
    tokenizer = save_tokenizer(folder, MISTRAL_TOKENS, MISTRAL_TEMPLATE, begin=True)
    text = MistralConfig(
        **TEXT,
        head_dim=head_dim,  # not the hidden size by the number of heads, as in the released models
        vocab_size=len(tokenizer),
        sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=tie,
    )
    vision = PixtralVisionConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=longest,
        patch_size=7,
        hidden_act="silu",
        rope_parameters={"rope_type": "axial", "rope_theta": 10000.0},
    )
    image: Any = tokenizer.convert_tokens_to_ids("[IMG]")
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=image, tie_word_embeddings=tie)
    processor = PixtralImageProcessorPil(size={"longest_edge": longest}, patch_size={"height": 7, "width": 7})
    return save(Mistral3ForConditionalGeneration(config), folder, processor, **options)


def make_gemma3(folder: Path, *, tie: bool = False, window: int = 24, **options: Any) -> Path:
    """Squares of 56 x 56 pixels, 8 x 8 patches, 4 x 4 tokens: more than half a window, and with the text more than one.

    One layer of three sees the whole prompt.
    """
    tokenizer = save_tokenizer(folder, GEMMA_TOKENS, GEMMA_TEMPLATE, begin=True)
    text = Gemma3TextConfig(
        **{**TEXT, "num_hidden_layers": 3},
        head_dim=24,  # not the hidden size by the number of heads, as in the released models
        query_pre_attn_scalar=24,
        vocab_size=len(tokenizer),
        sliding_window=window,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        tie_word_embeddings=tie,
    )
    vision = {name: CLIP[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "image_size")}
    start, end, image, *_ = tokenizer.convert_tokens_to_ids(list(GEMMA_TOKENS))
    config = Gemma3Config(
        text_config=text,
        vision_config=SiglipVisionConfig(**vision, num_attention_heads=2, patch_size=7, vision_use_head=False),
        mm_tokens_per_image=16,
        boi_token_index=start,
        eoi_token_index=end,
        image_token_index=image,
        tie_word_embeddings=tie,
    )
    mean = [0.5, 0.5, 0.5]
    processor = Gemma3ImageProcessorPil(size={"height": 56, "width": 56}, image_mean=mean, image_std=mean)
    return save(Gemma3ForConditionalGeneration(config), folder, processor, **options)


def vision_token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(VISION_TOKENS))
    ids = {"vision_start_token_id": start, "vision_end_token_id": end}
    return {**ids, "image_token_id": image, "video_token_id": video}


MAKERS: dict[str, Callable[..., Path]] = {
    "llava": make_llava,
    "llava_next": make_llava_next,
    "llava_onevision": make_llava_onevision,
    "qwen2_5_vl": make_qwen2_5_vl,
    "qwen3_vl": make_qwen3_vl,
    "qwen3_vl_moe": make_qwen3_vl_moe,
    "qwen3_5": make_qwen3_5,
    "qwen3_5_moe": make_qwen3_5_moe,
    "internvl": make_internvl,
    "mistral3": make_mistral3,
    "smolvlm": make_smolvlm,
    "idefics3": make_idefics3,
    "gemma3": make_gemma3,
}
"""Family -> function that makes a checkpoint of it in a folder, and returns the folder."""
