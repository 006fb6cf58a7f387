"""--help: every key once, in its section, with what it is for, as wide as the terminal."""

import pytest

from jobs.export import UNUSED
from pipelines.accuracy.config import NOT_IN_EVALUATION, AccuracyConfig, CalibrateConfig, EvaluateConfig
from pipelines.config.help import COLUMN, help_text
from pipelines.config.keys import Config
from pipelines.config.schema import keys_of, sections_of
from pipelines.export.config import ExportConfig
from pipelines.quality.config import QualityConfig
from pipelines.study.config import NOT_IN_STUDY, StudyConfig
from pipelines.sweep.config import SweepConfig

SCHEMAS = [
    *((schema, ()) for schema in (Config, QualityConfig, CalibrateConfig, SweepConfig)),
    *((schema, NOT_IN_EVALUATION) for schema in (EvaluateConfig, AccuracyConfig)),
    (StudyConfig, NOT_IN_STUDY),
    (ExportConfig, UNUSED),
]
every_schema = pytest.mark.parametrize(("schema", "without"), SCHEMAS, ids=[schema.__name__ for schema, _ in SCHEMAS])


def blocks(text: str) -> list[list[str]]:
    """Lines of the sections: heading first."""
    return [block.splitlines() for block in text.partition("arguments):\n\n")[2].split("\n\n")]


@every_schema
def test_every_key_stands_once_in_its_section_with_its_default_and_meaning(schema, without):
    seen = []
    for heading, *lines in blocks(help_text("usage", schema, without, width=100)):
        section = heading.partition(":")[0]
        starts = [line.strip().partition("=")[0] for line in lines if line[2] != " "]
        assert starts
        text = " ".join(" ".join(lines).split())
        for name in starts:
            key = keys_of(schema)[name]
            assert name.rpartition(".")[0] == (section if section in sections_of(schema) else "")
            assert len(key.meaning) > 5
            assert " ".join(key.meaning.split()) in text
        seen += starts
    assert sorted(seen) == sorted(set(keys_of(schema)) - set(without))


@every_schema
def test_every_section_says_in_one_line_what_it_is_for(schema, without):
    for kind in sections_of(schema).values():
        meaning = kind.__doc__ or ""
        assert "\n" not in meaning
        assert len(meaning) > 10
        assert not meaning.startswith(kind.__name__)  # what dataclasses write where nobody wrote anything


@every_schema
@pytest.mark.parametrize("width", [80, 100, 120])
def test_lines_fit_the_width_and_meanings_are_aligned(schema, without, width):
    for _, *lines in blocks(help_text("usage", schema, without, width)):
        assert all(len(line) <= width for line in lines)
        assert all(line[COLUMN] != " " for line in lines if line.startswith(" " * COLUMN))


def test_a_key_is_shown_as_it_is_typed_with_what_it_must_be():
    text = help_text("usage")
    meaning = "share of the visual tokens to keep; null: the family's default,"
    assert "\n" + "  prune.retention=null".ljust(COLUMN) + meaning + "\n" in text
    assert "\n" + " " * COLUMN + "[number above 0 and at most 1, or null]\n" in text
    assert "  prompt.template='Provide a one-sentence caption for the provided image.'\n" in text
    assert "[refuse or new]" in text
    assert "mlflow.enabled=true" in text
    assert "input.limit=null" in text
    assert "cost.prices=[conf/prices.yaml]" in text


def test_the_keys_of_the_job_itself_come_first():
    headings = [heading.partition(":")[0] for heading, *_ in blocks(help_text("usage", AccuracyConfig))]
    assert headings[:4] == ["keys without a section", "baseline", "grid", "input"]


def test_headings_are_bold_where_that_is_asked_for_and_nowhere_else():
    assert "\033" not in help_text("usage")
    assert "\033[1minput: the corpus to caption\033[0m" in help_text("usage", bold=True)
