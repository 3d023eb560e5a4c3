"""One real MLflow store a session: its migration takes seconds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
from mlflow import MlflowClient
from synthetic_store import SCRIPT_NAME, Spec, grid, write_sweep

from analysis.mlflow_runs import load_runs
from fqsweep.names import DEFAULT_EXPERIMENT, TAG_PRUNED, TAG_RETIRED


@dataclass(frozen=True)
class Store:
    uri: str
    client: MlflowClient
    parent: str
    older_parent: str


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Sweeps: ``small`` (twice, the later counts), ``unfinished``, ``single`` (one run, one seed)."""
    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{folder}/mlflow.db"
    client = MlflowClient(uri)
    client.create_experiment(DEFAULT_EXPERIMENT, artifact_location=(folder / "artifacts").as_uri())
    older = write_sweep(client, "small", [Spec(variant="static", budget_bits="1")], start_ms=1_000)
    specs = list(grid(seeds=(2, 42), architectures=("resnet18",), attributes=("sex",), budgets=("1", "2")))
    specs += [
        Spec(variant="static", budget_bits="1", seed=7, key="twice", metrics={"val/acc_worst": 0.5}),
        Spec(variant="static", budget_bits="1", seed=7, key="twice", metrics={"val/acc_worst": 0.6}),
        Spec(variant="static", budget_bits="2", seed=7, metrics={"test/auc_worst": math.nan}),
        Spec(variant="hawq", budget_bits="2", seed=7, without=("val/acc_worst",)),
        Spec(variant=SCRIPT_NAME, budget_bits="1", seed=2),
        Spec(variant="baq", budget_bits="1", seed=7, status="FAILED"),
        Spec(variant="pruned", budget_bits="1", seed=7, tags={TAG_PRUNED: "true"}),
        Spec(variant="retired", budget_bits="1", seed=7, tags={TAG_RETIRED: "true"}),
        Spec(variant="retired", budget_bits="1", seed=7, tags={TAG_RETIRED: "true", TAG_PRUNED: "true"}),
    ]
    parent = write_sweep(client, "small", specs, start_ms=2_000)
    write_sweep(client, "unfinished", [Spec(variant="baq", budget_bits="1", status="FAILED")])
    write_sweep(client, "single", [Spec(variant="baq", budget_bits="1")])
    return Store(uri, client, parent, older)


@pytest.fixture(scope="session")
def small(store: Store) -> pd.DataFrame:
    return load_runs(store.uri, "small")


@pytest.fixture(scope="session")
def small_csv(small: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("csv") / "small.csv"
    small.to_csv(path, index=False)
    return path
