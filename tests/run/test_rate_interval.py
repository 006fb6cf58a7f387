"""The interval of a rate: from its definition, and against what it promises."""

import math

import numpy as np
import pytest
from scipy import stats

from pipelines.run.rate_interval import MIN_GAPS, Gaps


def gaps(seconds, images) -> Gaps:
    sums = Gaps()
    for each in zip(seconds, images, strict=True):
        sums.add(*each)
    return sums


def test_the_interval_is_that_of_a_ratio_estimator():
    rng = np.random.default_rng(0)
    seconds, images = rng.gamma(4, 0.5, 25), rng.integers(1, 9, 25)
    low, high = gaps(seconds, images).interval()
    rate = images.sum() / seconds.sum()
    residuals = images - rate * seconds
    error = math.sqrt(25 / 24 * (residuals**2).sum()) / seconds.sum()
    reach = stats.t.ppf(0.975, 24) * error / rate
    assert (math.log(low), math.log(high)) == pytest.approx((math.log(rate) - reach, math.log(rate) + reach))


def test_it_holds_the_true_rate_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(400):
        low, high = gaps(rng.gamma(4, 0.5, 30), np.full(30, 16)).interval()
        held += low <= 16 / 2.0 <= high
    assert 0.92 <= held / 400 <= 0.98


def test_an_even_run_leaves_nothing_open():
    assert gaps([2.0] * 5, [10] * 5).interval() == pytest.approx((5, 5))


def test_the_lower_end_stays_above_nothing():
    low, high = gaps([0.01, 0.01, 60.0], [10, 10, 10]).interval()
    assert 0 < low < high


@pytest.mark.parametrize("num", range(MIN_GAPS))
def test_too_few_units_have_no_interval(num):
    assert gaps([1.0] * num, [1] * num).interval() is None
