"""Progress: counts, rates, time left and dollars of a run, as one live line or as plain lines now and then."""

import io

import pytest
from rich.console import Console

from pipelines.dollars.meter import Meter, Tariff
from pipelines.output.totals import Totals
from pipelines.run import progress
from pipelines.run.progress import Progress


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def unit(captioned: int, quarantined: int = 0, tokens: int = 10, **more) -> dict:
    return {
        "images_captioned": captioned,
        "images_quarantined": quarantined,
        "captions": captioned,
        "unanswered": 0,
        "prompt_tokens": 30 * captioned,
        "generated_tokens": tokens * captioned,
        "finished_by_length": 0,
        "reasons": {"empty": quarantined} if quarantined else {},
        "seconds": {"read": 1.0, "encode": 2.0},
    } | more


def started(clock: Clock, num_rows: int = 1000, num_done: int = 0, usd_per_hour: float | None = None, **options):
    meter = Meter(Tariff(usd_per_hour=usd_per_hour), clock.now, clock)
    return Progress(num_rows, num_done, meter, options.pop("every", 5.0), **options)


def lines_of(shown: Progress) -> io.StringIO:
    """Where its lines go from now on."""
    shown._console = Console(file=io.StringIO(), width=40)
    return shown._console.file


def test_totals_are_sums_over_units_and_survive_json():
    totals = Totals()
    totals.add(unit(3, 1, finished_by_length=2))
    totals.add(unit(5, 2, seconds={"encode": 1.0, "write": 0.5}))
    assert (totals.images, totals.images_captioned, totals.images_quarantined, totals.units) == (11, 8, 3, 2)
    assert totals.to_dict()["seconds"] == {"read": 1.0, "encode": 3.0, "write": 0.5}
    assert totals.to_dict()["reasons"] == {"empty": 3}
    assert (totals.generated_tokens, totals.prompt_tokens, totals.finished_by_length) == (80, 240, 2)


def test_the_rate_counts_from_the_start_of_the_first_unit_and_so_without_the_start_up(clock):
    shown = started(clock)
    clock.now += 100  # Ray and the models, and two seconds of work on the first unit
    shown.update(unit(20))
    assert shown.startup_seconds == pytest.approx(98)
    for _ in range(4):
        clock.now += 2
        shown.update(unit(20, tokens=10))
    assert shown.rates()["images_per_second"] == pytest.approx(10)
    assert shown.rates()["tokens_per_second"] == pytest.approx(100)


def test_the_rate_lies_in_its_interval_however_slow_the_first_unit_was(clock):
    shown = started(clock)
    clock.now += 100
    shown.update(unit(20, seconds={"encode": 30.0}))
    for _ in range(8):
        clock.now += 2
        shown.update(unit(20))
    rates = shown.rates()
    assert rates["images_per_second"] == pytest.approx(180 / 46)
    assert rates["images_per_second_low"] < rates["images_per_second"] < rates["images_per_second_high"]


def test_the_line_shows_the_rate_of_the_last_minute_and_the_run_has_its_own(clock):
    shown = started(clock, num_rows=10_000)
    for step in range(120):
        clock.now += 1
        shown.update(unit(100 if step < 40 else 7))
    assert shown.rates(recent=True)["images_per_second"] == pytest.approx(7)
    assert "| 7.0 images/s | 70 tokens/s |" in shown.line()
    assert shown.rates()["images_per_second"] == pytest.approx((40 * 100 + 80 * 7) / 120)


def test_units_of_broken_images_that_come_before_the_models_are_up_are_no_start(clock):
    shown = started(clock)
    shown.update(unit(0, 20))
    clock.now += 100
    for _ in range(3):
        shown.update(unit(20))
        clock.now += 2
    assert shown.rates()["images_per_second"] == pytest.approx(10)


def test_a_run_of_one_unit_is_timed_by_the_work_on_it(clock):
    shown = started(clock)
    clock.now += 20
    shown.update(unit(40))
    assert shown.rates()["images_per_second"] == pytest.approx(20)


def test_quarantined_images_count_as_done_but_not_as_tokens(clock):
    shown = started(clock)
    shown.update(unit(10, 10))
    clock.now += 10
    shown.update(unit(10, 10))
    assert shown.rates()["images_per_second"] == pytest.approx(4)
    assert shown.rates()["tokens_per_second"] == pytest.approx(20)


def test_nothing_done_is_no_division_by_zero(clock):
    assert set(started(clock).rates().values()) == {0.0}
    assert "ETA -" in started(clock).line()


def test_the_line_says_everything(clock):
    shown = started(clock, num_rows=12_000, num_done=2_000, usd_per_hour=36.0)
    clock.now += 90
    shown.update(unit(1000, 0, seconds={"encode": 4.0, "generate": 6.0}))
    clock.now += 10
    shown.update(unit(970, 30))
    assert shown.line() == (
        "4,000/12,000 images | 100.0 images/s | 985 tokens/s | 30 quarantined | ETA 0:01:20 | "
        "$1.0000 so far, $0.8000 to finish"
    )


def test_without_a_price_there_are_no_dollars_and_long_waits_are_hours(clock):
    shown = started(clock, num_rows=1_000_000)
    clock.now += 1
    shown.update(unit(10))
    clock.now += 1
    shown.update(unit(10))
    assert "$" not in shown.line()
    assert "ETA 27:46:38" in shown.line()
    assert shown.usd is None


def test_dollars_run_from_the_start_of_the_job(clock):
    shown = started(clock, usd_per_hour=7.2)
    clock.now += 500
    assert shown.elapsed == pytest.approx(500)
    assert shown.usd == pytest.approx(1.0)


def test_points_are_due_now_and_then(clock):
    shown = started(clock, every=5.0)
    lines = lines_of(shown)
    due = []
    for _ in range(20):
        clock.now += 1
        due.append(shown.update(unit(1)))
    assert due == [i % 5 == 0 for i in range(20)]  # the first unit at once
    text = lines.getvalue().splitlines()
    assert len(text) == 4  # one a point, none wrapped at the width of the terminal
    assert all("images/s" in line for line in text)


def test_plain_lines_go_to_stderr_and_begin_with_where_the_job_stands(clock, capsys):
    with started(clock, num_rows=10, num_done=4):
        pass
    captured = capsys.readouterr()
    assert captured.err.startswith("4/10 images | ")
    assert captured.out == ""


def test_a_terminal_has_one_live_line_that_is_gone_at_the_end(clock, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(progress.sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with started(clock, num_rows=10, every=1000.0) as shown:
        for _ in range(3):
            clock.now += 1
            shown.update(unit(2))
            assert f"{shown.totals.images}/10 images" in terminal.getvalue()  # at once, not only when a point is due
    after = terminal.getvalue().rpartition("images/s")[2]
    assert "\x1b[2K" in after  # the line is erased
    assert "\x1b[?25h" in after  # and the cursor is back


def test_benchmarks_count_questions(clock):
    shown = started(clock, num_rows=100, counted="questions")
    clock.now += 10
    shown.update(unit(10, captions=20, seconds={"generate": 10.0}))
    clock.now += 10
    shown.update(unit(10, 1, captions=17, unanswered=3))
    assert shown.rates()["questions_per_second"] == pytest.approx(2)
    assert shown.line().startswith("40/100 questions | 2.0 questions/s")
