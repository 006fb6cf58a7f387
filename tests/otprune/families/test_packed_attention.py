"""The attention of many segments at once against transformers' own, which takes one after the other."""

import pytest
import torch
from transformers import AutoConfig, AutoModel

from otprune.models.packed_attention import equal_segments, pack_attention
from tests.tiny import MAKERS, randomize

GRIDS = [(1, 12, 20), (1, 6, 10), (1, 12, 20), (1, 2, 2)]  # time, rows and columns of patches


def tower_of(name: str, folder):
    config = AutoConfig.from_pretrained(MAKERS[name](folder)).vision_config
    return randomize(AutoModel.from_config(config))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
@torch.inference_mode()
def test_packed_segments_give_what_single_segments_give(name, tmp_path, monkeypatch):
    tower = tower_of(name, tmp_path)
    patches = torch.randn(sum(h * w for _, h, w in GRIDS), 3 * 2 * tower.patch_size**2)
    expected = tower(patches, grid_thw=torch.tensor(GRIDS))
    names = set(tower.state_dict())
    segments = pack_attention(tower)
    assert set(tower.state_dict()) == names
    calls = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def counted(*arguments):
        calls.append(len(arguments[0]))
        return attend(*arguments)

    monkeypatch.setattr("otprune.models.packed_attention.scaled_dot_product_attention", counted)
    found = tower(patches, grid_thw=torch.tensor(GRIDS))
    torch.testing.assert_close(found.pooler_output, expected.pooler_output, atol=1e-4, rtol=0)
    if name == "qwen3_vl":
        torch.testing.assert_close(found.deepstack_features, expected.deepstack_features, atol=1e-4, rtol=0)
    # Two pictures have one size. Of windows of 2 x 2 tokens, 6 x 10 tokens have 15 whole ones; 3 x 5 tokens have 2, 3
    # halves and a quarter, as 1 x 1 token is.
    whole, windows = [2, 1, 1], [15 + 15 + 2, 3, 1 + 1]
    assert calls == (windows + whole + windows if name == "qwen2_5_vl" else 4 * whole)
    assert segments._known
    segments.forget()
    assert not segments._known


def test_segments_of_equal_length_are_one_batch():
    found = equal_segments([0, 2, 5, 7, 8])
    assert [index.tolist() for index in found] == [[[0, 1], [5, 6]], [[2, 3, 4]], [[7]]]
