"""The recommended run's packed model as an MLflow model: stored with the report, loaded without anything else."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch

from fqsweep.errors import InputError
from fqsweep.files import SweepPaths
from fqsweep.quant.packed_model import load_model, read_notes
from fqsweep.quant.packing import read_metadata
from fqsweep.tracking.publishing import publish_report
from fqsweep.tracking.stores import default_uri
from fqsweep.tracking.tracker import open_tracker
from tests.quant.packed_networks import packed_network
from tests.tracking.test_tracking import result

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, bytes]:
    """Tracking URI, the recommended run's id and its packed file."""
    paths = SweepPaths(tmp_path_factory.mktemp("served"))
    paths.report.mkdir(parents=True)
    space = paths.out / "space.yaml"
    space.write_text("name: t")
    packed = paths.out / "model.fqs"
    packed.write_bytes(packed_network("resnet18", drop_frac=0.3))
    uri = default_uri(paths)
    book = open_tracker(uri, paths=paths, sweep="t", space_file=space, facts={"data/skin/abc": "0123" * 16})
    run_id = book.log_trial(result("one"), [packed])
    book.log_data([("skin", "0123" * 16)])
    assert run_id is not None
    (paths.report / "front.csv").write_text(f"variant,run_ids,on_front\na,{run_id},True\n")
    budgets = {"1": {"run_id": run_id, "reason": "it is best"}}
    (paths.report / "answer.md").write_text("**At 1 bit**")
    (paths.report / "recommended.json").write_text(json.dumps({"settings": [{"budgets": budgets}]}))
    for _ in range(2):  # a second report stores nothing twice
        publish_report(uri, book.parent_id, paths.report)
    return uri, run_id, packed.read_bytes()


@pytest.fixture(scope="module")
def served(stored: tuple[str, str, bytes]) -> mlflow.pyfunc.PyFuncModel:
    uri, run_id, _ = stored
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MLflow's hints on the type hints of its own classes
            return mlflow.pyfunc.load_model(f"runs:/{run_id}/model")
    finally:
        mlflow.set_tracking_uri(before)


def test_the_served_model_gives_the_packed_networks_probabilities(
    stored: tuple[str, str, bytes], served: mlflow.pyfunc.PyFuncModel
) -> None:
    blob = stored[2]
    notes = read_notes(read_metadata(blob))
    mean, std = torch.tensor(notes.normalisation.mean), torch.tensor(notes.normalisation.std)
    pixels = ((torch.from_numpy(IMAGES).float() / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = load_model(blob)(pixels).softmax(1).numpy()
    found = served.predict(IMAGES)
    assert list(found.columns) == list(notes.class_names)
    np.testing.assert_allclose(found.to_numpy(), expected, atol=1e-6)


def test_images_of_another_size_are_refused(served: mlflow.pyfunc.PyFuncModel) -> None:
    with pytest.raises(InputError, match="resize them first"):
        served.predict(IMAGES[:, :16])


def test_the_parent_run_names_its_data_and_its_code(stored: tuple[str, str, bytes]) -> None:
    client = mlflow.MlflowClient(stored[0])
    parent = client.get_run(client.get_run(stored[1]).data.tags["mlflow.parentRunId"])
    (data,) = parent.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("skin", ("0123" * 16)[:36])
    if (Path(__file__).parents[1] / ".git").exists():
        assert parent.data.params["version/commit"].startswith(parent.data.tags["mlflow.source.git.commit"])
