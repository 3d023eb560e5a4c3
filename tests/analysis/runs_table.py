"""Small tables of runs by hand, without a store."""

from __future__ import annotations

import numpy as np
import pandas as pd

from fqsweep.names import RUN_PARAMS, metric_keys

PLACE = {"dataset": "isic2019", "group_attribute": "sex", "architecture": "resnet18"}


def run_row(variant: str, budget_bits: float, seed: int, val: float, **values: object) -> dict[str, object]:
    """One run; metrics that are not given are NaN, test/acc_worst is val - 0.01."""
    row: dict[str, object] = dict.fromkeys(RUN_PARAMS, "none") | dict.fromkeys(metric_keys(), np.nan)
    weights = {"fairness_weight": np.nan, "bitrate_weight": np.nan}
    row |= (
        PLACE | {"variant": variant, "budget_bits": budget_bits, "budget_bytes": np.nan, "seed": seed} | weights
    )
    row |= {"run_id": f"{variant}-{budget_bits:g}-{seed}", "val/acc_worst": val, "test/acc_worst": val - 0.01}
    row["bits/mean_weight"] = 32.0 if np.isnan(budget_bits) else budget_bits
    return row | values


def runs_of(*rows: dict[str, object]) -> pd.DataFrame:
    return pd.DataFrame(rows)
