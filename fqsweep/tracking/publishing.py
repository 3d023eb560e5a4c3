"""The report of a sweep on its parent run, and what it says of the runs as their tags."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import tempfile
import warnings
from pathlib import Path

import numpy as np
from mlflow import MlflowClient

from fqsweep import __version__
from fqsweep.files import MODEL_FILE
from fqsweep.names import TAG_FRONT, TAG_PARENT, TAG_REASON, TAG_RECOMMENDED
from fqsweep.tracking.stores import drop_tag, search_runs
from fqsweep.tracking.tracker import reaching

MAX_TAG = 5000  # characters of a tag that MLflow takes
MODEL_FOLDER = "model"  # of a run: its packed model as an MLflow model


def publish_report(uri: str, parent_id: str, folder: Path) -> None:
    """Put the report on the parent run, its answer as the description, and tag the front's and the recommended runs.

    Tags of an earlier report that no longer hold are taken away. Recommended runs get their packed model as an
    MLflow model, which ``mlflow.pyfunc.load_model("runs:/RUN/model")`` loads.

    Args:
        folder: with ``front.csv`` (columns ``on_front`` and ``run_ids``), ``recommended.json`` and ``answer.md``.

    Raises:
        TrackingError, OSError: see ``reaching``.
    """
    with reaching(uri):
        client = MlflowClient(tracking_uri=uri)
        for file in sorted(folder.iterdir()):
            if file.is_file():
                client.log_artifact(parent_id, str(file))
        client.set_tag(
            parent_id, "mlflow.note.content", (folder / "answer.md").read_text(encoding="utf-8")[:MAX_TAG]
        )
        reasons = _recommended_runs(folder)
        wanted = {
            TAG_FRONT: _runs_on_front(folder),
            TAG_RECOMMENDED: dict.fromkeys(reasons, "true"),
            TAG_REASON: reasons,
        }
        experiment_id = client.get_run(parent_id).info.experiment_id
        for run in search_runs(client, f"tags.`{TAG_PARENT}` = '{parent_id}'", experiment_id=experiment_id):
            for tag, values in wanted.items():
                value, now = values.get(run.info.run_id), run.data.tags.get(tag)
                if value is not None and value != now:
                    client.set_tag(run.info.run_id, tag, value)
                elif value is None and now is not None:
                    drop_tag(client, run.info.run_id, tag)
        for run_id in reasons:
            _add_model(client, run_id)


def _add_model(client: MlflowClient, run_id: str) -> None:
    """Store a run's packed model as an MLflow model too, once; a run without a packed model has none."""
    files = {file.path for file in client.list_artifacts(run_id)}
    if MODEL_FILE not in files:
        return
    last = f"{MODEL_FOLDER}/data"  # of what is sent; a model that was cut off is sent again
    if MODEL_FOLDER in files and client.list_artifacts(run_id, last):
        return
    with tempfile.TemporaryDirectory() as folder:
        packed = client.download_artifacts(run_id, MODEL_FILE, folder)
        target = Path(folder) / MODEL_FOLDER
        _save_model(Path(packed), target)
        client.log_artifacts(run_id, str(target), MODEL_FOLDER)


def _save_model(packed: Path, target: Path) -> None:
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        # It asks for an example, and for type hints in its own classes, past any filter; the signature says what
        # comes in.
        warnings.simplefilter("ignore")
        from mlflow.models import ModelSignature
        from mlflow.pyfunc import save_model
        from mlflow.types import Schema, TensorSpec

        save_model(
            target,
            loader_module="fqsweep.served_model",  # by name: code that is given is run, and loads torch
            data_path=str(packed),
            signature=ModelSignature(inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1, 3))])),
            pip_requirements=[f"fqsweep=={__version__}"],  # named here, because finding out loads the model
        )


def _runs_on_front(folder: Path) -> dict[str, str]:
    with (folder / "front.csv").open(newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["on_front"] == "True"]
    return {run_id: "true" for row in rows for run_id in row["run_ids"].split()}


def _recommended_runs(folder: Path) -> dict[str, str]:
    """Run id -> why; a run that is taken under several budgets has its reasons behind one another."""
    record = json.loads((folder / "recommended.json").read_text(encoding="utf-8"))
    chosen = [budget for setting in record["settings"] for budget in setting["budgets"].values()]
    reasons: dict[str, list[str]] = {}
    for one in chosen:
        reasons.setdefault(one["run_id"], []).append(one["reason"])
    return {run_id: "; ".join(each)[:MAX_TAG] for run_id, each in reasons.items()}
