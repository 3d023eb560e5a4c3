from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import load
from analysis.mlflow_runs import load_runs
from analysis.runs import load_csv
from fqsweep.errors import InputError
from fqsweep.names import RUN_PARAMS, metric_keys
from fqsweep.tracking import stores


def test_only_finished_trials_of_the_latest_sweep_of_that_name_are_read(store, small):
    assert set(small["parent_run_id"]) == {store.parent}
    assert not ((small["variant"] == "baq") & (small["seed"] == 7)).any()
    notes = " ".join(small.attrs["notes"])
    assert "2 sweeps are called 'small'" in notes
    assert store.older_parent in notes
    assert "1 failed of" in notes


def test_runs_of_an_earlier_search_space_are_left_out_with_a_word(small):
    assert "retired" not in set(small["variant"])
    assert "retired" not in {row["variant"] for row in small.attrs["pruned"]}
    assert any("No result of the search space as it is, and left out: 2 of" in n for n in small.attrs["notes"])


def test_every_parameter_and_metric_is_a_column_of_the_right_type(small):
    assert set(RUN_PARAMS) | set(metric_keys()) <= set(small.columns)
    assert small["seed"].dtype == np.int64
    assert small["budget_bits"].dtype == float
    assert small.loc[small["variant"] == "fp32", "budget_bits"].isna().all()
    assert "test/acc_group/female" in small


def test_the_newest_run_of_a_repeated_trial_counts(small):
    repeated = small[small["key"] == "twice"]
    assert repeated["val/acc_worst"].tolist() == [0.6]
    assert any(note.startswith("Repeated trials") for note in small.attrs["notes"])


def test_missing_and_nan_metrics_are_named_with_their_runs(small):
    notes = small.attrs["notes"]
    for key, variant in (("test/auc_worst", "static"), ("val/acc_worst", "hawq")):
        run = small.loc[small[key].isna(), "run_id"].item()
        assert small.loc[small["run_id"] == run, "variant"].item() == variant
        assert any(key in note and run in note for note in notes)


def test_paging_reads_every_run(store, small, monkeypatch):
    monkeypatch.setattr(stores, "PAGE", 4)
    assert set(load_runs(store.uri, "small")["run_id"]) == set(small["run_id"])


def test_a_csv_gives_the_same_runs(small, small_csv):
    again = load_csv(small_csv)
    columns = [*RUN_PARAMS, *metric_keys(), "run_id"]
    pd.testing.assert_frame_equal(again[columns], small[columns], check_dtype=False)


def test_an_unknown_sweep_lists_those_that_exist(store):
    with pytest.raises(InputError, match=r"holds 'single', 'small', 'unfinished': use 'small'\?"):
        load_runs(store.uri, "smal")


def test_a_quote_in_the_sweep_name_is_only_a_name(store):
    with pytest.raises(InputError, match="must exist"):
        load_runs(store.uri, "x' OR '1'='1")


def test_a_sweep_without_a_finished_run_says_what_it_has(store):
    with pytest.raises(InputError, match="must have a finished trial run, but has 1 failed"):
        load_runs(store.uri, "unfinished")


def test_a_missing_database_is_refused_and_not_created(tmp_path):
    with pytest.raises(InputError, match="there is no database"):
        load_runs(f"sqlite:///{tmp_path}/none.db", "small")
    assert not list(tmp_path.iterdir())


def test_a_server_that_does_not_answer_is_an_input_error(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(InputError, match="cannot be read"):
        load_runs("http://127.0.0.1:9", "small")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read as CSV"),
        ("a,b\n1,2\n", "must have the columns dataset"),
        (None, "there is no file"),
    ],
)
def test_a_csv_that_holds_no_runs_is_an_input_error(tmp_path: Path, text, message):
    path = tmp_path / "runs.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_csv(path)


def test_analysis_imports_neither_torch_nor_ray_even_when_it_reads_mlflow(store, tmp_path):
    arguments = ["--tracking-uri", store.uri, "--sweep", "single", "--out", str(tmp_path)]
    code = (
        f"import sys; from analysis.report import main; assert main({arguments!r}) == 0; "
        "assert not {'torch', 'ray'} & set(sys.modules)"
    )
    root = str(Path(load.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "only baq was run" in done.stdout
