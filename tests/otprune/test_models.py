"""The two halves of LLaVA against the whole of it: the same features, the same tokens, the same words."""

import re

import pytest
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from demo.model import build_processor
from otprune.models import Completion, load_decoder, load_encoder

PROMPTS = ["describe the image .", "is there a circle ?", "how many shapes are there in the picture ?"]
IMAGES = 6
CPU = {"dtype": torch.float32, "device": "cpu"}


@pytest.fixture(scope="module")
def encoder(demo_model):
    return load_encoder(demo_model, **CPU)


@pytest.fixture(scope="module")
def decoder(demo_model):
    return load_decoder(demo_model, **CPU)


@pytest.fixture(scope="module")
def whole(demo_model):
    return LlavaForConditionalGeneration.from_pretrained(demo_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def pictures(scene_pixels):
    return [Image.fromarray(pixels) for pixels in scene_pixels]


@pytest.fixture(scope="module")
def features(encoder, scene_pixels):
    return encoder(torch.from_numpy(scene_pixels))


def keep(features: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """A random ascending subset of one image's tokens."""
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    return features[order[:count].sort().values]


# Halves


def test_each_half_holds_its_own_weights_and_nothing_else(encoder, decoder, whole):
    assert {name.split(".")[0] for name in encoder.state_dict()} == {"tower", "projector"}
    assert {name.split(".")[0] for name in decoder.model.state_dict()} == {"model", "lm_head"}

    def size(parameters) -> int:
        return sum(parameter.numel() for parameter in parameters)

    vision = size(whole.model.vision_tower.parameters()) + size(whole.model.multi_modal_projector.parameters())
    unused = size(whole.model.vision_tower.encoder.layers[-1].parameters())
    unused += size(whole.model.vision_tower.post_layernorm.parameters())
    assert size(encoder.parameters()) == vision - unused
    assert size(decoder.model.parameters()) == size(whole.parameters()) - vision


@pytest.mark.parametrize(("load", "mine"), [(load_encoder, "vision_tower|projector"), (load_decoder, "language_model")])
def test_a_half_reads_no_tensor_of_the_other(demo_model, monkeypatch, load, mine):
    import safetensors
    import transformers.modeling_utils

    read = []
    opener = safetensors.safe_open

    class Recorder:
        """An open file that notes which tensors are taken from it."""

        def __init__(self, *args, **options):
            self.file = opener(*args, **options)

        def __enter__(self):
            self.file = self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def get_tensor(self, name):
            read.append(name)
            return self.file.get_tensor(name)

        def get_slice(self, name):
            return Slice(name, self.file.get_slice(name))

    class Slice:
        """A tensor that is read once it is indexed."""

        def __init__(self, name, inner):
            self.name, self.inner = name, inner

        def __getitem__(self, index):
            read.append(self.name)
            return self.inner[index]

        def __getattr__(self, name):
            return getattr(self.inner, name)

    monkeypatch.setattr(safetensors, "safe_open", Recorder)
    monkeypatch.setattr(transformers.modeling_utils, "safe_open", Recorder)
    load(demo_model, **CPU)
    assert len(read) > 20
    assert all(re.search(mine, name) for name in read)


def test_halves_come_in_the_wanted_precision(demo_model):
    for dtype in (torch.float16, torch.bfloat16):
        encoder = load_encoder(demo_model, dtype=dtype, device="cpu")
        assert {parameter.dtype for parameter in encoder.parameters()} == {dtype}
        assert encoder(torch.zeros(1, 224, 224, 3, dtype=torch.uint8)).dtype == dtype
        decoder = load_decoder(demo_model, dtype=dtype, device="cpu")
        assert {parameter.dtype for parameter in decoder.model.parameters()} == {dtype}


# The whole model as the oracle


def test_visual_tokens_are_those_of_the_whole_model_from_its_own_processor(encoder, features, whole, decoder, pictures):
    inputs = build_processor(decoder.tokenizer).image_processor(pictures, return_tensors="pt")
    with torch.no_grad():
        expected = torch.stack(list(whole.model.get_image_features(inputs["pixel_values"]).pooler_output))
    assert features.shape == (IMAGES, encoder.num_tokens, encoder.row_width) == (IMAGES, 256, 192)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)  # float32, other order of operations


@pytest.mark.parametrize("prompt", PROMPTS)
def test_with_all_tokens_the_halves_say_what_the_whole_model_says(features, whole, decoder, pictures, prompt):
    processor = build_processor(decoder.tokenizer)
    inputs = processor(text=[f"USER: <image>\n{prompt} ASSISTANT:"] * IMAGES, images=pictures, return_tensors="pt")
    expected = whole.generate(**inputs, max_new_tokens=48, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    expected = [text.strip() for text in processor.batch_decode(expected, skip_special_tokens=True)]
    got = decoder.generate(list(features), [decoder.encode_prompt(prompt)] * IMAGES, max_new_tokens=48)
    assert [completion.text for completion in got] == expected
    assert len(set(expected)) > 1 or prompt != PROMPTS[0]  # the images matter, to a caption always
    assert got[0].num_prompt_tokens == inputs["input_ids"].shape[1]


@pytest.mark.parametrize("count", [1, 25, 200])
def test_with_pruned_tokens_the_halves_say_what_the_whole_model_says(features, whole, decoder, count):
    before, after = decoder.encode_prompt(PROMPTS[0])
    kept = [keep(tokens, count, seed) for seed, tokens in enumerate(features)]
    got = decoder.generate(kept, [(before, after)] * IMAGES, max_new_tokens=48)
    for tokens, completion in zip(kept, got, strict=True):
        embed = whole.get_input_embeddings()
        embeds = torch.cat([embed(torch.tensor([before])), tokens[None], embed(torch.tensor([after]))], dim=1)
        new_ids = whole.generate(
            inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]), max_new_tokens=48, do_sample=False
        )
        expected = decoder.tokenizer.decode(new_ids[0], skip_special_tokens=True).strip()
        assert completion.text == expected
        assert completion.num_prompt_tokens == embeds.shape[1] == len(before) + count + len(after)


CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}


def random_llava(folder, demo_model, *, siglip=False, layer=-2, strategy="default", qwen=False, tied=False):
    """A random LLaVA of four vision and two text layers with the demo's tokenizer, saved to `folder`."""
    torch.manual_seed(0)
    vision = (SiglipVisionConfig if siglip else CLIPVisionConfig)(**CLIP, num_hidden_layers=4)
    text = (Qwen2Config if qwen else LlamaConfig)(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=4,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=tied,
    )
    model = LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # far from the near-uniform answers of the usual start
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((demo_model / name).read_bytes())
    return model


@pytest.mark.parametrize("siglip", [False, True])
@pytest.mark.parametrize(
    ("layer", "strategy"), [(-2, "default"), (-1, "full"), (3, "full"), (-4, "default"), ([-2, -3], "default")]
)
def test_other_towers_and_layers_give_the_features_of_the_whole_model(tmp_path, demo_model, siglip, layer, strategy):
    model = random_llava(tmp_path, demo_model, siglip=siglip, layer=layer, strategy=strategy)
    encoder = load_encoder(tmp_path, **CPU)
    pixels = torch.randint(0, 256, (3, 28, 28, 3), dtype=torch.uint8)
    normal = ((pixels / 255 - encoder.normalize.mean) / encoder.normalize.std).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = torch.stack(list(model.model.get_image_features(normal).pooler_output))
    got = encoder(pixels)
    assert got.shape == (3, encoder.num_tokens, encoder.row_width)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("qwen", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_other_language_models_and_heads_of_their_own_give_the_whole_models_answers(tmp_path, demo_model, qwen, tied):
    model = random_llava(tmp_path, demo_model, qwen=qwen, tied=tied)
    decoder = load_decoder(tmp_path, **CPU)
    before, after = decoder.encode_prompt(PROMPTS[0])
    visual = torch.randn(4, 5, 48)
    got = decoder.generate(list(visual), [(before, after)] * 4, max_new_tokens=12)
    embed = model.get_input_embeddings()
    for tokens, completion in zip(visual, got, strict=True):
        embeds = torch.cat([embed(torch.tensor([before])), tokens[None], embed(torch.tensor([after]))], dim=1)
        mask = torch.ones(embeds.shape[:2])
        new_ids = model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=12, do_sample=False)
        assert completion.text == decoder.tokenizer.decode(new_ids[0], skip_special_tokens=True).strip()
    assert tied or len({completion.text for completion in got}) > 1  # a random tied head repeats the last word


# Batches and ends


def test_a_batch_of_different_lengths_says_what_each_says_alone(features, decoder):
    prompts = [decoder.encode_prompt(PROMPTS[i % 3]) for i in range(IMAGES)]
    visual = [keep(tokens, 20 * (i + 1), seed=i) for i, tokens in enumerate(features)]
    together = decoder.generate(visual, prompts, max_new_tokens=48)
    alone = [decoder.generate([v], [p], max_new_tokens=48)[0] for v, p in zip(visual, prompts, strict=True)]
    assert together == alone
    assert len({completion.num_generated_tokens for completion in together}) > 1


def test_an_answer_ends_by_its_end_token_or_by_length_and_the_end_token_counts(features, decoder):
    prompt = decoder.encode_prompt(PROMPTS[0])
    (free,) = decoder.generate([features[0]], [prompt], max_new_tokens=48)
    assert free.finish_reason == "stop"
    num_words = len(decoder.tokenizer(free.text, add_special_tokens=False).input_ids)
    assert free.num_generated_tokens == num_words + 1
    assert free.num_prompt_tokens == sum(map(len, prompt)) + 256
    (cut,) = decoder.generate([features[0]], [prompt], max_new_tokens=3)
    assert (cut.finish_reason, cut.num_generated_tokens) == ("length", 3)
    assert free.text.startswith(cut.text)
    (exact,) = decoder.generate([features[0]], [prompt], max_new_tokens=num_words + 1)
    assert exact == free


def test_any_of_several_end_tokens_ends_an_answer(features, demo_model):
    decoder = load_decoder(demo_model, **CPU)
    prompt = decoder.encode_prompt(PROMPTS[0])
    (free,) = decoder.generate([features[0]], [prompt], max_new_tokens=48)
    second = free.text.split()[2]
    decoder.end_tokens = [2, decoder.tokenizer.convert_tokens_to_ids(second)]
    (cut,) = decoder.generate([features[0]], [prompt], max_new_tokens=48)
    assert cut == Completion(
        text=" ".join(free.text.split()[:2]),
        num_prompt_tokens=free.num_prompt_tokens,
        num_generated_tokens=3,
        finish_reason="stop",
    )


def test_what_does_not_fit_the_context_is_refused(features, decoder):
    before, after = decoder.encode_prompt(PROMPTS[0])
    longest = decoder.max_length - 256 - len(before) - len(after)
    with pytest.raises(ValueError, match=f"must fit 1024 tokens, got {1024 - longest} \\+ {longest + 1} new ones"):
        decoder.generate([features[0]], [(before, after)], max_new_tokens=longest + 1)


def test_sampling_depends_on_the_seed_alone(features, decoder):
    prompts = [decoder.encode_prompt(PROMPTS[0])] * IMAGES
    visual = [tokens[:8] for tokens in features]

    def sample(seed: int, count: int = IMAGES, temperature: float = 1.5, top_p: float = 1.0) -> list[str]:
        options = {"max_new_tokens": 12, "temperature": temperature, "top_p": top_p}
        seeds = [seed + i for i in range(count)]
        return [c.text for c in decoder.generate(visual[:count], prompts[:count], seeds=seeds, **options)]

    greedy = [c.text for c in decoder.generate(visual, prompts, max_new_tokens=12)]
    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert sample(1)[:2] == sample(1, count=2)  # what is decoded beside it does not matter
    assert sample(1) != greedy
    assert sample(1, top_p=1e-6) == greedy  # the nucleus of one token
    assert sample(1, temperature=1e-4) == greedy
    with pytest.raises(ValueError, match="a seed for each of 1 prompts, got 0"):
        decoder.generate(visual[:1], prompts[:1], max_new_tokens=2, temperature=1.0)
