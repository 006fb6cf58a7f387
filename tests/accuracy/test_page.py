"""The grid's page from made-up points: what is in no chart is not in a legend, and a page needs no cluster."""

import re
import xml.etree.ElementTree as ElementTree
from typing import Any

from demo.gallery.language import long_caption
from demo.gallery.world import scene_at
from pipelines.accuracy.config import AccuracyConfig
from pipelines.accuracy.page import render_accuracy
from pipelines.accuracy.table import Measured, Point, accuracy_table
from pipelines.benchmarks import get_benchmark
from pipelines.config.load import load_config

JOB: Any = None  # the page asks nothing of a point's job
WORK = {
    **{"num_kept_tokens": 26.0, "num_visual_tokens": 256.0, "tflops_per_image": 0.01, "ms_per_image": 9.0},
    **{"encode_ms": 4.0, "generate_ms": 4.0, "images_per_second": 20.0, "budget": 1.0},
}


def measured(method: str, period: int, **work: float) -> Measured:
    """A point that answers every `period`-th of 40 questions wrong, one question an image."""
    bench = get_benchmark("demo_exist")
    records: Any = [
        {"question_id": f"q{i:03d}", "group_id": f"q{i:03d}", "category": "", "kind": "yesno", "choices": []}
        | {"answers": ["yes"], "prediction": "yes" if i % period else "no"}
        for i in range(40)
    ]
    scores = bench.score(records, resamples=20)
    images = {bench.name: {group: group for group in scores.group_ids}}
    point = Point(method, 1.0 if method == "none" else 0.1)
    distance = {} if method == "none" else {"trace_objective": 1.0 / period, "gaussian_w2": float(period)}
    return Measured(point, JOB, {bench.name: scores}, images, WORK | work, distance)


def render() -> str:
    """Four methods within the budget, and m3 over it at every retention."""
    methods = {"otprune": 9, "divprune": 7, "random": 3, "uniform": 4}
    points = [measured("none", 40), *(measured(*each) for each in methods.items()), measured("m3", 5, budget=2.0)]
    config = load_config(
        ["benchmarks=[demo_exist]", f"grid.methods=[{','.join(methods)},m3]", "grid.retentions=[0.1]"], AccuracyConfig
    )
    benches = [get_benchmark("demo_exist")]
    return render_accuracy(config, accuracy_table(points, benches, 20), points, benches)


def test_a_method_over_budget_everywhere_is_in_the_table_and_in_no_plot_over_retention():
    page = render()
    assert "Not compared at 10 %, because their prefill costs over a tenth more: m3." in page
    lines, costs, dots = re.findall(r'<p class="legend">(.*?)</p>', page)
    assert "m3" not in lines
    assert "m3" in costs  # its cost is on the axis
    assert "m3" in dots  # its distance is measured, so it has a dot
    sections = dict(re.findall(r"<h2>(.*?)</h2>(.*?)(?=<h2|\Z)", page, re.DOTALL))
    left_out = re.search(r"stand in this table and among the distances, and are left out of (.*?)\.</li>", page)
    assert left_out
    for name in re.findall('"(.*?)"', left_out[1]):
        assert "m3" not in re.sub(r"Not compared .*?: m3\.", "", sections[name])
    distances = sections["Does the distance between kept and all tokens predict accuracy?"]
    assert "<tr><td>10 %</td><td>5</td>" in distances  # the rank correlation counts m3
    relative, exist, by_cost, by_distance = (
        ElementTree.fromstring(each) for each in re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    )
    for each, marks in ((relative, 4), (exist, 4), (by_cost, 5), (by_distance, 5)):
        assert sum(circle.get("class") == "mark" for circle in each.iter("circle")) == marks


def test_plots_show_each_score_with_its_interval_and_the_unpruned_level():
    page = render()
    assert re.search(r"<title>otprune at 10 %: 87\.5 \(\d[\d.]* to \d[\d.]*\)</title>", page)  # 5 of 40 wrong
    assert page.count(">all tokens</text>") == 3
    assert "<title>m3 at 10 %: " in page
    assert "for 0.01 TFLOPs</title>" in page
    assert not re.search(r"\bnan\b", page)


def test_a_table_says_what_captions_name_and_invent():
    bench, truth = get_benchmark("gallery_long"), long_caption(scene_at("corpus", 0))
    points = []
    for method, text in (("none", truth), ("otprune", truth.replace("blue", "red")), ("random", "a red heart .")):
        record: Any = {"question_id": "q", "group_id": "q", "category": "", "kind": "caption", "choices": []}
        scores = bench.score([record | {"answers": [truth], "prediction": text}], resamples=20)
        point = Point(method, 1.0 if method == "none" else 0.1)
        points.append(Measured(point, JOB, {bench.name: scores}, {bench.name: {"q": "q"}}, WORK | {"budget": 1.0}))
    config = load_config(
        ["benchmarks=gallery_long", "grid.methods=[otprune,random]", "grid.retentions=[0.1]"], AccuracyConfig
    )
    page = render_accuracy(config, accuracy_table(points, [bench], 20), points, [bench])
    [table] = re.findall(r"<h2>What the captions say</h2>.*?<table.*?>(.*?)</table>", page, re.DOTALL)
    head, *rows = (re.findall(r"<t[hd]>(.*?)(?:<small>.*?)?</t[hd]>", row) for row in table.split("<tr>")[1:])
    shown = {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}
    assert list(shown) == ["none", "otprune 10 %", "random 10 %"]
    assert {name: shown["none"][name] for name in ("CHAIR, objects", "recall", "described", "places")} == {
        "CHAIR, objects": "0.0", "recall": "100.0", "described": "100.0", "places": "100.0"
    }  # fmt: skip
    assert float(shown["otprune 10 %"]["colours"]) < 100 == float(shown["otprune 10 %"]["recall"])
    assert (shown["random 10 %"]["CHAIR, objects"], shown["random 10 %"]["words"]) == ("100.0", "3.0")
