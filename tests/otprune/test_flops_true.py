"""The true book against PyTorch's own FLOP counter.

The counter sees every matrix product that a model on the meta device runs, and counts a multiply-add as two.
"""

import functools
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llava.configuration_llava import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from otprune import kernel, methods
from otprune.budget import make_policy
from otprune.flops import (
    decode_flops,
    prefill_flops,
    projector_flops,
    selector_flops,
    true_flops,
    vision_flops,
)
from otprune.layerwise import KeepAll
from otprune.layerwise.executor import prefill
from otprune.methods.cdpruner import cdpruner
from otprune.methods.divprune import divprune
from otprune.methods.logdet_linear import logdet_linear
from otprune.methods.otprune import otprune
from otprune.methods.prumerge import prumerge
from otprune.select import METHODS
from otprune.shapes import MODELS, LanguageShape, ModelShape, VisionShape


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


def language_config(**changes) -> LlamaConfig:
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 150,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 99,
    }
    return LlamaConfig(**(sizes | changes), attn_implementation="eager")


SEVEN_B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
}


@pytest.mark.parametrize("sizes", [{}, {"head_dim": 24}, {"num_key_value_heads": 4}, SEVEN_B])
def test_prefill_counts_what_a_llama_multiplies(sizes):
    config = language_config(**sizes)
    shape = LanguageShape.from_config(config)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        ids = torch.zeros(1, 97, dtype=torch.long)
        total = counted(lambda: model(ids, logits_to_keep=1))
    assert prefill_flops(shape, 97) == total


def test_the_named_7b_is_the_config_it_is_read_from():
    assert LanguageShape.from_config(language_config(**SEVEN_B)) == MODELS["llava-1.5-7b"].language


def test_decode_counts_what_a_llama_multiplies_with_its_cache():
    config = language_config()
    shape = LanguageShape.from_config(config)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)

        def steps():
            cache = model(torch.zeros(1, 20, dtype=torch.long), logits_to_keep=1).past_key_values
            for _ in range(4):  # tokens 2 .. 5
                cache = model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache).past_key_values

        total = counted(steps)
    assert prefill_flops(shape, 20) + decode_flops(shape, 20, 5) == total


@pytest.mark.parametrize(
    "sizes",
    [
        {
            "hidden_size": 32,
            "intermediate_size": 72,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 56,
        },
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    ],
)
def test_vision_counts_what_a_clip_tower_multiplies(sizes):
    config = CLIPVisionConfig(**({"image_size": 336, "patch_size": 14} | sizes), attn_implementation="eager")
    with torch.device("meta"):
        tower = CLIPVisionModel(config)
        pixels = torch.zeros(2, 3, config.image_size, config.image_size)
        total = counted(lambda: tower(pixels))
    assert vision_flops(VisionShape.from_config(config), crops=2) == total


def test_the_named_tower_is_clip_large_at_336_pixels():
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    assert VisionShape.from_config(config) == MODELS["llava-1.5-7b"].vision
    assert VisionShape.from_config(config, layers=23).layers == 23
    assert MODELS["llava-1.5-7b"].vision.num_patches == 576


def test_projector_counts_what_llavas_mlp_multiplies():
    vision = CLIPVisionConfig(hidden_size=1024, num_attention_heads=16, image_size=336, patch_size=14)
    config = LlavaConfig(vision_config=vision, text_config=language_config(**SEVEN_B))
    with torch.device("meta"):
        projector = LlavaMultiModalProjector(config)
        total = counted(lambda: projector(torch.zeros(1, 576, 1024)))
    assert projector_flops(MODELS["llava-1.5-7b"]) == total


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("select", [otprune, logdet_linear, divprune])
def test_selectors_on_an_accelerator_cost_what_they_multiply(select, centered):
    """The meta device takes the accelerator's path. The counter misses one product of the log-det greedy: the single
    Cholesky column that the second pick sees is multiplied element by element."""
    num_tokens, width, keep = 40, 24, 7
    features = torch.empty(2, num_tokens, width, device="meta")
    options = {} if select is divprune else {"centered": centered}
    unseen = 0 if select is divprune else num_tokens
    total = counted(lambda: select(features, keep, **options))
    name = select.__name__ + "_centered" * options.get("centered", False)
    assert 2 * selector_flops(name, num_tokens, width, keep) == total + 2 * unseen


@pytest.mark.parametrize("select", [otprune, logdet_linear, divprune])
def test_selectors_of_long_images_cost_what_they_multiply(select, monkeypatch):
    """The counter misses what is multiplied element by element: the second pick's Cholesky column, as above, and the
    diagonal of the linear kernel."""
    monkeypatch.setattr(kernel, "WHOLE_KERNEL", 0)
    num_tokens, width, keep = 40, 24, 7
    unseen = {otprune: num_tokens, logdet_linear: num_tokens + num_tokens * width, divprune: 0}
    total = counted(lambda: select(torch.empty(2, num_tokens, width, device="meta"), keep))
    assert 2 * selector_flops(select.__name__, num_tokens, width, keep) == total + 2 * unseen[select]


@pytest.mark.parametrize("method", [*METHODS, "cdpruner", "m3", "prumerge", "prumerge_plus"])
@pytest.mark.parametrize("on_cpu", [False, True])
def test_every_selector_has_a_cost(method, on_cpu):
    cost = selector_flops(method, 576, 4096, 56, on_cpu=on_cpu)
    assert (cost == 0) == (method in ("random", "uniform", "first", "last"))


def test_on_a_cpu_neither_log_det_method_forms_its_kernel():
    for width in (4096, 64):
        spared = selector_flops("otprune", 576, width, 56) - selector_flops("otprune", 576, width, 56, on_cpu=True)
        assert spared == 576**2 * (576 - 57)
        linear = [selector_flops("logdet_linear", 576, width, 56, on_cpu=on_cpu) for on_cpu in (False, True)]
        assert linear[0] - linear[1] == 576 * width * (576 - 57)


def test_cdpruner_and_prumerge_cost_what_they_multiply():
    """Relevance is an input of the one, attention and keys of the other; both are added as `selector_flops` says."""
    num_tokens, width, keep = 40, 24, 7
    features, scores = torch.empty(1, num_tokens, width, device="meta"), torch.empty(1, num_tokens, device="meta")
    picked = counted(lambda: cdpruner(features, keep, scores))
    assert selector_flops("cdpruner", num_tokens, width, keep) - num_tokens * width == picked + num_tokens
    features, keys = torch.randn(1, num_tokens, width), torch.randn(1, num_tokens, width)
    merged = counted(lambda: prumerge(features, keys, torch.rand(1, num_tokens), k=keep + 1))
    attention = (num_tokens + 2) * width**2 + num_tokens * width
    rest = selector_flops("prumerge", num_tokens, width, keep) - attention - 32 * keep * width
    assert rest == merged


# The true book as a whole.


def test_every_registered_method_has_a_true_cost():
    settings = {
        **{"none": {}, "m3": {"tokens": 64}, "prumerge_plus": {"tokens": 144}, "vtw": {"layer": 4}},
        **{"fastv": {"layer": 2, "kept": 20}, "fitprune": {"recipe": {0: 500}}, "pyramiddrop": {"stages": {8: 1}}},
    }
    for name in methods.METHODS:
        flops = true_flops(MODELS["llava-1.5-7b"], name, num_text=57, **settings.get(name, {"retention": 0.098}))
        assert flops.total < 10e12
        assert (flops.projector < projector_flops(MODELS["llava-1.5-7b"])) == name.startswith("prumerge")


def test_true_flops_add_up_from_their_parts():
    model = MODELS["llava-1.5-7b"]
    flops = true_flops(model, "otprune", num_text=57, num_generated=20, retention=0.098)
    assert flops.vision == vision_flops(model.vision)
    assert flops.projector == projector_flops(model)
    assert flops.policy == selector_flops("otprune", 576, 4096, 56)
    assert flops.prefill == prefill_flops(model.language, 57 + 56)
    assert flops.decode == decode_flops(model.language, 57 + 56, 20)
    on_cpu = true_flops(model, "otprune", num_text=57, retention=0.098, select_on_cpu=True)
    assert on_cpu.policy == selector_flops("otprune", 576, 4096, 56, on_cpu=True)
    assert flops.total == flops.vision + flops.projector + flops.policy + flops.prefill + flops.decode


def test_no_generated_tokens_after_the_first_cost_no_decoding():
    assert true_flops(MODELS["llava-1.5-7b"], "none", num_text=57).decode == 0


def test_a_shorter_cache_makes_decoding_cheaper_in_every_method():
    decode = functools.partial(true_flops, MODELS["llava-1.5-7b"], num_text=57, num_generated=64)
    full = decode("none").decode
    assert decode("otprune", retention=0.098).decode < full
    assert decode("vtw", layer=4).decode < decode("fastv", layer=4, kept=20).decode < full
    # Rows that FitPrune deletes stay in the cache of the layer that deleted them.
    late, early = (decode("fitprune", recipe={layer: 500}).decode for layer in (31, 30))
    assert late == full
    assert early < full


@pytest.mark.parametrize("sizes", [{}, {"head_dim": 24}, {"num_key_value_heads": 4}])
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("none", {}),
        ("vtw", {"layer": 2}),
        ("fastv", {"layer": 2, "kept": 9}),
        ("pyramiddrop", {"stages": {0: 30, 2: 11}}),
        ("fitprune", {"recipe": {0: 12, 1: 0, 2: 20}}),
    ],
)
def test_methods_inside_the_model_cost_what_they_multiply(method, settings, sizes):
    """The executor on 20 text and 40 image rows, with attention in matrix products, which the counter sees."""
    config = language_config(**sizes)
    config._attn_implementation = "sdpa"
    model = LlamaForCausalLM(config).eval()
    policy = make_policy(method, settings) if settings else KeepAll()
    with sdpa_kernel(SDPBackend.MATH):
        total = counted(lambda: prefill(model, [torch.randn(60, config.hidden_size)], [(7, 47)], policy))
    shape = ModelShape(vision=MODELS["llava-1.5-7b"].vision, language=LanguageShape.from_config(config))
    flops = true_flops(shape, method, num_text=20, num_visual=40, **settings)
    assert flops.policy + flops.prefill == total


def test_anyres_images_cost_their_crops_and_start_from_the_packed_tokens():
    model = MODELS["llava-1.6-7b"]
    flops = true_flops(model, "otprune", num_text=57, num_visual=2225, crops=5, retention=0.098)
    assert flops.vision == 5 * vision_flops(model.vision)
    assert flops.projector == 5 * projector_flops(model)
    assert flops.policy == selector_flops("otprune", 2225, 4096, 218)
    assert flops.prefill == prefill_flops(model.language, 57 + 218)


def test_a_config_without_optional_fields_is_plain_multi_head_attention():
    config = SimpleNamespace(
        hidden_size=64, intermediate_size=100, num_hidden_layers=2, num_attention_heads=4, vocab_size=50
    )
    shape = LanguageShape.from_config(config)
    assert (shape.kv_heads, shape.head_dim) == (4, 16)


def test_user_mistakes_are_value_errors():
    with pytest.raises(ValueError, match="method must act before the language model, got 'vtw'"):
        selector_flops("vtw", 576, 4096, 56)
    with pytest.raises(ValueError, match=r"method must be one of none, otprune, .*got 'magic'"):
        true_flops(MODELS["llava-1.5-7b"], "magic", num_text=5, retention=0.1)
    with pytest.raises(ValueError, match="visual must have one entry for each of 32 layers, got 2"):
        prefill_flops(MODELS["llava-1.5-7b"].language, 5, visual=[(1, 1)] * 2)
    with pytest.raises(ValueError, match="num_prompt_tokens must be at least 0, got -1"):
        prefill_flops(MODELS["llava-1.5-7b"].language, -1)
