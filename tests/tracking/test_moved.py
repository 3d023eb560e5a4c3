"""Output folders that were moved or copied go on with the files that lie in them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.tracking._tracking_service.utils import _artifact_repos_cache

from fqsweep.files import SweepPaths
from fqsweep.tracking.moved import follow_artifacts
from fqsweep.tracking.stores import default_uri
from fqsweep.tracking.tracker import Tracker, open_tracker
from tests.small_spaces import SMALL, write_space
from tests.whole_sweeps import give_database


def begin(out: Path) -> Tracker:
    paths = SweepPaths(out)
    give_database(out)
    return open_tracker(
        default_uri(paths), paths=paths, sweep="t", space_file=write_space(out, SMALL), facts={}
    )


@pytest.mark.parametrize("how", [shutil.move, shutil.copytree])
def test_what_is_new_lies_in_the_folder_that_it_belongs_to(tmp_path: Path, how: object) -> None:
    old, new = tmp_path / "old", tmp_path / "new place"
    before = begin(old)
    model = before.client.create_logged_model(before.experiment_id, name="m", source_run_id=before.parent_id)
    how(str(old), str(new))  # type: ignore[operator]
    in_old = {path for path in old.rglob("*") if "mlartifacts" in path.parts}
    _artifact_repos_cache.clear()  # of MLflow in this process, which has seen the run in its old place
    after = begin(new)
    assert after.parent_id == before.parent_id
    run = after.client.create_run(after.experiment_id)
    for run_id in (after.parent_id, run.info.run_id):
        (tmp_path / "new.txt").write_text("new")
        after.client.log_artifact(run_id, str(tmp_path / "new.txt"))
        assert (new / "mlartifacts" / run_id / "artifacts" / "new.txt").is_file()
    assert {path for path in old.rglob("*") if "mlartifacts" in path.parts} == in_old
    place = after.client.get_logged_model(model.model_id).artifact_location
    assert place.startswith((new / "mlartifacts").as_uri())


def test_a_store_with_its_files_elsewhere_is_left_as_it_is(tmp_path: Path) -> None:
    """A database that another program made, whose experiment of our name has a place of its own."""
    out = tmp_path / "out"
    give_database(out)
    (out / "mlartifacts").mkdir()
    client = MlflowClient(default_uri(SweepPaths(out)))
    client.create_experiment("fqsweep", artifact_location="s3://bucket/runs")
    follow_artifacts(out / "mlflow.db", experiment="fqsweep")
    found = client.get_experiment_by_name("fqsweep")
    assert found is not None and found.artifact_location == "s3://bucket/runs"


def test_an_empty_file_is_left_to_mlflow(tmp_path: Path) -> None:
    (tmp_path / "mlartifacts").mkdir()
    (tmp_path / "mlflow.db").touch()
    follow_artifacts(tmp_path / "mlflow.db", experiment="fqsweep")
    assert (tmp_path / "mlflow.db").stat().st_size == 0
