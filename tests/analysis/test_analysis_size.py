"""A sweep of 5,000 runs: one report, read within half a minute, and no page too large to send."""

from __future__ import annotations

import time
from pathlib import Path

import pandas as pd
import pytest
from runs_table import PLACE
from synthetic_store import made_up_metrics

from analysis.columns import with_budget
from analysis.report import find, write_report
from benchmarks.report import specs
from fqsweep.names import RUN_PARAMS

METRIC = "val/acc_worst"


def large(num_runs: int) -> pd.DataFrame:
    rows = []
    for i, spec in enumerate(specs(num_runs)):
        row = dict.fromkeys(RUN_PARAMS, "none") | PLACE | made_up_metrics(spec)
        row |= {"run_id": f"{i:032x}", "seed": spec.seed, "variant": spec.variant, "experiment_id": "1"}
        row |= {"architecture": spec.architecture, "group_attribute": spec.group_attribute}
        row |= {"budget_bits": float("nan") if spec.budget_bits == "none" else float(spec.budget_bits)}
        weight = float("nan") if spec.fairness_weight == "none" else float(spec.fairness_weight)
        rows.append(
            row | {"fairness_weight": weight, "bitrate_weight": float("nan"), "budget_bytes": float("nan")}
        )
    return with_budget(pd.DataFrame(rows))


@pytest.mark.slow
def test_five_thousand_runs_make_a_report_in_time_and_of_a_size_to_send(tmp_path: Path):
    runs = large(5000)
    start = time.process_time()
    findings = find(runs, sweep="large", metric=METRIC)
    write_report(findings, tmp_path)
    assert time.process_time() - start < 30
    assert len(runs) == 5000 and findings.points["num_seeds"].max() > 20
    assert max(page.stat().st_size for page in tmp_path.glob("*.html")) < 8_000_000


def test_five_runs_make_a_report_too(tmp_path: Path):
    findings = find(large(5), sweep="five", metric=METRIC)
    assert (write_report(findings, tmp_path)[0]).stat().st_size < 8_000_000
