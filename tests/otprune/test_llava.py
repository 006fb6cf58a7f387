"""LLaVA's own class in full: both towers, the language models under it, what its checkpoints say, what cannot run."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoTokenizer

from otprune.families import Options
from otprune.families.family import SIGLIP_MEAN, SIGLIP_STD
from otprune.families.llava import own_fit
from otprune.methods import METHODS, BeforeModel
from otprune.methods.reduction import Seen
from otprune.models import CheckpointError, load_decoder, load_encoder, read_checkpoint
from otprune.models.relevance import make_relevance
from otprune.part_flops import projector_flops, vision_flops
from tests.tiny_llava import KINDS, SIDE, tiny_llava

CPU = {"dtype": torch.float32, "device": "cpu"}
SIZE = (SIDE, SIDE)
TOLD = "you are a helpful captioner ."
ASKED = ["describe the image .", "what is in the picture ?", "write a caption : is it red , green or blue ?"]

# As published (copies of fancyfeast/llama-joycaption-beta-one-hf-llava and its sibling alpha-two).
JOY_CAPTION = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "image_seq_length": 729,
    "image_token_index": 128077,
    "projector_hidden_act": "gelu",
    "text_config": {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "vocab_size": 128256,
    },
    "vision_config": {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "image_size": 384,
        "intermediate_size": 4304,
        "layer_norm_eps": 1e-06,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "full",
}
JOY_CAPTION_PROCESSOR = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "LlavaProcessor",
    "resample": 1,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 384, "width": 384},
}


def described(folder: Path, config: dict, processor: dict | None = None) -> str:
    """A folder that says what `config` says, with one weight."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
    return str(folder)


def pixels(count: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (count, *SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


# What a checkpoint says


def test_joycaption_is_read_as_it_is_published(tmp_path):
    joy = read_checkpoint(described(tmp_path, JOY_CAPTION, JOY_CAPTION_PROCESSOR))
    assert (joy.geometry.frame((768, 1024)).shape, joy.geometry.frame((768, 1024)).fit) == ((384, 384, 3), "stretch")
    assert joy.geometry.frame((768, 1024)).resample == "lanczos"
    assert (joy.geometry.fixed, joy.geometry.grid((768, 1024))) == (729, (27, 27))
    assert (joy.image_token, joy.mean, joy.max_length) == (128077, (0.5, 0.5, 0.5), 131072)
    assert (joy.vision.layers, joy.vision.class_tokens, joy.class_attention) == (26, 0, False)
    assert (joy.language.kv_heads, joy.language_type) == (8, "llama")
    layer = 729 * (4 * 1152**2 + 2 * 1152 * 4304) + 2 * 729**2 * 1152
    assert vision_flops(joy.vision) == 729 * 3 * 14**2 * 1152 + 26 * layer


@pytest.mark.parametrize(
    ("settings", "fit"),
    [
        ({}, "pad"),
        (JOY_CAPTION_PROCESSOR, "stretch"),
        (JOY_CAPTION_PROCESSOR | {"do_center_crop": None, "do_pad": None}, "stretch"),
        (JOY_CAPTION_PROCESSOR | {"do_center_crop": False}, "stretch"),
        (JOY_CAPTION_PROCESSOR | {"do_center_crop": True}, "pad"),
        (JOY_CAPTION_PROCESSOR | {"do_pad": True}, "pad"),
        ({"image_processor_type": "CLIPImageProcessor", "do_center_crop": True}, "pad"),
        ({"image_processor_type": "CLIPImageProcessorFast"}, "pad"),
        ({"image_processor_type": "CLIPImageProcessor", "do_center_crop": False}, "stretch"),
        ({"feature_extractor_type": "CLIPFeatureExtractor"}, "pad"),
        ({"image_processor_type": "LlavaImageProcessorFast", "do_pad": True, "do_center_crop": False}, "pad"),
        ({"image_processor_type": "ViTImageProcessor"}, "stretch"),
    ],
)
def test_the_aspect_follows_the_processor(settings, fit):
    assert own_fit(settings) == fit


def test_a_chosen_aspect_wins_and_a_checkpoint_without_processor_pads(tmp_path):
    bare = described(tmp_path, JOY_CAPTION)
    assert read_checkpoint(bare).geometry.frame(SIZE).fit == "pad"
    for aspect in ("pad", "crop", "stretch"):
        assert read_checkpoint(bare, Options(aspect=aspect)).geometry.frame(SIZE).fit == aspect
    assert (read_checkpoint(bare).mean, read_checkpoint(bare).std) == (SIGLIP_MEAN, SIGLIP_STD)


def test_towers_without_a_fixed_grid_are_refused_in_one_line(tmp_path):
    pixtral = {"model_type": "pixtral", "head_dim": 64, "image_size": 1024, "patch_size": 16}
    text = {"model_type": "mistral", "hidden_size": 5120, "head_dim": 128, "vocab_size": 131072}
    config = {"model_type": "llava", "image_token_index": 10, "vision_feature_layer": -1, "vision_config": pixtral}
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(described(tmp_path, {**config, "text_config": text, "vision_feature_select_strategy": "full"}))
    assert str(caught.value).endswith(
        "vision_config.model_type must be clip_vision_model or siglip_vision_model, towers that see squares of one "
        "size, got 'pixtral'"
    )


# Towers

TOWERS = [
    (-2, "default"),
    (-2, "full"),
    (-1, "full"),
    (3, "full"),
    (-4, "default"),
    ([-2, -3], "default"),
    ([1, -1], "full"),
]


@pytest.mark.parametrize("siglip", [False, True])
@pytest.mark.parametrize(("layer", "strategy"), TOWERS)
def test_the_tokens_of_every_tower_are_those_of_the_whole_model_and_as_many_as_foretold(
    tmp_path, siglip, layer, strategy
):
    model = tiny_llava(tmp_path, siglip=siglip, layer=layer, strategy=strategy)
    checkpoint = read_checkpoint(str(tmp_path))
    encoder, pictures = load_encoder(checkpoint, **CPU), pixels()
    inputs = AutoImageProcessor.from_pretrained(tmp_path)(list(pictures.numpy()), return_tensors="pt")
    with torch.no_grad():
        expected = model.model.get_image_features(inputs["pixel_values"]).pooler_output
    regions = encoder.regions(list(pictures), [SIZE] * 3, "joint")
    got = torch.stack([region.features for (region,) in regions])
    # float32, pixels normalised in another order of operations
    torch.testing.assert_close(got, torch.stack(list(expected)), rtol=1e-4, atol=1e-4)
    assert got.shape == (3, checkpoint.geometry.fixed, encoder.row_width)
    patches = regions[0][0].patches
    assert patches is not None
    assert patches.shape[1] == checkpoint.vision.width
    assert projector_flops(checkpoint.shape) == 16 * sum(
        w.numel() for w in encoder.projector.parameters() if w.ndim == 2
    )
    assert not any("head" in name for name, _ in encoder.tower.named_parameters())  # SigLIP's pooling is not loaded


# Language models


def whole_ids(folder: Path, kind: str, text: str, system: str | None) -> torch.Tensor:
    """The prompt [1, L] for transformers' own model, made by the tokenizer alone: 16 image tokens for the picture."""
    tokenizer, image = AutoTokenizer.from_pretrained(folder), KINDS[kind].image
    in_parts = [{"type": "image"}, {"type": "text", "text": text}]
    messages = [{"role": "user", "content": in_parts if kind == "qwen2" else f"{image}\n{text}"}]
    if system:
        said = [{"type": "text", "text": system}] if kind == "qwen2" else system
        messages.insert(0, {"role": "system", "content": said})
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    encoded = tokenizer(rendered.replace(image, image * 16), add_special_tokens=kind == "llama3", return_tensors="pt")
    return encoded.input_ids


def answer_ids(decoder, visual, prompts) -> list[list[int]]:
    """The generated token ids of each prompt, special tokens and all."""
    decoder.completion = lambda num_prompt_tokens, ids: ids
    return decoder.generate(visual, prompts, max_new_tokens=12)


@pytest.mark.parametrize("released", [True, False], ids=["released", "transformers-5"])
@pytest.mark.parametrize(
    "tied", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["own-head", "tied"]
)  # families/test_loading.py ties heads, too
@pytest.mark.parametrize("kind", KINDS)
def test_all_kept_and_half_kept_say_what_transformers_own_model_says(tmp_path, kind, tied, released):
    siglip = kind != "mistral"
    strategy = "full" if siglip else "default"
    model = tiny_llava(tmp_path, kind, siglip=siglip, strategy=strategy, tied=tied, released=released)
    checkpoint = read_checkpoint(str(tmp_path))
    encoder, decoder = load_encoder(checkpoint, **CPU), load_decoder(checkpoint, **CPU)
    pictures, system = pixels(), None if kind == "mistral" else TOLD
    inputs = AutoImageProcessor.from_pretrained(tmp_path)(list(pictures.numpy()), return_tensors="pt")["pixel_values"]
    greedy = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": decoder.end_tokens}
    features = [region.features for (region,) in encoder.regions(list(pictures), [SIZE] * 3, "joint")]
    prompts = [decoder.encode_prompt(text, system=system) for text in ASKED]

    def visual(kept: list[torch.Tensor]) -> list:
        spans = [checkpoint.geometry.span(SIZE, index.numpy(), checkpoint.image_token) for index in kept]
        return [[(features[i][index], span)] for i, (index, span) in enumerate(zip(kept, spans, strict=True))]

    ids = [whole_ids(tmp_path, kind, text, system) for text in ASKED]
    expected = []
    for row, picture in zip(ids, inputs, strict=True):
        new = model.generate(input_ids=row, attention_mask=torch.ones_like(row), pixel_values=picture[None], **greedy)
        expected.append(new[0, row.shape[1] :].tolist())
    assert answer_ids(decoder, visual([torch.arange(16)] * 3), prompts) == expected
    assert len({tuple(answer) for answer in expected}) == 3  # the pictures and the prompts matter

    # Ragged in one batch; the reference is the whole model on the rows of its own features that are left.
    kept = [torch.randperm(16)[:count].sort().values for count in (8, 5, 1)]
    with torch.no_grad():
        own = model.model.get_image_features(inputs).pooler_output
    answers = answer_ids(decoder, visual(kept), prompts)
    for i, (row, index) in enumerate(zip(ids, kept, strict=True)):
        embeds = model.get_input_embeddings()(row)[0]
        at = (row[0] == checkpoint.image_token).nonzero()[:, 0]
        embeds = torch.cat([embeds[: at[0]], own[i][index], embeds[at[-1] + 1 :]])[None]
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        assert answers[i] == model.generate(inputs_embeds=embeds, attention_mask=mask, **greedy)[0].tolist()
        with torch.inference_mode():
            rows = decoder.place(visual(kept)[i], prompts[i]).rows
            got = decoder.model(inputs_embeds=rows[None]).logits[0, -1].log_softmax(-1)
            wanted = model(inputs_embeds=embeds, attention_mask=mask).logits[0, -1].log_softmax(-1)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)


# Methods


@pytest.fixture(scope="module")
def towers(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints by tower: CLIP, SigLIP, SigLIP whose first patch is dropped, CLIP with its class token."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("clip", "siglip", "siglip_15", "clip_17")}
    for name, folder in folders.items():
        strategy = "full" if name in ("siglip", "clip_17") else "default"
        tiny_llava(folder, "qwen2", siglip=name.startswith("siglip"), strategy=strategy)
    return folders


@pytest.mark.parametrize(
    ("tower", "cannot"),
    [
        ("clip", set()),
        ("siglip", {"prumerge", "prumerge_plus"}),
        pytest.param("siglip_15", {"prumerge", "prumerge_plus", "m3"}, marks=pytest.mark.slow),
        pytest.param("clip_17", {"prumerge", "prumerge_plus", "m3"}, marks=pytest.mark.slow),
    ],
)
def test_every_method_runs_on_a_tower_or_is_refused_in_one_line(towers, tower, cannot):
    checkpoint = read_checkpoint(str(towers[tower]))
    refused = set()
    for method in METHODS.values():
        given = {"relevance": "words"} if "relevance" in method.requires else {}
        if "number or file" in {setting.kind for setting in method.settings.values()}:
            given = {"threshold": 0.1}
        settings = method.check(given)
        if reason := checkpoint.record.refuses(method, checkpoint, settings):
            assert method.name in reason
            assert "\n" not in reason
            refused.add(method.name)
            if "class_attention" in method.requires:
                with pytest.raises(ValueError, match="need a vision tower with a class token"):
                    load_encoder(checkpoint, **CPU, attention=True)
        elif isinstance(method, BeforeModel):
            assert set(reduced_counts(checkpoint, method, settings)) <= set(range(1, checkpoint.geometry.fixed + 1))
    assert refused == cannot


def reduced_counts(checkpoint, method, settings) -> list[int]:
    """The number of tokens that a method leaves of each of three pictures, at 4 wanted."""
    encoder = load_encoder(checkpoint, **CPU, attention="class_attention" in method.requires)
    seen = [
        r for (r,) in encoder.regions(list(pixels()), [SIZE] * 3, "joint", before_projector=method.before_projector)
    ]

    def stacked(name: str):
        rows = [getattr(region, name) for region in seen]
        return None if rows[0] is None else torch.stack(rows)

    features, texts, relevance = stacked("features"), ASKED, None
    if "relevance" in method.requires:
        relevance = make_relevance(settings, checkpoint.path, **CPU)(stacked("patches"), features, texts)
    inputs = Seen(
        features=features,
        seeds=torch.arange(3),
        prompts=[[text] for text in texts],
        keys=stacked("keys"),
        class_attention=stacked("class_attention"),
        relevance=relevance,
    )
    shared = {"gamma": 0.01, "gamma_scale": "released", "seed": 0}
    return [len(reduced.features) for picture in method.build(settings, shared)(inputs, 4) for reduced in picture]


def test_relevance_by_clip_needs_a_clip_tower(towers):
    settings = METHODS["cdpruner"].check({"clip": "openai/clip-vit-large-patch14-336"})
    by_tower = {name: read_checkpoint(str(folder)) for name, folder in towers.items()}
    refused = {name: c.record.refuses(METHODS["cdpruner"], c, settings) for name, c in by_tower.items()}
    assert refused["clip"] is refused["clip_17"] is None
    assert "needs a CLIP tower" in refused["siglip"]
    assert "settings.relevance=words" in refused["siglip_15"]


@pytest.mark.parametrize("layer", [-1, 4, [-2, -3]])
def test_class_attention_needs_a_layer_behind_one_feature_layer(tmp_path, layer):
    tiny_llava(tmp_path, layer=layer)
    checkpoint = read_checkpoint(str(tmp_path))
    assert not checkpoint.class_attention
    assert "one vision_feature_layer before the last" in checkpoint.record.refuses(METHODS["prumerge"], checkpoint)
