"""A budget for each picture: gains are those of the log-det, and the calibrated threshold keeps the wanted share."""

import pytest
import torch

from otprune import num_kept, select_tokens
from otprune.methods import get_method
from otprune.methods.adaptive import calibrate, num_above, picks_and_gains
from otprune.methods.reduction import Seen

METHOD = get_method("logdet_adaptive")


def pictures(number: int, num_tokens: int = 40) -> list[torch.Tensor]:
    """Tokens of pictures in which more and more tokens differ from a common one."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for index in range(number):
        tokens = torch.randn(1, 8, generator=generator) + 0.01 * torch.randn(num_tokens, 8, generator=generator)
        crowd = 2 + index % 20
        tokens[:crowd] += torch.randn(crowd, 8, generator=generator)
        made.append(tokens)
    return made


def test_the_gain_of_a_pick_is_what_it_adds_to_the_log_det():
    features = torch.randn(1, 20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    picks, gains = picks_and_gains(features, 12)
    centred = features[0] - features[0].mean(dim=0)
    tokens = centred / centred.norm(dim=0)
    K = torch.eye(20) + tokens @ tokens.T / tokens.square().sum(-1).mean()
    totals = [0.0] + [float(torch.logdet(K[picks[0, :n]][:, picks[0, :n]])) for n in range(1, 13)]
    torch.testing.assert_close(gains[0].cumsum(0), torch.tensor(totals[1:], dtype=torch.float64))
    assert (gains.diff() <= 1e-9).all()
    assert torch.equal(picks.sort().values, select_tokens(features, 12, method="logdet_linear_centered"))


@pytest.mark.parametrize("retention", [0.1, 0.25])
def test_the_threshold_keeps_the_wanted_share_of_other_pictures_too(retention):
    made = pictures(200)
    found = calibrate(made[:100], retention=retention, most=3)
    assert found["kept"] == pytest.approx(retention, abs=0.001)
    cap = 3 * num_kept(retention, 40)
    numbers = num_above(picks_and_gains(torch.stack(made[100:]), cap)[1], found["threshold"])
    assert sum(numbers) / (100 * 40) == pytest.approx(retention, rel=0.1)
    assert len(set(numbers)) >= 5
    assert max(numbers) <= cap


def test_crowded_pictures_keep_more_and_a_picture_of_equal_tokens_keeps_one():
    plain, crowded = pictures(20)[0], pictures(20)[19]
    seen = Seen(
        features=torch.stack([torch.ones(40, 8), plain, crowded]), seeds=torch.zeros(3, dtype=torch.int64), prompts=[]
    )
    found = calibrate(pictures(60), retention=0.2, most=3)
    reduce = METHOD.build(METHOD.check({"threshold": found["threshold"]}), {})
    kept = [reduced.source for [reduced] in reduce(seen, 8)]
    assert len(kept[0]) == 1 < len(kept[1]) < len(kept[2]) <= 24
    assert all(torch.equal(source, source.sort().values) for source in kept)


def test_a_picture_keeps_what_it_keeps_alone():
    made = torch.stack(pictures(6))
    reduce = METHOD.build(METHOD.check({"threshold": 0.3}), {})
    seeds = torch.zeros(6, dtype=torch.int64)
    together = [r.source.tolist() for [r] in reduce(Seen(features=made, seeds=seeds, prompts=[]), 8)]
    alone = [reduce(Seen(features=made[i : i + 1], seeds=seeds[:1], prompts=[]), 8)[0][0] for i in range(6)]
    assert together == [reduced.source.tolist() for reduced in alone]


def test_no_picture_to_calibrate_on_is_an_error():
    with pytest.raises(ValueError, match="samples must hold at least one picture, got none"):
        calibrate([], retention=0.1, most=3)
