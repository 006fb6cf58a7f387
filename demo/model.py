"""The demo model: the architecture of LLaVA-1.5 with 3 million parameters.

CLIP vision tower 224 px / patch 14 (256 tokens, width 128, 5 layers, features of layer -2, class token dropped),
projector 128 -> 192 -> 192, Llama of width 192 with 4 layers and tied embeddings, a word-level tokenizer.

Shape suffixes: B images, N visual tokens, D vision width, H W pixels.
"""

import re
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from demo.language import words
from demo.world import GRID, PATCH, SIDE

VISION_WIDTH, VISION_LAYERS, TEXT_WIDTH, TEXT_LAYERS, HEAD_WIDTH = 128, 5, 192, 4, 32
MIDDLE_LAYER = 2  # training predicts object masks from this layer
MAX_NEW_TOKENS = 64  # the longest caption has 38 tokens; with few visual tokens the model may never stop by itself
_SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
_CHAT_TEMPLATE = (  # LLaVA-1.5's: USER: <image>\n question ASSISTANT:
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% if m['content'] is string %}{{ m['content'] + ' ' }}"
    "{% else %}{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] + ' ' }}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the closed vocabulary; case matters ("A" is an option, "a" an article)."""
    vocabulary = {word: number for number, word in enumerate(_SPECIAL + words())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Image processor and tokenizer; one `<image>` in the text becomes 256 placeholders."""
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token; without it, the number of placeholders is off by one
        image_token="<image>",
        chat_template=_CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlavaForConditionalGeneration:
    """A randomly initialised model, float32, on the CPU. The global generator of torch is not changed."""
    vocabulary = tokenizer.get_vocab()
    vision = CLIPVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=4 * VISION_WIDTH,
        num_hidden_layers=VISION_LAYERS,
        num_attention_heads=VISION_WIDTH // HEAD_WIDTH,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=VISION_WIDTH,
    )
    text = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=TEXT_WIDTH,
        intermediate_size=512,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=TEXT_WIDTH // HEAD_WIDTH,
        num_key_value_heads=TEXT_WIDTH // HEAD_WIDTH,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=vocabulary["<s>"],
        eos_token_id=vocabulary["</s>"],
        pad_token_id=vocabulary["<pad>"],
        rms_norm_eps=1e-5,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=vocabulary["<image>"],
        image_seq_length=GRID**2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.set_attn_implementation("eager")  # faster than fused attention on a CPU at 65 tokens
    return model


def to_pixels(images: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W], normalised like the image processor does, without resizing."""
    pixels_B3HW = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (_MEAN, _STD))
    return (pixels_B3HW - mean) / std


def encode_patches(
    tower: CLIPVisionModel, pixels_B3HW: Tensor, places_BN: Tensor, *, whole: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(middle [B, N, D], features [B, N, D], class token [B, D] | None) of whole images or of windows cut from them.

    `places_BN` holds the raster numbers of the patches in the whole image, so that a window has its true position
    embeddings. Only the class token needs the last layer, so the last layer runs only for whole images.
    """
    embeddings = tower.embeddings
    patches_BND = embeddings.patch_embedding(pixels_B3HW).flatten(2).transpose(1, 2)
    patches_BND = patches_BND + embeddings.position_embedding(places_BN + 1)
    first_D = embeddings.class_embedding + embeddings.position_embedding.weight[0]
    hidden = tower.pre_layrnorm(torch.cat([first_D.expand(len(patches_BND), 1, -1), patches_BND], 1))
    middle = features = hidden
    for number, layer in enumerate(tower.encoder.layers, start=1):
        if number == VISION_LAYERS:
            features = hidden[:, 1:]
            if not whole:
                return middle, features, None
        hidden = layer(hidden, None)
        if number == MIDDLE_LAYER:
            middle = hidden[:, 1:]
    return middle, features, tower.post_layernorm(hidden[:, 0])


def export(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a float16 checkpoint with the tensor names of the released llava-hf models, for transformers and vLLM.

    The model itself is moved to the CPU and converted to float16.
    """
    model = model.cpu().half()
    settings = model.generation_config
    settings.do_sample, settings.max_new_tokens, settings.pad_token_id = False, MAX_NEW_TOKENS, tokenizer.pad_token_id
    model.save_pretrained(folder)
    build_processor(tokenizer).save_pretrained(folder)
    path = folder / "model.safetensors"
    save_file({_released_name(name): tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})


def _released_name(name: str) -> str:
    """The released name of a tensor: transformers 5 writes names without `vision_model.`, which vLLM does not read."""
    return re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)
