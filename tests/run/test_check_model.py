"""A configuration gets the values of its model, a method that sends smaller pictures a smaller geometry."""

from dataclasses import replace

import pytest

from otprune.families.llava import Square
from otprune.models import read_checkpoint
from pipelines.config.load import load_config
from pipelines.errors import UserError
from pipelines.run.job import check_model, check_pruning, check_unit
from tests.helpers import DEMO


def test_null_and_auto_become_the_values_of_the_model(demo_model):
    given = load_config([*DEMO, "prune.retention=null", "decode.aspect=auto"])
    config, checkpoint = check_model(given)
    assert (config.prune.retention, config.prune.share, config.decode.aspect) == (0.098, 0.098, "pad")
    assert (config.model.max_pixels, config.model.min_pixels) == (None, None)
    assert checkpoint == read_checkpoint(str(demo_model))
    assert check_model(config) == (config, checkpoint), "a resolved configuration stays"
    with pytest.raises(AssertionError, match="has not been resolved"):
        _ = given.prune.share


@pytest.mark.parametrize("aspect", ["crop", "stretch"])
def test_what_the_user_chooses_stays(aspect):
    config, checkpoint = check_model(load_config([*DEMO, f"decode.aspect={aspect}", "prune.retention=0.3"]))
    assert (config.decode.aspect, config.prune.share) == (aspect, 0.3)
    assert checkpoint.geometry.frame((10, 20)).fit == aspect


@pytest.mark.parametrize("key", ["max_pixels", "min_pixels"])
def test_a_number_of_pixels_is_refused_for_a_model_of_one_size(key):
    with pytest.raises(UserError, match=r"model\.max_pixels and model\.min_pixels must be null") as refused:
        check_model(load_config([*DEMO, f"model.{key}=50000"]))
    assert "\n" not in str(refused.value)


def test_smaller_pictures_are_refused_in_one_line_where_every_picture_has_one_size():
    with pytest.raises(UserError) as refused:
        check_model(load_config([*DEMO, "prune.method=resize"]))
    assert str(refused.value) == (
        "prune.method=resize needs a model of free picture size, got a LLaVA-1.5, whose pictures all have one size or "
        "its tiles"
    )
    with pytest.raises(UserError, match=r"^prune\.shrink=0\.5 needs a model of free picture size"):
        check_model(load_config([*DEMO, "prune.shrink=0.5"]))


def test_smaller_pictures_have_a_geometry_of_their_own_beside_the_whole_one(monkeypatch):
    def shrunk(square: Square, retention: float) -> Square:
        return replace(square, num_tokens=round(retention * square.num_tokens))

    monkeypatch.setattr(Square, "shrunk", shrunk)
    _, checkpoint = check_model(load_config([*DEMO, "prune.method=resize", "prune.retention=0.25"]))
    assert (checkpoint.geometry.fixed, checkpoint.whole_geometry.fixed) == (64, 256)
    _, unchanged = check_model(load_config([*DEMO, "prune.method=none", "prune.retention=0.25"]))
    assert unchanged.geometry == unchanged.whole_geometry == checkpoint.whole_geometry


def test_a_method_may_prune_a_smaller_picture(monkeypatch):
    monkeypatch.setattr(
        Square, "shrunk", lambda square, share: replace(square, num_tokens=round(share * square.num_tokens))
    )
    config, checkpoint = check_model(load_config([*DEMO, "prune.shrink=0.25", "prune.retention=0.2"]))
    assert (checkpoint.geometry.fixed, checkpoint.whole_geometry.fixed) == (64, 256)
    assert config.prune.share_of_sent == pytest.approx(0.8)
    _, whole = check_model(load_config([*DEMO, "prune.shrink=0.25", "prune.method=none"]))
    assert whole.geometry.fixed == 256
    with pytest.raises(UserError, match=r"prune\.retention must be at most prune\.shrink=0\.25, .* got 0\.3"):
        check_model(load_config([*DEMO, "prune.shrink=0.25", "prune.retention=0.3"]))


def test_units_of_more_pixels_than_a_row_can_hold_are_refused(demo_model):
    checkpoint = read_checkpoint(str(demo_model))
    large = replace(checkpoint, geometry=replace(checkpoint.geometry, side=2048))  # 12 MiB a picture
    most = (2**31 - 1) // (3 * 2048**2)
    check_unit(load_config([*DEMO, f"unit.images={most}"]), large)
    with pytest.raises(UserError, match=rf"unit\.images must be at most {most} .*at most 2 GiB; got {most + 1}"):
        check_unit(load_config([*DEMO, f"unit.images={most + 1}"]), large)


@pytest.mark.parametrize("method", ["m3", "prumerge", "fastv"])
def test_merging_is_refused_where_no_token_is_kept_as_it_is(method):
    config, checkpoint = check_model(load_config([*DEMO, f"prune.method={method}", "prune.merge=0.5"]))
    with pytest.raises(UserError, match=f"prune.merge must be null with {method}, which keeps no tokens as they are"):
        check_pruning(config, checkpoint)
