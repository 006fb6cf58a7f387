"""What each method leaves of an image in the encode stage, against the definition applied to the whole model."""

import hashlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, LlavaForConditionalGeneration

from otprune import select_tokens
from otprune.merge import merge_leftovers
from otprune.methods.cdpruner import cdpruner
from otprune.methods.prumerge import prumerge
from otprune.methods.salient.scope import scope
from otprune.methods.salient.score import score
from otprune.models import CheckpointError, read_checkpoint
from otprune.models.llava_encoder import LlavaEncoder
from otprune.models.relevance import ClipRelevance, WordRelevance
from pipelines.benchmarks.prompts import LETTER, SINGLE_WORD
from pipelines.config.keys import PruneConfig
from pipelines.images.decode import Picture
from pipelines.output.unit import Unit
from pipelines.stages.encode import Encoder
from pipelines.stages.gpu import Place
from pipelines.stages.read import flat_pixels
from pipelines.stages.token_arrays import from_numpy, unpack
from pipelines.stages.unit_batch import Image, UnitBatch

PROMPTS = ["describe the image .", "is there a circle ?"]


@pytest.fixture(scope="module")
def encoder(demo_model):
    made = {}

    def make(method: str, batch_size: int = 4, **settings) -> Encoder:
        key = (method, batch_size, *settings.items())
        if key not in made:
            made[key] = make_encoder(demo_model, method, settings, batch_size=batch_size)
        return made[key]

    return make


def make_encoder(model: Path, method: str, settings: dict, batch_size: int = 4, merge: float | None = None) -> Encoder:
    prune = PruneConfig(method=method, retention=0.1, gamma_scale="trace", merge=merge)
    place = Place("cpu", "float32")
    checkpoint = read_checkpoint(str(model))
    return Encoder(checkpoint=checkpoint, prune=prune, settings=settings, batch_size=batch_size, place=place)


@pytest.fixture(scope="module")
def whole(demo_model):
    return LlavaForConditionalGeneration.from_pretrained(demo_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def seen(whole, encoder, scene_pixels):
    """Hidden state -2 [6, 257, 128], and the last layer's queries and keys, as the whole model computes them."""
    caught = {}
    attention = whole.model.vision_tower.encoder.layers[-1].self_attn
    hooks = [
        getattr(attention, name).register_forward_hook(lambda _, __, output, name=name: caught.update({name: output}))
        for name in ("q_proj", "k_proj")
    ]
    statistics = tower_of(encoder("none")).normalize
    pixels = ((torch.from_numpy(scene_pixels) / 255 - statistics.mean) / statistics.std).permute(0, 3, 1, 2)
    with torch.inference_mode():
        hidden = whole.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
    for hook in hooks:
        hook.remove()
    return hidden, caught["q_proj"], caught["k_proj"]


def tower_of(encoder: Encoder) -> LlavaEncoder:
    assert isinstance(encoder.pruner.encoder, LlavaEncoder)
    return encoder.pruner.encoder


def encoded(encoder: Encoder, pixels: np.ndarray, prompts: list[str] = PROMPTS) -> UnitBatch:
    images = [
        Image(str(i), "a", i, hashlib.sha256(picture.tobytes()).hexdigest(), prompts, sizes=[picture.shape[:2]])
        for i, picture in enumerate(pixels)
    ]
    arrays = {"pixels": flat_pixels([Picture(picture, picture.shape[:2]) for picture in pixels])}
    unit_batch = UnitBatch(Unit("0123456789ab", 0, len(pixels), ("a",)), images=images, arrays=arrays)
    unit_batch = UnitBatch.from_row(encoder(unit_batch.to_row()))
    assert unit_batch.error is None
    return unit_batch


def tokens_of(unit_batch: UnitBatch) -> torch.Tensor:
    """The tokens [rows, K, R] of rows that hold equally many."""
    return torch.stack([from_numpy(row) for row in unit_batch.arrays["tokens"].rows()])


def test_every_token_is_kept_for_methods_inside_the_model(encoder, scene_pixels):
    plain = encoded(encoder("none"), scene_pixels)
    assert torch.equal(tokens_of(encoded(encoder("fastv"), scene_pixels)), tokens_of(plain))


def test_leftovers_are_merged_into_the_tokens_that_the_method_keeps(encoder, demo_model, scene_pixels):
    every, dropped = (encoded(encoder(method), scene_pixels) for method in ("none", "divprune"))
    merging = make_encoder(demo_model, "divprune", {}, merge=0.4)
    merged = encoded(merging, scene_pixels)
    for tokens, kept, rows in zip(tokens_of(every), dropped.arrays["kept"].rows(), tokens_of(merged), strict=True):
        expected = merge_leftovers(tokens, tokens, torch.from_numpy(kept.astype(np.int64)), 0.4)
        torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-5)
    assert [rows.tolist() for rows in merged.arrays["kept"].rows()] == [
        rows.tolist() for rows in dropped.arrays["kept"].rows()
    ]


def test_pooled_tokens_are_the_means_of_their_cells_and_name_their_centre(encoder, scene_pixels):
    everything = tokens_of(encoded(encoder("none"), scene_pixels)).unflatten(1, (16, 16))
    unit_batch = encoded(encoder("m3", grid=4), scene_pixels)
    for cell, kept in enumerate(unit_batch.arrays["kept"].rows()[0]):
        row, column = 4 * (cell // 4), 4 * (cell % 4)
        mean = everything[:, row : row + 4, column : column + 4].mean(dim=(1, 2))
        torch.testing.assert_close(tokens_of(unit_batch)[:, cell], mean)
        assert kept == (row + 2) * 16 + column + 2


def test_the_pooled_grid_is_the_smallest_with_retentions_tokens(encoder, scene_pixels):
    assert tokens_of(encoded(encoder("m3"), scene_pixels[:1])).shape == (1, 64, 192)  # 26 of 256: 16 are too few


@pytest.mark.parametrize(
    ("method", "settings", "rule"),
    [
        ("prumerge", {}, {"k": 26}),
        ("prumerge", {"adaptive": True}, {}),
        ("prumerge_plus", {}, {"plus": True}),
    ],
)
def test_prumerge_merges_what_the_projector_reads_by_the_last_layers_attention(
    encoder, whole, seen, scene_pixels, method, settings, rule
):
    hidden, queries, keys = seen
    attention = (queries[:, :1] @ keys.mT / 128**0.5).softmax(dim=-1)[:, 0, 1:]
    expected = prumerge(hidden[:, 1:], keys[:, 1:], attention, **rule)
    unit_batch = encoded(encoder(method, **settings), scene_pixels)
    for (pictures, _), merged in zip(unpack(unit_batch), expected, strict=True):
        [rows] = pictures
        assert rows.kept.tolist() == merged.source.tolist()
        with torch.inference_mode():
            tokens = whole.model.multi_modal_projector(merged.features)
        torch.testing.assert_close(rows.tokens, tokens, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("method", "choose"), [("scope", scope), ("score", score)])
def test_saliency_is_the_attention_in_the_layer_that_makes_the_features(
    encoder, demo_model, seen, scene_pixels, method, choose
):
    """Compared on the projector's input, by transformers' own attention weights."""
    hidden, _, _ = seen
    model = LlavaForConditionalGeneration.from_pretrained(demo_model, dtype=torch.float32, attn_implementation="eager")
    statistics = tower_of(encoder("none")).normalize
    pixels = ((torch.from_numpy(scene_pixels) / 255 - statistics.mean) / statistics.std).permute(0, 3, 1, 2)
    with torch.inference_mode():
        weights = model.model.vision_tower(pixels, output_attentions=True).attentions[-2]
    expected = choose(hidden[:, 1:], 26, weights[:, :, 0, 1:].sum(dim=1)).sort().values
    kept = np.stack(encoded(encoder(method), scene_pixels).arrays["kept"].rows())
    assert kept.tolist() == expected.tolist()


def test_the_layer_that_attention_needs_is_loaded_for_its_methods_alone(encoder):
    assert tower_of(encoder("none")).reader is None
    names = {name.split(".")[1] for name in tower_of(encoder("prumerge")).state_dict() if name.startswith("reader")}
    assert names == {"self_attn", "layer_norm1"}


def test_cdpruner_keeps_tokens_for_each_prompt_by_its_words(encoder, whole, demo_model, scene_pixels):
    features = tower_of(encoder("none"))(torch.from_numpy(scene_pixels))
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    unit_batch = encoded(encoder("cdpruner", relevance="words", theta=0.5), scene_pixels)
    kept = np.stack(unit_batch.arrays["kept"].rows()).reshape(6, 2, 26)
    for number, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        words = whole.get_input_embeddings()(ids).detach()
        relevance = torch.cosine_similarity(features[:, :, None], words[:, None], dim=-1).mean(dim=-1)
        expected = select_tokens(features, 26, method=partial(cdpruner, relevance=relevance, theta=0.5))
        assert np.array_equal(kept[:, number], expected)
    assert not np.array_equal(kept[:, 0], kept[:, 1])
    for image, prompts in enumerate(unpack(unit_batch)):
        for number, (rows,) in enumerate(prompts):
            assert torch.equal(rows.tokens, features[image, kept[image, number]])


@pytest.fixture(scope="module")
def clip_folder(demo_model, tmp_path_factory):
    """A small random CLIP as wide as the demo's tower, with the demo's tokenizer and room for 4 tokens of text."""
    folder = tmp_path_factory.mktemp("clip")
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"vocab_size": 128, "max_position_embeddings": 6, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()
    torch.nn.init.normal_(model.vision_model.post_layernorm.weight)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo_model).save_pretrained(folder)
    return folder, model


def test_clip_relevance_is_the_negative_cosine_averaged_over_chunks(clip_folder, demo_model):
    folder, model = clip_folder
    relevance = ClipRelevance(folder, dtype=torch.float32, device="cpu")
    patches, prompts = torch.randn(2, 9, 128), ["is there a circle ?", "describe the image ."]
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    with torch.inference_mode():
        images = model.visual_projection(model.vision_model.post_layernorm(patches))
        for i, prompt in enumerate(prompts):
            ids = tokenizer(prompt, add_special_tokens=False).input_ids
            chunks = [torch.tensor([[1, *ids[start : start + 4], 2]]) for start in range(0, len(ids), 4)]
            assert len(chunks) == (2 if i == 0 else 1)
            texts = [model.text_projection(model.text_model(chunk).pooler_output) for chunk in chunks]
            expected = torch.stack([-torch.cosine_similarity(images[i], text, dim=-1) for text in texts]).mean(dim=0)
            torch.testing.assert_close(relevance(patches, patches, prompts)[i], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("instruction", [SINGLE_WORD, LETTER])
def test_the_instruction_how_to_answer_has_no_part_in_relevance(clip_folder, demo_model, instruction):
    question = "is there a circle ?"
    for kind, folder in ((ClipRelevance, clip_folder[0]), (WordRelevance, demo_model)):
        relevance = kind(folder, dtype=torch.float32, device="cpu")
        patches = torch.randn(2, 9, 128 if kind is ClipRelevance else 192)
        bare, asked = ([text] * 2 for text in (question, f"{question}\n{instruction}"))
        assert torch.equal(relevance(patches, patches, asked), relevance(patches, patches, bare))
        other = [f"{question}\nanswer briefly ."] * 2
        assert not torch.equal(relevance(patches, patches, other), relevance(patches, patches, bare))


def test_cdpruner_with_a_clip_of_its_own_runs(encoder, clip_folder, scene_pixels):
    unit_batch = encoded(encoder("cdpruner", clip=str(clip_folder[0])), scene_pixels[:2])
    assert tokens_of(unit_batch).shape == (4, 26, 192)


def test_cdpruner_without_a_clip_says_what_to_do(demo_model):
    with pytest.raises(ValueError, match=r"settings.clip must name the CLIP .* settings.relevance=words"):
        make_encoder(demo_model, "cdpruner", {})
    with pytest.raises(CheckpointError, match=r"prune.settings.clip must be a checkpoint of the families clip"):
        make_encoder(demo_model, "cdpruner", {"clip": str(demo_model)})


@pytest.mark.parametrize("method", ["m3", "prumerge", "prumerge_plus", "cdpruner"])
def test_the_batch_does_not_change_what_is_left(encoder, scene_pixels, method):
    settings = {"relevance": "words"} if method == "cdpruner" else {}
    together = encoded(encoder(method, **settings), scene_pixels)
    alone = encoded(encoder(method, batch_size=1, **settings), scene_pixels)
    assert np.array_equal(alone.arrays["kept"].lengths, together.arrays["kept"].lengths)
    assert np.array_equal(alone.arrays["kept"].values, together.arrays["kept"].values)
    np.testing.assert_allclose(alone.arrays["tokens"].values, together.arrays["tokens"].values, atol=1e-4)
