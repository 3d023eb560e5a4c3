"""What a sweep cost and what it was spared: time, shared parents, early stopping, energy."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from analysis.columns import BYTES, POINT, bytes_text, duration_text, is_full_precision, variants, with_budget

TIME = "time/total_s"


def cost_rows(runs: pd.DataFrame) -> list[list[str]]:
    """Per variant: runs, mean time, summed time, and the range of packed sizes."""
    rows = []
    for variant in variants(runs):
        part = runs[runs["variant"] == variant]
        time, size = part[TIME], part[BYTES]
        sizes = dict.fromkeys([bytes_text(float(size.min())), bytes_text(float(size.max()))])
        times = [duration_text(float(time.mean())), duration_text(float(time.sum(min_count=1)))]
        rows.append([variant, str(len(part)), *times, " to ".join(sizes)])
    return rows


def cost_sentences(runs: pd.DataFrame) -> list[str]:
    """Time, sharing, early stopping and energy in words.

    Args:
        runs: ``mlflow_runs.load_runs``; its ``attrs`` hold what was stopped early, the time of shared work and the
            energy.
    """
    total = duration_text(float(runs[TIME].sum(min_count=1)))
    shared_s = runs.attrs.get("shared_s", math.nan)
    beside = "are not in it" if math.isnan(shared_s) else f"took {duration_text(shared_s)} more"
    taken = f"All finished trials took {total} together; full-precision training and cost tables, which they share, "
    spared = early_stopping(runs, runs.attrs.get("pruned", []))
    return [f"{taken}{beside}.", _sharing(runs), *spared, _energy(runs.attrs.get("energy_kwh", math.nan))]


def _sharing(runs: pd.DataFrame) -> str:
    """How many trials started from how many parents."""
    quantised = runs[~is_full_precision(runs)]
    parents = len(quantised[["dataset", "architecture", "seed"]].drop_duplicates())
    return (
        f"{len(quantised)} finished quantised trials start from {parents} full-precision networks (data set, "
        f"network, seed): without sharing, {len(quantised) - parents} more would have been trained."
    )


def early_stopping(runs: pd.DataFrame, pruned: list[dict[str, Any]]) -> list[str]:
    """What stopping trials early spared, against the mean time of finished trials of the same kind and budget."""
    if not pruned:
        return []
    stopped = with_budget(pd.DataFrame(pruned)).rename(columns={TIME: "own"})
    mean = runs.groupby(list(POINT), dropna=False)[TIME].mean().rename("whole").reset_index()
    whole = stopped[list(POINT)].merge(mean, how="left")["whole"]
    own = stopped["own"].astype(float) if "own" in stopped else math.nan
    saved = (whole - own).clip(lower=0)
    much = f", which spared about {duration_text(float(saved.sum()))}" if saved.notna().any() else ""
    word = "trial was" if len(pruned) == 1 else "trials were"
    return [f"{len(pruned)} {word} stopped early{much}."]


def _energy(energy_kwh: float) -> str:
    if math.isfinite(energy_kwh):
        return (
            f"Energy: {energy_kwh:.3g} kWh, added up by the counters of GPUs and CPU packages of the driver's "
            "machine (all that ran there; other machines are not measured)."
        )
    return (
        "Energy was not measured: the driver's machine shows no counter (a GPU's through NVML, a CPU's through "
        "RAPL), or the runs were read from a file."
    )
