"""Tiny random LLaVA checkpoints as others publish them: towers, language models, chat templates, names of weights.

A picture has 56 x 56 pixels and 16 patches.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

SIDE, PATCH = 56, 14
WORDS = (
    "a the of is it to in on describe image picture caption write what who there you are helpful captioner user "
    "assistant system red blue green round square big small one two three . , ? : [INST] [/INST]"
)

# JoyCaption's: the content is text, from which the template takes image tokens and puts its own in front.
LLAMA_3 = (
    "{% set said = '' %}{% if messages[0]['role'] == 'system' %}{% set said = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% endif %}<|start_header_id|>system<|end_header_id|>\n\n{{ said }}<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n<|reserved_special_token_70|>"
    "<|reserved_special_token_69|><|reserved_special_token_71|>"
    "{{ m['content'].replace('<|reserved_special_token_69|>', '').lstrip() }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# Mistral's: writes the BOS token, takes text alone, and no system message.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] != 'user' %}{{ raise_exception('Only user\nmessages!') }}{% endif %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}"
)
# ChatML, with a list of parts.
QWEN_2 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Kind:
    """A language model with its usual tokenizer and chat template."""

    config: type
    template: str
    image: str
    specials: tuple[str, ...]
    bos: str | None = None


KINDS = {
    "llama3": Kind(
        config=LlamaConfig,
        template=LLAMA_3,
        image="<|reserved_special_token_69|>",
        specials=(
            *("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
            *(f"<|reserved_special_token_{i}|>" for i in (69, 70, 71)),
        ),
        bos="<|begin_of_text|>",
    ),
    "mistral": Kind(
        config=MistralConfig, template=MISTRAL, image="<image>", specials=("<s>", "</s>", "<image>"), bos="<s>"
    ),
    "qwen2": Kind(
        config=Qwen2Config,
        template=QWEN_2,
        image="<image>",
        specials=("<|endoftext|>", "<|im_end|>", "<|im_start|>", "<image>"),
    ),
}


def tiny_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """One token a word, and the special tokens of the kind; the first special token begins and the second ends."""
    of = KINDS[kind]
    vocabulary = {word: i for i, word in enumerate(["<unk>", *of.specials, *WORDS.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if of.bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{of.bos} $A", special_tokens=[(of.bos, vocabulary[of.bos])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=of.bos,
        eos_token=of.specials[1],
        pad_token=of.specials[0],
        unk_token="<unk>",
        additional_special_tokens=list(of.specials[2:]),
        clean_up_tokenization_spaces=False,
    )


def tiny_llava(
    folder: Path,
    kind: str = "llama3",
    *,
    siglip: bool = False,
    layer: int | list[int] = -2,
    strategy: str = "default",
    tied: bool = False,
    released: bool = True,
    processor: bool = True,
) -> LlavaForConditionalGeneration:
    """A random model, saved to `folder`.

    Args:
        released: the weights' names are those of the released llava-hf checkpoints, else those of transformers 5.
        processor: whether the folder holds an image processor's settings.
    """
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(kind)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4}
    vision = (SiglipVisionConfig if siglip else CLIPVisionConfig)(**tower, image_size=SIDE, patch_size=PATCH)
    text = KINDS[kind].config(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    image_token: Any = tokenizer.convert_tokens_to_ids(KINDS[kind].image)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=tied,
    )
    model = LlavaForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        # Far from the near-uniform answers of the usual start; a tied head would repeat the last word for ever.
        torch.nn.init.normal_(parameter, std=0.03 if tied and "embed_tokens" in name else 0.3)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(KINDS[kind].template)
    if processor:
        square = {"height": SIDE, "width": SIDE}
        own = (
            SiglipImageProcessorPil(size=square)
            if siglip
            else CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=square)
        )
        own.save_pretrained(folder)
    weights = {n: w.contiguous().clone() for n, w in model.state_dict().items() if not (tied and n == "lm_head.weight")}
    if released:
        weights = {released_name(name): weight for name, weight in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return model


def released_name(name: str) -> str:
    """The name in a released llava-hf checkpoint of a weight that transformers 5 calls `name`."""
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    name = name.removeprefix("model.")
    name = name.replace("language_model.", "language_model.model.", 1)
    return name if "vision_model." in name else name.replace("vision_tower.", "vision_tower.vision_model.", 1)
