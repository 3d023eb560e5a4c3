"""The same contract on every kind of store: a sqlite file, PostgreSQL, and a server that hands out artifacts itself."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from analysis.mlflow_runs import load_layers, load_runs
from fqsweep.errors import InputError
from fqsweep.files import SweepPaths
from fqsweep.names import RUN_PARAMS, TAG_FRONT, TAG_RECOMMENDED, metric_keys
from fqsweep.results import TrialResult
from fqsweep.tracking.publishing import publish_report
from fqsweep.tracking.stores import default_uri
from fqsweep.tracking.tracker import Tracker, fetch_model, fetch_space, open_tracker
from tests.quant.packed_networks import packed_network
from tests.tracking.tracking_stores import Missing, mlflow_server, postgres

FACTS = {"version/torch": "1", "data/skin/abc": "0123" * 16}


@pytest.fixture(scope="module", params=["sqlite", "postgresql", pytest.param("server", marks=pytest.mark.slow)])
def store(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, SweepPaths]]:
    """A tracking URI, and a sweep's folder, with everything that a trial leaves."""
    folder = tmp_path_factory.mktemp(request.param)
    paths = SweepPaths(folder / "out")
    paths.report.mkdir(parents=True)
    (paths.out / "space.yaml").write_text("name: t")
    (paths.out / "model.fqs").write_bytes(packed_network("resnet18", drop_frac=0.3))
    (paths.out / "bits.csv").write_text("layer,units,weights_per_unit,mean_bits\nconv1,64,147,8.0\n")
    if request.param == "sqlite":
        yield default_uri(paths), paths
    elif request.param == "postgresql":
        with contextlib.ExitStack() as stack:
            try:
                uri = stack.enter_context(postgres())
            except Missing as missing:
                pytest.skip(str(missing))
            yield uri, paths
    else:
        with mlflow_server(folder) as uri:
            yield uri, paths


def open_book(store: tuple[str, SweepPaths]) -> Tracker:
    uri, paths = store
    return open_tracker(uri, paths=paths, sweep="t", space_file=paths.out / "space.yaml", facts=FACTS)


@pytest.fixture(scope="module")
def run_id(store: tuple[str, SweepPaths]) -> str:
    paths = store[1]
    params = dict.fromkeys(RUN_PARAMS, "none") | {"variant": "static", "budget_bits": "1", "seed": "0"}
    one = TrialResult(
        key="one",
        title="static at 1 bit",
        params=params,
        weights={},
        metrics=dict.fromkeys(metric_keys(), 0.5),
        history=[{"train/loss": 1.0}, {"train/loss": 0.5}],
    )
    written = open_book(store).log_trial(one, [paths.out / "model.fqs", paths.out / "bits.csv"])
    assert written is not None
    assert open_book(store).log_trial(one, []) is None  # also after a new start
    return written


def test_a_trial_comes_back_as_it_was_sent(store: tuple[str, SweepPaths], run_id: str) -> None:
    uri, paths = store
    runs = load_runs(uri, "t")
    assert runs["run_id"].tolist() == [run_id]
    assert runs.loc[0, list(metric_keys())].eq(0.5).all()
    curve = MlflowClient(uri).get_metric_history(run_id, "epoch/train/loss")
    assert [(point.step, point.value) for point in curve] == [(0, 1.0), (1, 0.5)]
    assert fetch_model(uri, run_id) == (paths.out / "model.fqs").read_bytes()
    assert load_layers(uri, [run_id])["layer"].tolist() == ["conv1"]


def test_the_parent_run_has_space_versions_data_and_machine(
    store: tuple[str, SweepPaths], run_id: str, tmp_path: Path
) -> None:
    book = open_book(store)
    book.log_numbers({"system/cpu_utilization_percentage": 50.0}, book.machine_before()[0])
    book.log_numbers({"system/cpu_utilization_percentage": 75.0}, book.machine_before()[0])
    for _ in range(2):  # also when a sweep ends once more
        book.log_data([("skin", "0123" * 16)])
    parent = book.client.get_run(book.parent_id)
    assert parent.data.params["version/torch"] == "1"
    (data,) = parent.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("skin", ("0123" * 16)[:36])
    points = book.client.get_metric_history(book.parent_id, "system/cpu_utilization_percentage")
    assert [(point.step, point.value) for point in points] == [(0, 50.0), (1, 75.0)]
    file, params = fetch_space(store[0], run_id, tmp_path)
    assert file.read_text() == "name: t" and params["variant"] == "static"


def test_a_report_lands_on_the_parent_and_its_tags_can_be_searched(
    store: tuple[str, SweepPaths], run_id: str
) -> None:
    uri, paths = store
    book = open_book(store)
    (paths.report / "front.csv").write_text(f"variant,run_ids,on_front\na,{run_id},True\n")
    budgets = {"1": {"run_id": run_id, "reason": "it is best"}}
    (paths.report / "answer.md").write_text("**At 1 bit**")
    (paths.report / "recommended.json").write_text(json.dumps({"settings": [{"budgets": budgets}]}))
    publish_report(uri, book.parent_id, paths.report)
    for query in (f"tags.{TAG_FRONT} = 'true'", f"tags.{TAG_RECOMMENDED} = 'true'", "tags.variant = 'static'"):
        found = book.client.search_runs([book.experiment_id], query)
        assert [run.info.run_id for run in found] == [run_id], query
    assert book.client.get_run(book.parent_id).data.tags["mlflow.note.content"] == "**At 1 bit**"
    assert "front.csv" in {file.path for file in book.client.list_artifacts(book.parent_id)}
    assert "model/MLmodel" in {file.path for file in book.client.list_artifacts(run_id, "model")}


def test_nothing_is_left_in_the_working_folder(
    store: tuple[str, SweepPaths], run_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_book(store).client.list_artifacts(run_id)
    assert os.listdir(tmp_path) == []


def test_a_database_that_does_not_answer_is_bad_input(tmp_path: Path) -> None:
    pytest.importorskip("psycopg", reason="psycopg is not installed (the extra `postgres`)")
    paths = SweepPaths(tmp_path)
    (tmp_path / "space.yaml").write_text("name: t")
    with pytest.raises(InputError, match="cannot be used") as raised:
        open_book(("postgresql+psycopg://someone:secret@127.0.0.1:9/none", paths))
    assert "secret" not in str(raised.value)


def test_a_database_without_its_driver_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text("name: t")
    with pytest.raises(InputError, match=r"needs the package pg8000"):
        open_book(("postgresql+pg8000://127.0.0.1:9/none", SweepPaths(tmp_path)))
