"""The sweep's page: it says what to buy and why, shows what failed, and opens offline."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.config.load import load_config, with_values
from pipelines.run.outcome import SAMPLES
from pipelines.sweep.checked import Sweep, prepare_sweep
from pipelines.sweep.config import SweepConfig
from pipelines.sweep.page import pareto_front, render_sweep
from pipelines.sweep.point import store_of
from pipelines.sweep.setting import settings_of
from tests.report.test_page import sample, text_of
from tests.sweep.test_advice import RECORDS, UNPRUNED, around, record

GRID = "{method: [otprune], retention: [0.05, 0.1, 0.2], cluster: [{}, {generate.actors: 2}]}"
JUDGE: Any = SimpleNamespace(difference=lambda ours, theirs: (0.2, 0.1, 0.3))


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return prepare_sweep(load_config([f"output.path={tmp_path}", f"sweep.grid={GRID}"], SweepConfig))


def known(sweep: Sweep, records=RECORDS) -> dict[str, dict[str, Any]]:
    """Made-up results under the names of the sweep's own points."""
    settings = {(r["values"]["method"], r["values"]["retention"], r["values"]["cluster"]): r for r in records}
    found = {}
    for point in sweep.points:
        values = point.values
        if made := settings.get((values["method"], values["retention"], values["cluster"])):
            metrics = made["metrics"] | {"mean_caption_tokens": 9.0, "images_captioned": 100, "wall_seconds": 30.0}
            metrics |= {"seconds/encode": 2.0, "seconds/generate": 10.0, "startup_seconds": 10.0}
            more = {"metrics": metrics, "totals": {"reasons": {"empty": 3}}, "pools": {"encode": 1, "generate": 1}}
            quality = made["quality"] | {"references": None, "agreement": None}
            found[point.name] = made | more | {"name": point.name, "values": values, "quality": quality}
    return found


def test_the_first_thing_it_says_is_what_to_buy_and_why(sweep):
    text = text_of(render_sweep(sweep, known(sweep), JUDGE))
    assert text.index("Buy otprune at 10 % of the visual tokens (e1g1)") < text.index("Cost against quality")
    for part in (
        "It is the cheapest setting whose 95 % interval stays above 95 % of the unpruned quality",
        "It costs 70 % less than the unpruned model on the same machines",
        "$30.00 per million images at steady speed",
        "$100.00 unpruned",
        "97 % of the unpruned quality",
        "6 of 20 points finished, 14 not run yet",
        "otprune at 10 % ← buy e1g1",
        "empty decode 3",
        "ms an image",
    ):
        assert part in text.replace("&larr;", "←"), part


def test_the_page_opens_offline_and_runs_no_script(sweep):
    html = render_sweep(sweep, known(sweep), JUDGE)
    assert not re.search(r"<script|<link|@import|url\(|https?://", html)
    assert html.count("<svg") == 2  # cost against quality, and clusters


def test_failed_points_are_listed_with_their_reasons_as_text(sweep):
    records = known(sweep)
    name = sweep.points[-1].name
    records[name] = {"name": name, "status": "failed", "reason": "<b>no room</b>", "values": sweep.points[-1].values}
    html = render_sweep(sweep, records, JUDGE)
    assert "&lt;b&gt;no room&lt;/b&gt;" in html
    assert "<b>no room" not in html


def test_a_sweep_without_a_finished_point_has_a_page_too(sweep):
    text = text_of(render_sweep(sweep, {}, JUDGE))
    assert "No advice: no unpruned point has finished" in text
    assert "0 of 20 points finished, 20 not run yet" in text


def test_without_an_unpruned_point_there_is_a_page_and_no_advice(sweep):
    nothing = {"relative": None, "references": None, "agreement": None}  # as without an unpruned point
    records = {n: r | {"quality": nothing} for n, r in known(sweep).items() if r["values"]["method"] != "none"}
    assert len(records) > 1
    assert "No advice: no unpruned point has finished" in text_of(render_sweep(sweep, records, JUDGE))


def test_without_prices_the_page_speaks_of_hours(sweep):
    sweep = replace(sweep, config=with_values(sweep.config, {"cost.usd_per_hour": None}))
    records = [record("none", 1.0, None, [1, 1, 1]), record("otprune", 0.1, None, [0.97, 0.96, 0.99])]
    text = text_of(render_sweep(sweep, known(sweep, records), JUDGE))
    assert "27.78 h per million images at steady speed" in text
    assert "$" not in text.split("Configuration")[0]


def test_images_show_both_captions_worst_first(sweep):
    records = known(sweep)
    unpruned = next(point for point in sweep.points if point.is_unpruned)
    bought = next(point for point in sweep.points if point.values["retention"] == 0.1)
    pairs = [("a red dog", "a red dog"), ("a blue cat on a mat", "one green bird")]

    def samples(side: int) -> str:
        kept = [0, 1, 2, 3] if side else [0, 3]
        return json.dumps([sample(pair[side], kept=kept) | {"row": row} for row, pair in enumerate(pairs)])

    store_of(bought).write(SAMPLES, samples(0).encode())
    store_of(unpruned).write(SAMPLES, samples(1).encode())
    text = text_of(render_sweep(sweep, records, JUDGE))
    assert "otprune at 10 % beside unpruned, worst first" in text
    assert "a blue cat on a mat unpruned one green bird reference a large red circle a.parquet row 1" in text
    assert text.index("a blue cat on a mat") < text.index("a red dog")
    assert "(same words) a red dog unpruned a red dog" in text


def test_the_front_is_what_no_other_setting_beats_in_both():
    worse = record("random", 0.2, around(55), [0.9, 0.88, 0.92])
    front = pareto_front(settings_of([*RECORDS, worse]))
    assert [setting.label for setting in front] == ["otprune at 5 %", "otprune at 10 %", "otprune at 20 %", "unpruned"]
    assert [s.label for s in pareto_front(settings_of([UNPRUNED]))] == ["unpruned"]
