"""LLaVA-1.6: crops, packing and captions against transformers' own model; selection over 2,880 tokens on a CPU."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from otprune import num_kept, select_tokens
from otprune.anyres import pack_tiles
from otprune.families import Options
from otprune.families.llava import Square
from otprune.families.llava_next import Tiled, best_resolution
from otprune.models import llava_encoder, load_decoder, load_encoder, read_checkpoint
from otprune.models.checkpoint import CheckpointError
from otprune.models.relevance import WordRelevance
from otprune.shapes import MODELS
from pipelines.config.keys import GenerateConfig, PromptConfig, PruneConfig
from pipelines.engines.transformers_actor import Generator
from pipelines.images.decode import Picture
from pipelines.images.frames import render
from pipelines.images.resize import Raster
from pipelines.output.unit import Unit
from pipelines.stages.encode import Encoder
from pipelines.stages.gpu import Place
from pipelines.stages.read import flat_pixels
from pipelines.stages.token_arrays import KeptRows, unpack
from pipelines.stages.unit_batch import Image, UnitBatch

SIDE = 28  # pixels of a crop: 2 x 2 patches
RESOLUTIONS = ((28, 56), (56, 28), (56, 56), (84, 28), (28, 84))
GEOMETRY = Tiled(side=SIDE, grid_side=2, resolutions=RESOLUTIONS, background=(122, 116, 104))
SHAPES = [(40, 40), (30, 77), (91, 20), (57, 44), (28, 28), (13, 200)]  # height, width
CPU = Place("cpu", "float32")
PROMPT = "describe the image ."


@pytest.fixture(scope="module")
def folder(tmp_path_factory, demo_model):
    """A small random LLaVA-1.6 checkpoint with the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("next")
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    text = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(image_size=SIDE, patch_size=14, **vision),
        text_config=LlamaConfig(vocab_size=128, pad_token_id=0, bos_token_id=1, eos_token_id=2, **text),
        image_grid_pinpoints=[list(size) for size in RESOLUTIONS],
        image_token_index=4,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    model = LlavaNextForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    return LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def pictures():
    generator = np.random.default_rng(0)
    return [PILImage.fromarray(generator.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in SHAPES]


@pytest.fixture(scope="module")
def processed(pictures):
    """transformers' own crops, normalised, and image sizes."""
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=[list(size) for size in RESOLUTIONS],
    )
    return processor(pictures, return_tensors="pt")


def cut(picture: PILImage.Image) -> np.ndarray:
    """The crops of a picture."""
    frame = GEOMETRY.frame((picture.height, picture.width))
    crops = render(Raster(picture, picture.width, picture.height), frame, GEOMETRY.background)
    assert crops.shape == frame.shape
    return crops


def size_of(picture: PILImage.Image) -> tuple[int, int]:
    return picture.height, picture.width


def make_encoder(
    folder: Path, method: str, retention: float = 1.0, settings: dict | None = None, per_tile: bool = False
) -> Encoder:
    prune = PruneConfig(method=method, retention=retention, gamma_scale="trace", per_tile=per_tile)
    checkpoint = read_checkpoint(str(folder))
    return Encoder(checkpoint=checkpoint, prune=prune, settings=settings or {}, batch_size=4, place=CPU)


def encoded(folder, pictures, method: str, retention: float = 0.3, **settings) -> UnitBatch:
    encoder = make_encoder(folder, method, retention, **settings)
    images = [
        Image(str(i), "a", i, hashlib.sha256(p.tobytes()).hexdigest(), [PROMPT], sizes=[size_of(p)])
        for i, p in enumerate(pictures)
    ]
    arrays = {"pixels": flat_pixels([Picture(cut(picture), size_of(picture)) for picture in pictures])}
    unit_batch = UnitBatch(Unit("0123456789ab", 0, len(pictures), ("a",)), images=images, arrays=arrays)
    unit_batch = UnitBatch.from_row(encoder(unit_batch.to_row()))
    assert unit_batch.error is None
    return unit_batch


def kept_of(unit_batch: UnitBatch) -> list[KeptRows]:
    """What is kept of each image of one picture and one prompt."""
    kept = unpack(unit_batch)
    assert all(len(prompts) == len(prompts[0]) == 1 for prompts in kept)
    return [prompts[0][0] for prompts in kept]


def test_crops_are_those_of_transformers(pictures, processed):
    mean, std = (torch.tensor(LlavaNextImageProcessorPil().to_dict()[name]) for name in ("image_mean", "image_std"))
    for picture, expected in zip(pictures, processed["pixel_values"], strict=True):
        got = (torch.from_numpy(cut(picture)) / 255 - mean) / std
        torch.testing.assert_close(got.permute(0, 3, 1, 2), expected[: len(got)].float(), atol=1e-4, rtol=0)


def test_the_best_resolution_shows_most_and_wastes_least():
    best = [(56, 56), (28, 84), (84, 28), (56, 56), (28, 56), (28, 84)]
    assert [best_resolution(size, RESOLUTIONS) for size in SHAPES] == best


def own_code_of_llava(size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of what LLaVA's own code cuts: of the pairs, read as (width, height), the first with the most
    pixels of the picture and, among those, the least waste."""
    best, most, least = None, 0, 0
    for width, height in RESOLUTIONS:
        scale = min(width / size[1], height / size[0])
        shown = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        if best is None or (shown, -(width * height - shown)) > (most, -least):
            best, most, least = (height, width), shown, width * height - shown
    return best


def test_original_tiles_are_those_of_llavas_own_code_and_differ_for_small_pictures_alone(folder):
    sizes = [(height, width) for height in range(5, 90, 3) for width in range(5, 90, 3)]
    own, theirs = (
        read_checkpoint(str(folder), Options(original_tiles=original)).geometry for original in (True, False)
    )
    frames = {size: (own.frame(size), theirs.frame(size)) for size in sizes}
    assert all((mine.height, mine.width) == own_code_of_llava(size) for size, (mine, _) in frames.items())
    differ = {size for size, (mine, other) in frames.items() if mine != other}
    assert differ == {size for size in sizes if max(size) <= SIDE}
    small = [frames[size] for size in differ]
    assert {(mine.rows, mine.columns, other.rows, other.columns) for mine, other in small} == {(2, 1, 1, 2)}


def test_original_tiles_are_refused_where_there_are_none(demo_model):
    with pytest.raises(CheckpointError, match=r"model\.original_tiles must be false: .*, got LLaVA-1\.5"):
        read_checkpoint(str(demo_model), Options(original_tiles=True))


def test_packed_tokens_are_those_of_transformers(folder, whole, pictures):
    unit_batch = encoded(folder, pictures, "none")
    encoder = load_encoder(folder, dtype=torch.float32, device="cpu")
    crops = [torch.from_numpy(cut(picture)) for picture in pictures]
    most = max(map(len, crops))
    padded = torch.stack([torch.cat([c, c.new_zeros(most - len(c), SIDE, SIDE, 3)]) for c in crops])
    pixels = ((padded / 255 - encoder.normalize.mean) / encoder.normalize.std).permute(0, 1, 4, 2, 3)
    with torch.inference_mode():
        expected = whole.model.get_image_features(pixels, torch.tensor(SHAPES)).pooler_output
    for image, rows, tokens in zip(unit_batch.images, kept_of(unit_batch), expected, strict=True):
        assert image.num_visual_tokens == len(tokens) == GEOMETRY.num_visual(image.sizes[0])
        torch.testing.assert_close(rows.tokens, tokens, atol=1e-4, rtol=1e-4)
        assert rows.kept.tolist() == list(range(len(tokens)))
    assert len({len(tokens) for tokens in expected}) > 3


def test_unpruned_logits_and_answers_are_those_of_transformers(folder, whole, pictures):
    unit_batch = encoded(folder, pictures, "none")
    decoder = load_decoder(folder, dtype=torch.float32, device="cpu")
    before, after = decoder.encode_prompt(PROMPT, "plain")
    generator = Generator(
        checkpoint=read_checkpoint(str(folder)),
        prompt=PromptConfig(conversation="plain"),
        generate=GenerateConfig(max_new_tokens=5, batch_size=4),
        prune=PruneConfig(method="none"),
        settings={},
        place=CPU,
    )
    captions = UnitBatch.from_row(generator(unit_batch.to_row())).images
    for rows, image in zip(kept_of(unit_batch), captions, strict=True):
        tokens = rows.tokens
        ids = torch.tensor([[*before, *[4] * len(tokens), *after]])
        row = decoder.place(tokens, (before, after)).rows
        with torch.inference_mode():
            embeds = whole.get_input_embeddings()(ids)
            embeds[:, len(before) : len(before) + len(tokens)] = tokens
            expected = whole.model.language_model(inputs_embeds=embeds).last_hidden_state
            torch.testing.assert_close(
                decoder.model(inputs_embeds=row[None]).logits, whole.lm_head(expected), atol=1e-4, rtol=1e-4
            )
            answer = whole.lm_head(expected)[0, -1].argmax()
        assert image.answers[0].caption.startswith(decoder.tokenizer.decode([answer], skip_special_tokens=True))
        assert image.answers[0].num_kept_tokens == len(tokens)


def test_joint_selection_is_among_all_tokens_of_the_image(folder, pictures):
    everything = [rows.tokens for rows in kept_of(encoded(folder, pictures, "none"))]
    for tokens, rows in zip(everything, kept_of(encoded(folder, pictures, "otprune")), strict=True):
        (expected,) = select_tokens(tokens[None], num_kept(0.3, len(tokens)), gamma_scale="trace")
        assert rows.kept.tolist() == expected.tolist()
        torch.testing.assert_close(rows.tokens, tokens[expected], atol=1e-5, rtol=1e-5)


def test_pictures_of_mixed_sizes_in_one_unit_keep_what_each_keeps_alone(folder, pictures):
    """Twice the same sizes, so that some pictures share a batch and a call of the method and others do not."""
    together = encoded(folder, pictures + pictures[::-1], "otprune")
    rows = kept_of(together)
    assert len({len(kept.kept) for kept in rows}) > 3
    for picture, image, kept in zip(pictures + pictures[::-1], together.images, rows, strict=True):
        alone = encoded(folder, [picture], "otprune")
        (expected,) = kept_of(alone)
        assert kept.kept.tolist() == expected.kept.tolist()
        assert kept.size == size_of(picture)
        assert image.num_visual_tokens == alone.images[0].num_visual_tokens
        torch.testing.assert_close(kept.tokens, expected.tokens, atol=1e-5, rtol=1e-5)


def raster(size: tuple[int, int], chosen: list[int]) -> list[int]:
    """The chosen of all tokens, crop after crop, as they lie in the picture: the overview, then its rows through all
    tiles. The places of the tokens are drawn on the picture's own grid."""
    frame = GEOMETRY.frame(size)
    crops = np.arange(4 * (1 + frame.rows * frame.columns)).reshape(-1, 2, 2)
    picture = np.block([[crops[1 + r * frame.columns + c] for c in range(frame.columns)] for r in range(frame.rows)])
    return [token for token in [*crops[0].flatten(), *picture.flatten()] if token in chosen]


def test_selection_by_tile_is_that_of_each_crop_alone(folder, pictures):
    unit_batch = encoded(folder, pictures, "divprune", retention=0.5, per_tile=True)
    encoder = llava_encoder.load(read_checkpoint(str(folder)), dtype=torch.float32, device="cpu")
    for picture, image, rows in zip(pictures, unit_batch.images, kept_of(unit_batch), strict=True):
        features = encoder(torch.from_numpy(cut(picture)))
        index = select_tokens(features, 2, method="divprune") + torch.arange(len(features))[:, None] * 4
        chosen = raster(size_of(picture), index.flatten().tolist())
        assert rows.kept.tolist() == chosen
        torch.testing.assert_close(rows.tokens, features.flatten(0, 1)[chosen], atol=1e-5, rtol=1e-5)
        assert image.num_visual_tokens == 4 * len(features) == GEOMETRY.num_visual(size_of(picture), "tiles")


def test_pooling_is_of_each_crop_before_packing(folder, pictures):
    unit_batch = encoded(folder, pictures, "m3", settings={"grid": 1})
    encoder = llava_encoder.load(read_checkpoint(str(folder)), dtype=torch.float32, device="cpu")
    for picture, rows in zip(pictures, kept_of(unit_batch), strict=True):
        pooled = encoder(torch.from_numpy(cut(picture))).mean(dim=1, keepdim=True)
        frame = GEOMETRY.frame(size_of(picture))
        layout = {"grid": (frame.rows, frame.columns), "image_size": size_of(picture)}
        expected = pack_tiles(pooled, newline_D=encoder.newline, **layout)
        torch.testing.assert_close(rows.tokens, expected, atol=1e-5, rtol=1e-5)


def test_prumerge_works_tile_by_tile(folder, pictures):
    unit_batch = encoded(folder, pictures, "prumerge", retention=0.5)
    for picture, rows in zip(pictures, kept_of(unit_batch), strict=True):
        assert len(rows.tokens) == len(rows.kept) == 2 * len(cut(picture))
        assert rows.kept.tolist()[1::2] == [-1] * len(cut(picture))  # the extra token of each crop stands last in it


def test_cdpruner_scales_relevance_over_all_crops_and_keeps_raster_order(folder, pictures):
    """L = diag(r) S diag(r) in each crop, with r scaled by one minimum and one maximum of the picture. Of two tokens of
    a crop the greedy takes the largest L_ii = r_i^2, then the largest r_j^2 (1 - S_ij^2)."""
    unit_batch = encoded(folder, pictures, "cdpruner", retention=0.5, settings={"relevance": "words"})
    checkpoint = read_checkpoint(str(folder))
    encoder = llava_encoder.load(checkpoint, dtype=torch.float32, device="cpu")
    relevance = WordRelevance(folder, dtype=torch.float32, device="cpu")
    alone = 0
    for picture, rows in zip(pictures, kept_of(unit_batch), strict=True):
        features = encoder(torch.from_numpy(cut(picture)))
        scores = relevance(None, features, [PROMPT] * len(features)).double()

        def greedy(scores: torch.Tensor, low: torch.Tensor, high: torch.Tensor, unit: torch.Tensor) -> list[int]:
            weight = (scores - low + 1e-6) / (high - low)
            first = int(weight.argmax())
            gain = weight.square() * (1 - (unit @ unit[first]).square())
            gain[first] = -1
            return [first, int(gain.argmax())]

        units = torch.nn.functional.normalize(features.double(), dim=-1)
        pairs = list(zip(scores, units, strict=True))
        chosen = [
            4 * crop + i
            for crop, (own, unit) in enumerate(pairs)
            for i in greedy(own, scores.min(), scores.max(), unit)
        ]
        assert rows.kept.tolist() == raster(size_of(picture), chosen)
        by_crop = [4 * c + i for c, (own, unit) in enumerate(pairs) for i in greedy(own, own.min(), own.max(), unit)]
        alone += by_crop != chosen
    assert alone  # where each crop has a scale of its own, it keeps other tokens


# Large images


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns, in numbers."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("method", ["otprune", "otprune_centered", "logdet_linear", "divprune"])
def test_large_images_cost_no_cube_of_their_tokens_on_a_cpu(method):
    """N = 1440, whose N x N kernel is beyond the cache: never N^3 multiplications, never more than N^2 numbers."""
    N, D, k = 1440, 32, 140
    tokens = torch.randn(1, N, D)
    with Largest() as largest, FlopCounterMode(display=False) as counter:
        select_tokens(tokens, k, method=method)
    assert largest.numel <= N * N
    assert counter.get_total_flops() / 2 < N**3 / 2
    if method == "logdet_linear":
        assert largest.numel < N * N / 4


# Sizes of the released models, without their weights


@pytest.mark.slow
@pytest.mark.parametrize(("name", "hidden", "layers"), [("llava-1.5-13b", 5120, 40), ("llava-1.6-7b", 4096, 32)])
def test_the_released_sizes_fit_together_on_the_meta_device(name, hidden, layers):
    shape = MODELS[name].language
    assert (shape.hidden, shape.layers) == (hidden, layers)
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
            image_size=336, patch_size=14, projection_dim=768,
        ),
        text_config=LlamaConfig(
            hidden_size=hidden, intermediate_size=shape.intermediate, num_hidden_layers=layers,
            num_attention_heads=shape.heads, vocab_size=32064, max_position_embeddings=4096,
        ),
        image_token_index=32000,
    )  # fmt: skip
    with torch.device("meta"):
        tower, projector = AutoModel.from_config(config.vision_config), LlavaMultiModalProjector(config)
        language = AutoModelForCausalLM.from_config(config.text_config)
        geometry = Square(side=336, num_tokens=576, background=(0, 0, 0))
        encoder = llava_encoder.LlavaEncoder(config, tower, projector, [0.5] * 3, [0.5] * 3, geometry=geometry)
        features = encoder(torch.empty(5, 336, 336, 3, dtype=torch.uint8))
        assert features.shape == (5, 576, hidden)
        packed = pack_tiles(features, grid=(2, 2), image_size=(500, 1000), newline_D=torch.empty(hidden))
        visual = features[0] if "1.5" in name else packed
        assert len(packed) == 576 + 24 * 49
        logits = language(inputs_embeds=torch.cat([visual, torch.empty(57, hidden)])[None]).logits
        assert logits.shape == (1, len(visual) + 57, 32064)
    parameters = sum(parameter.numel() for parameter in language.parameters())
    assert round(parameters / 1e9, 1) == (13.0 if "13b" in name else 6.7)
