"""What the two searched weights did: rank correlations within cells, and the slices behind them."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
from scipy import stats

from analysis import cli
from analysis.columns import CELL, PANEL, is_full_precision

WEIGHTS = ("fairness_weight", "bitrate_weight")
MIN_RUNS = 4  # fewer have no correlation worth a number
NOTHING_SEARCHED = "No weight took several values within a cell: nothing was searched."


def weight_effects(runs: pd.DataFrame, *, metrics: tuple[str, ...]) -> pd.DataFrame:
    """Spearman's rank correlation of each searched weight with each metric, the cell's own level taken out.

    Runs of one cell differ in their weights only, so each value is taken less its cell's mean, and the runs of
    a (panel, variant) are pooled. A search tries promising weights more often, so this describes; it tests
    nothing.

    Args:
        runs: all finished runs, not one a cell.
        metrics: validation metrics.

    Returns:
        One row a (panel, variant, weight) whose weight was searched: ``num_runs`` and a column for each
        metric, NaN where it cannot be told.
    """
    rows = []
    searched = runs[~is_full_precision(runs)]
    for key, part in searched.groupby([*PANEL, "variant"], sort=True):
        for weight in WEIGHTS:
            moved = slices(part, weight=weight, metrics=metrics)
            if len(moved) >= MIN_RUNS:
                place = dict(zip((*PANEL, "variant"), key, strict=True))
                rhos = {metric: _rho(moved["weight"], moved[metric]) for metric in metrics}
                rows.append(place | {"weight": weight, "num_runs": len(moved)} | rhos)
    return pd.DataFrame(rows, columns=[*PANEL, "variant", "weight", "num_runs", *metrics])


def slices(runs: pd.DataFrame, *, weight: str, metrics: tuple[str, ...]) -> pd.DataFrame:
    """Runs of cells where ``weight`` took several values: ``weight``, and metrics less their cell's mean."""
    known = runs[runs[weight].notna()]
    grouped = known.groupby(list(CELL), dropna=False)
    free = known[grouped[weight].transform("nunique") > 1]
    level = free.groupby(list(CELL), dropna=False)[list(metrics)].transform("mean")
    moved: pd.DataFrame = (free[list(metrics)] - level).round(12)  # rounding must not break ties
    return moved.assign(weight=free[weight], variant=free["variant"])


def _rho(weight: pd.Series, value: pd.Series) -> float:
    known = value.notna()
    if known.sum() < MIN_RUNS or weight[known].nunique() < 2 or value[known].nunique() < 2:
        return math.nan
    return float(stats.spearmanr(weight[known], value[known]).statistic)


def effect_words(rho: float) -> str:
    """A rank correlation in words.

    >>> effect_words(0.8), effect_words(-0.3), effect_words(0.05)
    ('rises clearly', 'falls a little', 'hardly moves')
    """
    if not math.isfinite(rho):
        return "not known"
    if abs(rho) < 0.1:
        return "hardly moves"
    return f"{'rises' if rho > 0 else 'falls'} {'clearly' if abs(rho) >= 0.5 else 'a little'}"


def main(argv: list[str] | None = None) -> int:
    """Print how the searched weights moved validation metrics."""
    parser = cli.source_parser("analysis.effects", "Print what the searched weights did, on validation data.")
    cli.add_metric(parser)

    def act(arguments: Any) -> None:
        runs = cli.read_source(arguments)
        print(arguments.chosen_by, end="\n\n")
        metrics = tuple(dict.fromkeys((arguments.metric, "val/acc_overall", "val/acc_gap")))
        found = weight_effects(runs, metrics=metrics)
        print(found.to_string(index=False, float_format="{:+.2f}".format) if len(found) else NOTHING_SEARCHED)

    return cli.run(parser, act, argv)


if __name__ == "__main__":
    raise SystemExit(main())
