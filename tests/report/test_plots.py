"""Plots: marks lie where their numbers say, text is escaped, and colours stand out on light and dark ground."""

import math
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest

from pipelines.report.environment import TEMPLATES
from pipelines.report.plots import (
    BOTTOM,
    COLORS,
    DASHES,
    GRAYS,
    LARGE,
    LEFT,
    NAMES,
    RIGHT,
    SMALL,
    TOP,
    Interval,
    Point,
    Series,
    Style,
    beside,
    intervals,
    legend,
    plot,
    styles_of,
)
from pipelines.report.scale import Axis, Scale, axis_of_names, axis_over, log_ticks, ticks

PLAIN = Style("#000000")


def marks(svg: str) -> list[tuple[float, float]]:
    found = ElementTree.fromstring(svg).iter("circle")
    return [(float(each.get("cx", "")), float(each.get("cy", ""))) for each in found if each.get("class") == "mark"]


def texts(svg: str, kind: str = "tick") -> list[str]:
    return [each.text or "" for each in ElementTree.fromstring(svg).iter("text") if each.get("class") == kind]


def line_of(xs: list[float], **how) -> Series:
    return Series("a", [Point(x, 10 * x, (x, x), (5 * x, 15 * x)) for x in xs], PLAIN, **how)


def test_marks_lie_where_their_numbers_say():
    width, height = LARGE
    svg = plot([line_of([1.0, 2.0, 3.0])], Axis("x", 1.0, 3.0), Axis("y", 0.0, 40.0), size=LARGE)
    (low, _), (mid, high), (top, _) = marks(svg)
    assert (low, mid, top) == (LEFT, (LEFT + width - RIGHT) / 2, width - RIGHT)
    assert high == pytest.approx(height - BOTTOM - 0.5 * (height - BOTTOM - TOP / 2), abs=0.1)


def test_an_interval_is_a_bar_through_its_mark_and_one_of_no_length_is_none():
    svg = plot([line_of([2.0])], Axis("x", 0.0, 4.0), Axis("y", 0.0, 40.0), size=LARGE)
    [(x, _)] = marks(svg)
    [path] = [each.get("d", "") for each in ElementTree.fromstring(svg).iter("path")]
    found = re.fullmatch(r"M([\d.]+) ([\d.]+)V([\d.]+)", path)  # vertical alone
    assert found
    at, low, high = map(float, found.groups())
    bottom, rise = LARGE[1] - BOTTOM, LARGE[1] - BOTTOM - TOP / 2
    assert (at, low, high) == pytest.approx((x, bottom - 10 / 40 * rise, bottom - 30 / 40 * rise), abs=0.1)


def test_on_a_logarithmic_axis_equal_factors_are_equal_steps():
    svg = plot([line_of([1.0, 10.0, 100.0])], Axis("x", 1.0, 100.0, log=True), Axis("y", 0.0, 1000.0), size=LARGE)
    xs = [x for x, _ in marks(svg)]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    assert texts(svg)[-7:] == ["1", "2", "5", "10", "20", "50", "100"]


def test_a_value_that_is_not_finite_has_no_mark_and_no_part_in_the_axis():
    """A model that scores 0 unpruned has no relative score."""
    values = [math.nan, 2.0, 4.0, math.inf]
    axis = axis_over(values, "relative")
    assert 1 < axis.low < 2 < 4 < axis.high < 5
    assert axis_over([math.nan], "relative") == axis_over([], "relative")
    line = Series("a", [Point(x, y) for x, y in enumerate(values)], Style(COLORS[0]), joined=True)
    drawn = str(plot([line], axis_over(range(4), "x"), axis, levels=[(math.nan, "unpruned")]))
    assert "nan" not in drawn
    assert drawn.count("<circle") == 2


def test_joined_points_have_a_line_and_others_none():
    axes = Axis("x", 0.0, 4.0), Axis("y", 0.0, 40.0)
    assert "<polyline" in plot([line_of([1.0, 2.0])], *axes)
    assert "<polyline" not in plot([line_of([1.0, 2.0], joined=False)], *axes)
    assert "<polyline" not in plot([line_of([1.0])], *axes)
    assert "<polyline" in plot([line_of([1.0])], *axes, front=[(1, 2), (2, 3)])


def test_levels_rings_labels_and_tooltips_are_drawn():
    series = Series("a", [Point(1, 2, label="10%", title="<ten>", ringed=True), Point(3, 4)], PLAIN)
    svg = plot([series], Axis("x", 0, 4), Axis("y", 0, 4), levels=[(3, "all & more")], title="a < b")
    drawn = ElementTree.fromstring(svg)
    assert drawn.get("aria-label") == "a < b"
    assert {"10%", "all & more"} <= set(texts(svg))
    assert texts(svg, "name") == ["x", "y"]
    assert texts(svg, "title") == ["a < b"]
    assert [each.text for each in drawn.iter("title")] == ["<ten>", "a: 3, 4"]
    assert sum(each.get("class") == "ring" for each in drawn.iter("circle")) == 1


def test_values_with_intervals_are_rows_with_the_printed_value_beside():
    rows = [Interval("one & all", 50.0, 0.0, 200.0, printed=75.0), Interval("two", 100.0, 100.0, 100.0)]
    svg = intervals(rows, Axis("per cent", 0.0, 100.0), level=50.0, width=640)
    (half, first), (full, second) = marks(svg)
    assert (half, full) == pytest.approx(((NAMES + 640 - RIGHT - 8) / 2, 640 - RIGHT - 8))
    assert first < second
    assert {"one & all", "two"} <= set(texts(svg))
    bars = [each.get("d", "") for each in ElementTree.fromstring(svg).iter("path") if not each.get("class")]
    assert bars[0].endswith(f"H{full:.1f}")  # what is outside stays at the end
    assert svg.count('class="printed"') == svg.count('class="level"') == 1


def test_a_name_keeps_its_style_and_the_quiet_are_gray_and_broken():
    names = ["otprune", "random", "divprune", "uniform"]
    styles = styles_of(names, quiet=("random", "uniform"))
    assert (styles["otprune"], styles["divprune"]) == (Style(COLORS[0]), Style(COLORS[1]))
    assert {styles["random"].color, styles["uniform"].color} <= set(GRAYS)
    assert "solid" not in {styles["random"].line, styles["uniform"].line}
    assert styles["random"] != styles["uniform"]
    many = styles_of([str(i) for i in range(30)])
    assert len(set(many.values())) == 30
    assert {style.line for style in many.values()} == set(DASHES)


def test_a_legend_names_every_style_as_text():
    found = legend(styles_of(["<b>", "none"]))
    assert "&lt;b&gt;" in found
    assert found.count('class="stroke"') == 2
    assert legend(styles_of(["a"]), dots=True).count('class="dot"') == 1


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("ground", ["light", "dark"])
def test_every_colour_stands_out_on_light_and_on_dark_cards(ground: str):
    """WCAG 2.1, 1.4.11: graphics have a contrast of 3:1 or more."""
    base = (TEMPLATES / "report" / "base.html.jinja").read_text()
    light, dark = re.findall(r"--card: (#\w+)", base)
    card = luminance(dark if ground == "dark" else light)
    for color in (*COLORS, *GRAYS):
        high, low = sorted((luminance(color), card), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 3, color


@pytest.mark.parametrize(("low", "high"), [(0, 1), (3.2, 97.1), (0.011, 0.013), (-5, 5), (92, 108), (1e-7, 2e-7)])
def test_ticks_are_few_round_numbers_inside_the_window(low: float, high: float):
    found = ticks(low, high)
    assert 2 <= len(found) <= 7
    assert low <= min(found) <= max(found) <= high
    steps = {f"{b - a:.3g}" for a, b in pairwise(found)}
    assert len(steps) == 1
    assert steps.pop().replace(".", "").strip("0").partition("e")[0] in {"1", "2", "25", "5"}


def test_a_narrow_logarithmic_axis_has_ticks_too():
    assert log_ticks(1, 100) == [1, 2, 5, 10, 20, 50, 100]
    assert len(log_ticks(21, 29)) >= 2


@pytest.mark.parametrize("values", [[], [3.0], [0.0], [1.0, 2.0]])
def test_an_axis_is_never_empty_and_holds_its_values(values: list[float]):
    axis = axis_over(values, "x")
    assert axis.low < axis.high
    assert all(axis.low <= value <= axis.high for value in values)
    assert axis_over([0, *values], "x", zero=True).low == 0


def test_texts_of_ticks_do_not_touch():
    axis = Axis("x", 0.0, 10.0, named=tuple((float(i), "a long name") for i in range(11)))
    pixels = [pixel for pixel, _ in Scale(axis, 0, 300).ticks()]
    assert 2 <= len(pixels) < 11
    assert min(b - a for a, b in pairwise(pixels)) > 60


def test_named_places_are_equally_far_apart_and_series_stand_beside_each_other():
    axis = axis_of_names(["5 %", "10 %", "20 %"], "kept")
    scale = Scale(axis, 0, 300)
    assert [pixel for pixel, _ in scale.ticks()] == pytest.approx([50, 150, 250])
    offsets = [beside(i, 12) for i in range(12)]
    assert len(set(offsets)) == 12
    assert sum(offsets) == pytest.approx(0)
    assert max(offsets) < 0.5


def test_flat_and_missing_values_have_a_plot():
    styles = styles_of(["a", "random"], quiet=["random"])
    series = [Series("a", [Point(0, 1, y_ends=(1, 1))], styles["a"]), Series("random", [], styles["random"])]
    svg = plot(series, axis_of_names(["5 %"], ""), axis_over([1, 1], "score"), title="flat & full")
    assert len(marks(svg)) == 1
    assert ElementTree.fromstring(svg).get("viewBox") == "0 0 {} {}".format(*SMALL)
