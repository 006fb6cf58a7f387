"""The report and the summary: what the numbers are, what the model saw, and nothing that a caption can break."""

import base64
import io
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.config.load import load_config, with_values
from pipelines.output.totals import Totals
from pipelines.report.page import pruned_area, render_report
from pipelines.report.terminal import print_summary
from pipelines.run.job import Job, prepare
from pipelines.run.outcome import Compared, Gate, Outcome
from tests.helpers import QUICK, write_corpus

METRICS = {
    "images_per_second": 12.5,
    "tokens_per_second": 345.6,
    "images_captioned": 990,
    "images_quarantined": 10,
    "wall_seconds": 80.0,
}
DOLLARS = {
    "usd_total": 1.5,
    "usd_of_output": 1.5,
    "usd_per_image": 0.0015,
    "usd_per_million_images": 1515.15,
    "usd_per_million_images_steady": 1500.0,
    "usd_per_hour": 67.5,
    "usd/startup": 0.015,
    "startup_seconds": 1.0,
}


def jpeg() -> str:
    Image.new("RGB", (8, 8), (9, 9, 9)).save(stream := io.BytesIO(), "JPEG")
    return base64.b64encode(stream.getvalue()).decode()


WIDTH, HEIGHT = 224, 168  # of a thumbnail, in pixels


def picture(kept: list[int], rows: int, columns: int) -> dict:
    """The fields of a `Sample`."""
    return {"jpeg": jpeg(), "width": WIDTH, "height": HEIGHT, "kept": kept, "rows": rows, "columns": columns}


def sample(caption: str = "a red circle", **grid: Any) -> dict:
    return {
        "source": "a.parquet",
        "row": 7,
        "references": ["a large red circle"],
        "prompts": ["describe"],
        "captions": [{"caption": caption}],
        **picture(**{"kept": [0, 3], "rows": 2, "columns": 2, **grid}),
    }


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A caption job over 1,000 rows; its images are never decoded here."""
    folder = tmp_path_factory.mktemp("job")
    write_corpus(folder / "corpus" / "a.parquet", [b"no image"] * 1000)
    paths = f"input.path={folder / 'corpus'}", f"output.path={folder / 'out'}"
    return prepare(load_config([*QUICK, "generate.max_new_tokens=48", *paths]))


def totals() -> Totals:
    total = Totals(images_captioned=990, images_quarantined=10, captions=990, prompt_tokens=30_690)
    total.generated_tokens, total.finished_by_length = 9900, 99
    total.reasons.update({"empty": 3, "truncated": 7})
    total.seconds.update({"read": 1.0, "decode": 2.0, "encode": 30.0, "generate": 60.0, "write": 0.5})
    return total


@pytest.fixture
def page(job: Job) -> Callable[..., str]:
    def render(outcome: Outcome | None = None, job: Job = job, total: Totals | None = None) -> str:
        outcome = outcome or Outcome(metrics=METRICS | DOLLARS, samples=[sample()])
        return render_report(job, outcome, total or totals())

    return render


def text_of(html: str) -> str:
    html = re.sub(r"<style>.*?</style>", "", html, flags=re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


def test_the_page_shows_its_numbers(page, job: Job):
    text = text_of(page())
    for number in (
        "1,000 / 1,000 rows accounted for",
        "990 images captioned",
        "10 quarantined",
        "$1,500.00 per million images at steady speed",
        "$1.5000 for the last run including $0.0150 for 1 s of start-up",
        "12.5 images a second",
        "346 generated tokens a second",
        "10.0 tokens a caption",
        "10.0 % cut at 48 tokens",
        "31 tokens prefilled a caption",
        "generate 60.0 s",
        job.fingerprint,
    ):
        assert number in text, number
    assert text.index("truncated decode 7") < text.index("empty decode 3")  # the most frequent reason first
    assert "retention: 0.098" in text


def test_dollars_by_stage_and_idle_time_are_shown_where_they_are_known(page):
    more = {"usd/encode": 0.3, "usd/generate": 0.6, "usd/startup": 0.4, "usd/idle": 0.2, "idle_share": 0.4}
    busy = {"gpu_busy/encode": 0.25, "gpu_busy/generate": 0.5}
    text = text_of(page(Outcome(metrics=METRICS | DOLLARS | more | busy)))
    assert "encode $0.3000 20 % generate $0.6000 40 % start-up $0.4000 27 % idle $0.2000 13 %" in text
    assert (
        "the encode actors worked 25 % of their time and the generate actors 50 %. 40 % of the paid capacity was idle."
        in text
    )


def test_the_dollars_of_a_resumed_output_and_nodes_without_a_price_are_said(page):
    assert "$4.0000 for this output, earlier runs included" in text_of(
        page(Outcome(metrics=METRICS | DOLLARS | {"usd_of_output": 4.0}))
    )
    partly = METRICS | {"usd_total": 1.5, "usd_of_output": 1.5, "nodes_unpriced": 8}
    text = text_of(page(Outcome(metrics=partly)))
    assert "$ ? 8 nodes have no price the others cost $1.5000" in text
    assert "per million images" not in text


def test_without_a_price_the_page_says_how_to_see_dollars(page, job: Job):
    config = with_values(job.config, {"cost.usd_per_hour": None})
    text = text_of(page(Outcome(metrics=METRICS), replace(job, config=config)))
    assert "set cost.usd_per_hour to see dollars" in text


def test_a_run_that_came_to_nothing_has_a_page_too(page):
    outcome = Outcome(code=1, message="Ray gave up", metrics=dict.fromkeys(METRICS, 0))
    text = text_of(page(outcome, total=Totals()))
    assert "Ray gave up" in text
    assert "0 / 1,000 rows" in text
    assert "What the model saw" not in text
    assert "Quarantine" not in text


def test_the_page_opens_offline_and_runs_no_script(page):
    html = page()
    links = re.findall(r"(?:src|href)=\"([^\"]{0,40})", html)
    assert links
    assert all(link.startswith("data:image/jpeg;base64,") for link in links)
    assert "http://" not in html
    assert "https://" not in html
    assert not re.search(r"<script|<link|@import|url\(", html)


def test_nothing_in_a_corpus_or_a_caption_becomes_markup(page):
    evil = "</p><script>alert(1)</script>{{ config }} & \"quotes\" 'too'"
    shown = sample(evil) | {"source": evil, "prompts": [evil], "references": [evil]}
    html = page(Outcome(message=evil, metrics=METRICS | DOLLARS, samples=[shown]))
    assert "<script" not in html
    assert html.count("&lt;script&gt;alert(1)") >= 5
    assert "{{ config }}" in html  # as text, not as what it would stand for


def test_captions_that_were_tried_again_are_shown_with_what_that_cost(page):
    total = totals()
    assert "repaired" not in text_of(page(total=total))
    total.retried, total.repaired, total.finished_by_loop, total.retry_tokens = 20, 15, 5, 1100
    text = text_of(page(Outcome(metrics=METRICS | DOLLARS | {"usd_of_retries": 0.0123}), total=total))
    assert "15 / 20 captions repaired of those tried again 0.51 % end in a loop still" in text
    assert "10 % of all generated tokens were tried and not kept, $0.0123 of the last run" in text


def test_samples_show_every_prompt_the_reference_and_the_share_of_tokens(page):
    two = sample() | {"prompts": ["describe", "count"], "captions": [{"caption": "a dog"}, {"caption": "one"}]}
    text = text_of(page(Outcome(metrics=METRICS | DOLLARS, samples=[two, sample() | {"references": []}])))
    assert "describe a dog count one reference a large red circle a.parquet row 7, 2 of 4 tokens" in text
    assert text.count("a large red circle") == 1


def test_the_gates_images_show_both_captions(page):
    compared = Compared("a.parquet", 7, "describe", "a dog", "a cat", ["a red cat"], picture([0, 3], 2, 2), 0.5)
    gate = Gate(True, 0.9, 0.97, (0.93, 1.01), "cider", 1.0, 1.03, 100, 100, 12.0, [compared])
    text = text_of(page(Outcome(metrics=METRICS | DOLLARS, gate=gate)))
    assert "97 % of the unpruned quality 95 %: 93 to 101 %, on 100 images, by CIDEr with the corpus" in text
    assert "references; the gate requires 90 %" in text
    assert "otprune a dog unpruned a cat reference a red cat a.parquet row 7, 2 of 4 tokens" in text


def lit(path: str, rows: int, columns: int) -> np.ndarray:
    """[rows, columns]: the patches that a path filled by the even-odd rule leaves bright, counted at their centres."""
    outer, *holes = re.findall(r"M[^M]*z", path)
    assert outer == f"M0 0H{WIDTH}V{HEIGHT}H0z"
    bright = np.zeros((rows, columns), bool)
    for hole in holes:
        x, y, width, height, back = map(float, re.fullmatch(r"M(\S+) (\S+)h(\S+)v(\S+)h(\S+)z", hole).groups())
        assert (width, height) == (pytest.approx(WIDTH / columns, rel=1e-5), pytest.approx(HEIGHT / rows, rel=1e-5))
        assert width == -back
        column, row = (x + width / 2) / WIDTH * columns, (y + height / 2) / HEIGHT * rows
        bright[int(row), int(column)] ^= True
    return bright


@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (16, 16), (24, 24), (12, 31), (40, 7)])
def test_what_is_left_bright_are_the_patches_of_the_kept_tokens(rows, columns):
    kept = np.sort(np.random.default_rng(rows).choice(rows * columns, rows * columns // 3, replace=False))
    expected = np.zeros(rows * columns, bool)
    expected[kept] = True
    bright = lit(pruned_area(picture(kept.tolist(), rows, columns)), rows, columns)
    assert np.array_equal(bright, expected.reshape(rows, columns))


def test_a_token_without_a_place_leaves_no_patch_bright():
    assert lit(pruned_area(picture([-1, 3], 2, 2)), 2, 2).tolist() == [[False, False], [False, True]]


def test_without_pruning_or_without_a_grid_of_patches_nothing_is_shaded():
    assert pruned_area(picture([0, 1, 2, 3], 2, 2)) == ""
    assert pruned_area(picture([0, 1], 0, 0)) == ""  # a class token among them


def test_a_card_is_as_wide_and_as_high_as_its_thumbnail(page):
    html = page(Outcome(metrics=METRICS | DOLLARS, samples=[sample()]))
    assert f'viewBox="0 0 {WIDTH} {HEIGHT}"' in html
    assert f'width="{WIDTH}" height="{HEIGHT}"' in html
    assert pruned_area(sample()) in html


# The summary


@pytest.fixture
def summary(job: Job, capsys) -> Callable[..., str]:
    def printed(outcome: Outcome, num_done: int = 0) -> str:
        print_summary(replace(job, plan=replace(job.plan, num_done=num_done)), outcome)
        return capsys.readouterr().out

    return printed


def test_the_summary_says_what_came_out_and_where(summary, job: Job):
    outcome = Outcome(metrics=METRICS | DOLLARS, samples=[sample()], tracked="run 1 in sqlite:///x")
    text = summary(outcome, num_done=400)
    for part in (
        "400 of 1,000 rows were done before this run",
        "990 captioned and 10 quarantined",
        "12.5 images/s, 346 tokens/s",
        "$1.5000, $1,515.15 per million images",
        "a red circle",
        f"{job.output.path}/captions/*.parquet",
        f"{job.output.path}/quarantine/*.parquet",
        f"{job.output.path}/report.html",
        "run 1 in sqlite:///x",
    ):
        assert part in text, part


def test_a_summary_of_nothing_done_is_short(summary):
    text = summary(Outcome(message="nothing to do: the output is complete"))
    assert "nothing to do" in text
    assert "images/s" not in text
    assert "quarantine" not in text


@pytest.mark.parametrize("caption", ["[/INST] a dog", "[bold]a dog[/bold]", "a :dog: here", "[red", "a\\[b]"])
def test_a_caption_is_printed_as_it_is(summary, caption):
    outcome = Outcome(metrics=METRICS, samples=[sample(caption)], message="stopped [at] :cat:")
    text = summary(outcome)
    assert caption in text
    assert "stopped [at] :cat:" in text
