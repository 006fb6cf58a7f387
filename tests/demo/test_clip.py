"""The shipped CLIP: it is the demo tower's, a caption finds its image, and CDPruner chooses by it."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPTextModelWithProjection

from demo import labels as lab
from demo.evaluate_clip import ASK, auc, pointing, retrieval, shows, unit_images, unit_texts, whole_clip
from demo.language import caption
from demo.render import render
from demo.train_clip import SHIPPED, build_text_tokenizer, embed
from demo.train_clip import main as train_clip
from demo.world import scene_at
from otprune import num_kept
from otprune.models import llava_encoder, read_checkpoint
from otprune.models.relevance import ClipRelevance
from pipelines.config.keys import PruneConfig
from pipelines.stages.gpu import Place
from pipelines.stages.prune import Pruner

SCENES = [scene_at("corpus", index) for index in range(40)]
RETENTION = 0.05

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def clip():
    return whole_clip()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SHIPPED)


def test_it_holds_everything_but_the_encoder_of_the_demos_own_tower(demo_model):
    ours, llava = (load_file(folder / "model.safetensors") for folder in (SHIPPED, demo_model))
    assert {weight.dtype for weight in ours.values()} == {torch.float16}
    tower = {name: weight for name, weight in ours.items() if name.startswith("vision_model.")}
    assert tower.keys() == {"vision_model.post_layernorm.weight", "vision_model.post_layernorm.bias"}
    for name, weight in tower.items():
        assert torch.equal(weight, llava[f"vision_tower.{name}"])
    clip_config, llava_config = (json.loads((folder / "config.json").read_text()) for folder in (SHIPPED, demo_model))
    width = llava_config["vision_config"]["hidden_size"]
    assert clip_config["vision_config"]["hidden_size"] == width == ours["visual_projection.weight"].shape[1]
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 1.2e6


def test_our_recipe_builds_the_tokenizer_that_is_shipped(tokenizer):
    assert build_text_tokenizer().get_vocab() == tokenizer.get_vocab()
    ids = tokenizer("is there a red star ?").input_ids
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.unk_token_id not in ids


def test_a_text_is_pooled_at_its_end_whatever_pads_it(clip, tokenizer):
    """transformers pools elsewhere where the end token has the number 2, as in the demo's own tokenizer."""
    texts = ["a small red star", "a large blue ring and a small white heart on a dark background ."]
    tower = CLIPTextModelWithProjection.from_pretrained(SHIPPED, dtype=torch.float32)
    with torch.inference_mode():
        together = embed(clip, tokenizer, texts)
        for row, text in zip(together, texts, strict=True):
            ids = tokenizer(text, return_tensors="pt").input_ids
            last = clip.text_model(input_ids=ids).last_hidden_state[0, -1]
            torch.testing.assert_close(row, clip.text_projection(last), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(tower(input_ids=ids).text_embeds[0], row, atol=1e-4, rtol=1e-4)


def test_a_caption_finds_its_image_among_forty(clip, tokenizer):
    texts = unit_texts(clip, tokenizer, [caption(scene) for scene in SCENES])
    assert retrieval(texts, unit_images(clip, SCENES), among=len(SCENES)) > 0.7  # chance is 0.025


def test_training_changes_no_weight_of_the_tower(tmp_path, demo_model):
    assert train_clip(["--out", str(tmp_path), "--steps", "2", "--batch", "4", "--cached", "8"]) == 0
    state = torch.load(tmp_path / "clip.pt", weights_only=True)["weights"]
    start = "clip.vision_model."
    tower = {name.removeprefix(start): weight for name, weight in state.items() if name.startswith(start)}
    llava = load_file(demo_model / "model.safetensors")
    for name, weight in tower.items():
        assert torch.equal(weight, llava[f"vision_tower.vision_model.{name}"].float())
    trained = load_file(tmp_path / "clip" / "model.safetensors")
    assert trained.keys() == load_file(SHIPPED / "model.safetensors").keys()


def test_cdpruner_keeps_other_tokens_for_another_question_and_what_it_names_more_often_than_chance(demo_model):
    """Diverse tokens do that by themselves; what this relevance adds is less than nothing (docs/accuracy.md)."""
    checkpoint, place = read_checkpoint(str(demo_model)), Place("cpu", "float32")
    clip, chance = (
        Pruner(checkpoint, PruneConfig(method=method, retention=RETENTION, gamma_scale="trace"), settings, place)
        for method, settings in (("cdpruner", {"clip": str(SHIPPED)}), ("random", {}))
    )
    held: dict[str, list[bool]] = {"clip": [], "chance": []}
    for number, scene in enumerate(SCENES[:12]):
        drawing = render(scene)
        marks = torch.from_numpy(lab.patch_labels(scene, drawing.alpha))
        pictures, sizes = [torch.from_numpy(drawing.pixels)], [drawing.pixels.shape[:2]]
        prompts = [ASK.format(shape.color, shape.kind) for shape in scene.shapes]
        (kept,), ((drawn,),) = (prune(pictures, sizes, [number], [prompts]) for prune in (clip, chance))
        assert {len(each.source) for each in kept} == {num_kept(RETENTION, 256)}
        assert len({tuple(each.source.tolist()) for each in kept}) == len(prompts)
        for shape, each in zip(scene.shapes, kept, strict=True):
            named = shows(marks, shape.color, shape.kind)
            held["clip"].append(named[each.source].any().item())
            held["chance"].append(named[drawn.source].any().item())
    assert sum(held["clip"]) > 1.5 * sum(held["chance"])


def test_patches_are_aligned_with_the_text_that_names_them(demo_model):
    """Against CDPruner's minus sign, which supposes that they are anti-aligned; demo/README.md has the numbers."""
    place = {"dtype": torch.float32, "device": "cpu"}
    relevance = ClipRelevance(SHIPPED, **place)
    encoder = llava_encoder.load(read_checkpoint(str(demo_model)), **place)
    assert 0.3 < pointing(relevance, encoder, SCENES)["all"] < 0.47


def test_auc_is_the_share_of_pairs_in_order():
    assert auc(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 0.0, 3.0])) == pytest.approx(3.5 / 6)
