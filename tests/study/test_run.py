"""The study as a job: resumable pieces, the same numbers as direct calls, errors that name the key, one page."""

import io
import json
import re
import xml.etree.ElementTree as ET
from dataclasses import asdict

import pyarrow.parquet as pq
import pytest

from jobs.study import main
from pipelines.config.load import load_config
from pipelines.errors import UserError
from pipelines.run.outcome import Outcome
from pipelines.store import Store
from pipelines.study.config import StudyConfig
from pipelines.study.experiments import EXPERIMENTS
from pipelines.study.greedy import greedy_ratio, summarize_greedy
from pipelines.study.page import render_study
from pipelines.study.pieces import Model, Piece, commit, load, missing
from pipelines.study.run import prepare_study, run_study, track_study
from pipelines.study.synthetic import judge_data_set, summarize_data_sets
from pipelines.tracker import MlflowTracker
from tests.conftest import REPOSITORY

QUICK = REPOSITORY / "conf" / "study_quick.yaml"
TINY = (
    "experiments=[table2,greedy,ranks]",
    "table2.rows=[1]",
    "table2.seeds=2",
    "table2.block=10000",
    "greedy.sizes=[[8,4,3]]",
    "greedy.gammas=[1.0]",
    "greedy.seeds=2",
    "mlflow.enabled=false",
)


def configured(*arguments: str) -> StudyConfig:
    return load_config(
        ["--config", str(QUICK), f"model.path={REPOSITORY / 'demo' / 'checkpoint'}", *arguments], StudyConfig
    )


def tiny(folder, *arguments: str):
    return prepare_study(configured(*TINY, f"output.path={folder}", *arguments))


def table(store: Store, name: str) -> list[dict]:
    return pq.read_table(io.BytesIO(store.read(f"results/{name}.parquet"))).to_pylist()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_rerun_computes_what_is_missing_and_gives_the_numbers_of_direct_calls(tmp_path):
    study = tiny(tmp_path)
    assert len(study.pieces) == len(study.missing) == 2 * 2 + 2 + 2  # seeds x blocks, seeds, ranks and p-values
    outcome, conclusions = run_study(study)
    assert (outcome.code, outcome.metrics["pieces_computed"]) == (0, 8)
    judged = [result for seed in (0, 1) for result in judge_data_set(20, 10, 5, seed, num_subsets=None)]
    direct = [asdict(result) for result in summarize_data_sets(judged)]
    ours = table(study.output, "table2")
    assert [{name: row[name] for name in direct[0]} for row in ours] == direct
    ratios = [greedy_ratio(8, 4, 3, seed, gamma=1.0) for seed in (0, 1)]
    assert table(study.output, "greedy") == [asdict(summarize_greedy(8, 4, 3, 1.0, ratios))]

    before = {name: (tmp_path / name).stat().st_mtime_ns for name in (piece.path for piece in study.pieces)}
    lost = {study.pieces[1].path, study.pieces[5].path}
    for name in lost:
        (tmp_path / name).unlink()
    again = tiny(tmp_path)
    assert {piece.path for piece in again.missing} == lost
    outcome, repeated = run_study(again)
    assert (outcome.code, outcome.metrics["pieces_computed"]) == (0, 2)
    assert repeated == conclusions
    after = {name: (tmp_path / name).stat().st_mtime_ns for name in before}
    assert {name for name in before if after[name] != before[name]} == lost


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_piece_that_fails_is_named_and_costs_only_its_experiment(tmp_path):
    study = tiny(tmp_path)
    broken = Piece(
        "greedy", "too-large", EXPERIMENTS["greedy"].plan(study.config, Model("", ""))[0].compute, {"size": []}
    )
    study = type(study)(study.config, study.names, (*study.pieces, broken), (study.pieces[0], broken), study.output)
    for piece in study.pieces[1:-1]:
        commit(piece, study.output)
    outcome, conclusions = run_study(study)
    assert outcome.code == 1
    assert outcome.message.startswith("1 pieces failed, the first greedy/too-large: TypeError")
    assert set(conclusions) == {"table2", "ranks"}
    assert missing(study.pieces, study.output) == [broken]


def test_more_seeds_keep_the_pieces_of_fewer(tmp_path):
    few = {piece.path for piece in tiny(tmp_path).pieces}
    assert few < {piece.path for piece in tiny(tmp_path, "table2.seeds=3", "greedy.seeds=3").pieces}


def test_what_decides_a_result_decides_its_name_and_where_the_model_lies_does_not():
    def path(**changed):
        base = {"experiment": "x", "name": "n", "compute": len, "arguments": {"a": 1}, "where": {"model": "here"}}
        return Piece(**{**base, **changed}).path

    assert path(where={"model": "there"}) == path()
    assert len({path(), path(arguments={"a": 2}), path(compute=max), path(name="m")}) == 4


def test_rows_come_back_as_they_were_committed(tmp_path):
    store = Store(str(tmp_path))
    pieces = [Piece("x", str(i), lambda i: [{"i": i, "text": "a", "none": None}], {"i": i}) for i in range(3)]
    for piece in reversed(pieces):
        commit(piece, store)
    assert load(pieces, store) == [{"i": i, "text": "a", "none": None} for i in range(3)]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("experiments=[nope]", "experiments must be all or a list of table2, greedy, gamma, distance, ranks"),
        ("table2.rows=[6]", "table2.rows must be lines 1 to 5"),
        ("table2.exhaustive=[3]", "table2.exhaustive must be 1 or 2"),
        ("table2.seeds=1", "table2.seeds must be at least 2, got 1"),
        ("greedy.sizes=[[30,8,4]]", "greedy.sizes must be"),
        ("greedy.sizes=[[8,8]]", "greedy.sizes must be"),
        ("gamma.gammas=[0.0]", "gamma.gammas must be positive"),
        ("gamma.scales=[other]", "gamma.scales"),
        ("gamma.kept=600", "gamma.kept must be below gamma.tokens"),
        ("gamma.widths=[64]", "gamma.widths must be two different widths or more"),
        ("distance.methods=[DivPrune,random,magic]", "distance.methods must be of .*, got 'magic'"),
        ("distance.methods=[DivPrune]", "distance.methods must be three or more"),
        ("distance.retentions=[1.5]", "distance.retentions must be in"),
        ("prune.method=random", "prune.method has no meaning here"),
        ("model.path=nowhere/at-all", "nowhere/at-all"),
        ("output.path=", "output.path must be set"),
    ],
)
def test_user_mistakes_are_named_before_anything_is_computed(tmp_path, argument, message):
    with pytest.raises(UserError, match=message):
        prepare_study(configured(f"output.path={tmp_path}", argument))


def test_the_output_of_another_job_is_refused(tmp_path):
    (tmp_path / "fingerprint.json").write_text(json.dumps({"model.path": "x"}))
    with pytest.raises(UserError, match="holds another job's output"):
        tiny(tmp_path)


def test_bad_input_is_exit_code_2(capsys):
    assert main(["experiments=everything"]) == 2
    assert capsys.readouterr().err.startswith("error: experiments must be")


@pytest.fixture(scope="module")
def whole_study(tmp_path_factory):
    """Every experiment, as small as it gets, computed in this process: (config, conclusions)."""
    config = configured(
        f"output.path={tmp_path_factory.mktemp('study')}",
        *(argument for argument in TINY if not argument.startswith("experiments")),
        "resamples=20",
        "gamma.seeds=1",
        "gamma.tokens=40",
        "gamma.kept=8",
        "gamma.widths=[16,64]",
        "gamma.gammas=[0.01,0.5]",
        "distance.scenes=3",
        "distance.retentions=[0.05,0.2]",
        "distance.exact=true",
    )
    study = prepare_study(config)
    for piece in study.pieces:
        commit(piece, study.output)
    conclusions = {
        name: EXPERIMENTS[name].conclude(load([p for p in study.pieces if p.experiment == name], study.output), config)
        for name in study.names
    }
    return config, conclusions


@pytest.mark.slow
def test_the_page_holds_every_experiment_and_nothing_from_elsewhere(whole_study):
    config, conclusions = whole_study
    page = render_study(config, conclusions, Outcome())
    assert all(f'id="{name}"' in page for name in EXPERIMENTS)
    assert not any(outside in page for outside in ("<script", "src=", "<link", "url(", "http"))
    drawings = page.split("<svg")[1:]
    assert len(drawings) == 2 + 1 + 3 + 1 + 2 * 6  # table 2, greedy, gamma, rho, retentions x distances
    for drawing in drawings:
        ET.fromstring("<svg" + drawing.split("</svg>")[0] + "</svg>")
    assert not re.search(r"\bnan\b", page)


@pytest.mark.slow
def test_the_page_of_one_experiment_leaves_the_others_out(whole_study):
    config, conclusions = whole_study
    page = render_study(config, {"ranks": conclusions["ranks"]}, Outcome(1, "2 pieces failed"))
    assert "31 of 31 printed ranks" in page
    assert "2 pieces failed" in page
    assert 'id="table2"' not in page


@pytest.mark.slow
def test_findings_are_made_from_the_numbers(whole_study):
    _, conclusions = whole_study
    assert conclusions["ranks"].metrics == {"ranks": 31, "ranks_reproduced": 31}
    [only] = [
        row for row in conclusions["ranks"].tables["p_values"] if row["agrees"] and row["alternative"] == "greater"
    ]
    assert (only["scores"], only["method"], only["correction"]) == ("llava-1.5-13b", "approx", True)
    assert any("llava-1.5-13b, one-sided, normal approximation with" in text for text in conclusions["ranks"].findings)
    worst = conclusions["greedy"].metrics["worst_ratio"]
    assert any(f"{100 * worst:.2f} %" in text for text in conclusions["greedy"].findings)
    assert all(conclusion.findings and conclusion.tables for conclusion in conclusions.values())


@pytest.mark.slow
def test_every_experiment_is_a_run_inside_the_studys_run(whole_study, tmp_path, monkeypatch):
    runs = []

    class Recorder(MlflowTracker):
        def __init__(self, _enabled, _uri, experiment, name, _output):
            self.experiment, self.name, self.run_id, self.artifacts = experiment, name, f"id-{name}", []
            runs.append(self)

        def start(self, params, tags, config_yaml):
            self.params, self.tags = params, tags

        def log(self, metrics, step):
            self.metrics = metrics

        def artifact(self, name, content):
            self.artifacts.append(name)

        def finish(self, status):
            self.status = status
            return "tracked"

    monkeypatch.setattr("pipelines.study.run.make_tracker", Recorder)
    _, conclusions = whole_study
    study = tiny(tmp_path)
    assert track_study(study, conclusions, Outcome(), "<html>") == "tracked"
    parent, *children = runs
    assert (parent.name, parent.status, parent.artifacts) == ("study", "FINISHED", ["study.html"])
    assert [child.name for child in children] == list(EXPERIMENTS)
    assert {child.tags["mlflow.parentRunId"] for child in children} == {"id-study"}
    assert all(child.metrics == conclusions[child.name].metrics for child in children)
    assert children[0].params["table2.seeds"] == 2
    assert "greedy.seeds" not in children[0].params
    assert children[-1].artifacts == ["findings.txt", "ranks.parquet", "p_values.parquet"]
