"""Fronts in any two or three objectives, and how far they spread over seeds (moocore does the geometry)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import moocore
import numpy as np
import pandas as pd

from analysis import cli
from analysis.columns import BITS, PANEL, POINT, is_full_precision, is_maximized, on_test
from analysis.intervals import summarize
from analysis.pareto import (
    REFERENCE_BITS,
    REFERENCE_VALUE,
    aggregate,
    hypervolume,
    panel_fronts,
    pareto_front,
    select_cells,
)
from fqsweep.errors import InputError
from fqsweep.names import COST_METRICS, GROUP_METRICS, Direction, metric_of

QUARTILES = (25, 50, 75)
ROOM = 1.1  # a reference without a natural end lies this far beyond the worst point
MIN_SURFACE_SEEDS = 3  # fewer have no quartiles


@dataclass(frozen=True, kw_only=True)
class Objective:
    """One axis of a front: the column that chooses, the column that reports, and which way is better."""

    chooses: str
    reports: str
    direction: Direction


def objective(key: str) -> Objective:
    """The objective of a metric: group metrics choose on validation and report on test, costs are costs.

    >>> objective("val/eodd").reports, objective("size/packed_bytes").direction
    ('test/eodd', 'minimize')

    Raises:
        InputError: the metric is not recorded, or is one on test data.
    """
    groups, costs = [f"val/{m.key}" for m in GROUP_METRICS], [m.key for m in COST_METRICS]
    if key not in groups + costs:
        raise InputError(f"An objective must be one of {', '.join(groups + costs)}, but is {key!r}.")
    reports = on_test(key) if key in groups else key
    return Objective(chooses=key, reports=reports, direction=metric_of(key).direction)


def objectives(keys: Sequence[str]) -> list[Objective]:
    """Two or three objectives.

    Raises:
        InputError: there are fewer or more, one is named twice, or one is none.
    """
    if len(keys) not in (2, 3) or len(set(keys)) < len(keys):
        raise InputError(
            f"A front needs two or three different objectives, but got {', '.join(keys) or 'none'}."
        )
    return [objective(key) for key in keys]


def mark_front_of(points: pd.DataFrame, chosen: Sequence[Objective]) -> pd.Series:
    """Which points no other point of the same panel dominates in the columns that choose."""
    return panel_fronts(points, [o.chooses for o in chosen], directions=[o.direction for o in chosen])


def reference_point(
    points: pd.DataFrame, chosen: Sequence[Objective], *, column: str = "chooses"
) -> list[float]:
    """Where hypervolumes end: 8 bits, the worst fraction, and for bytes and operations beyond the worst point."""
    ends = []
    for one in chosen:
        if one.chooses == BITS:
            ends.append(REFERENCE_BITS)
        elif metric_of(one.chooses).unit == "frac":
            ends.append(REFERENCE_VALUE[one.direction == "maximize"])
        else:
            worst = points[getattr(one, column)].max()
            ends.append(ROOM * float(worst) if np.isfinite(worst) and worst > 0 else 1.0)
    return ends


def seed_hypervolumes(cells: pd.DataFrame, *, keys: Sequence[str]) -> pd.DataFrame:
    """The hypervolume of each variant's cells, seed by seed, as a share of the box up to the reference point.

    The front of each seed is chosen on validation; its volume is that of the figures on test.

    Args:
        cells: one row a cell (``pareto.select_cells``).
        keys: two or three objectives.

    Returns:
        One row a (panel, variant): ``num_seeds``, ``mean``, ``std``, ``low``, ``high``: the mean over seeds and
        Student's t interval of it (``intervals.summarize``).
    """
    chosen = objectives(keys)
    quantised = cells[~is_full_precision(cells)]
    rows = []
    for panel, part in quantised.groupby(list(PANEL), sort=True):
        reference = reference_point(part, chosen, column="reports")
        for variant, own in part.groupby("variant", sort=True):
            shares = [_share(s, chosen, reference) for _, s in own.groupby("seed")]
            summary = summarize(shares)
            place = dict(zip(PANEL, panel, strict=True)) | {"variant": variant, "num_seeds": summary.num}
            rows.append(place | {key: getattr(summary, key) for key in ("mean", "std", "low", "high")})
    return pd.DataFrame(rows, columns=[*PANEL, "variant", "num_seeds", "mean", "std", "low", "high"])


def _share(cells: pd.DataFrame, chosen: Sequence[Objective], reference: list[float]) -> float:
    """The volume of one seed's front; the box runs from 0, or from 1 where more is better, to the reference."""
    known = cells.dropna(subset=[o.reports for o in chosen])
    if known.empty:
        return math.nan
    directions = [o.direction for o in chosen]
    on_front = pareto_front(known[[o.chooses for o in chosen]], directions=directions)
    values = known.loc[on_front, [o.reports for o in chosen]]
    box = [1.0 if o.direction == "maximize" else end for o, end in zip(chosen, reference, strict=True)]
    return hypervolume(values, reference=reference, directions=directions) / math.prod(box)


def attainment_surfaces(cells: pd.DataFrame, *, metric: str) -> pd.DataFrame:
    """What a quarter, half and three quarters of the seeds attain: empirical attainment surfaces.

    A seed attains a place if some model on its front has at most these bits and at least this value. Each
    seed's front is chosen on validation and placed by its test figures. Source: da Fonseca, Fonseca and Hall,
    EMO 2001; computed by moocore.

    Args:
        cells: one row a cell of one panel or several.
        metric: the validation metric that chooses.

    Returns:
        One row a corner of a surface: panel, ``variant``, ``percent`` (25 attained by a quarter of the seeds,
        so the best surface, 75 the worst), true bits, the test metric, ``num_seeds``. Variants with fewer than
        ``MIN_SURFACE_SEEDS`` seeds have none.
    """
    chosen = [objective(metric), objective(BITS)]
    sign = -1.0 if is_maximized(metric) else 1.0
    rows: list[dict[str, Any]] = []
    quantised = cells[~is_full_precision(cells)].dropna(subset=[metric, on_test(metric), BITS])
    for key, part in quantised.groupby([*PANEL, "variant"], sort=True):
        num_seeds = part["seed"].nunique()
        place = dict(zip((*PANEL, "variant"), key, strict=True)) | {"num_seeds": num_seeds}
        if num_seeds < MIN_SURFACE_SEEDS:
            continue
        directions, columns = [o.direction for o in chosen], [o.chooses for o in chosen]
        fronts = pd.concat(
            [s[pareto_front(s[columns], directions=directions)] for _, s in part.groupby("seed")]
        )
        values = np.column_stack([fronts[BITS], sign * fronts[on_test(metric)]])
        corners = moocore.eaf(values, fronts["seed"].to_numpy(), percentiles=QUARTILES)
        rows += [
            place | {"percent": int(share), BITS: float(bits), on_test(metric): sign * float(value)}
            for bits, value, share in corners[np.lexsort((corners[:, 0], corners[:, 2]))]
        ]
    return pd.DataFrame(rows, columns=[*PANEL, "variant", "num_seeds", "percent", BITS, on_test(metric)])


def main(argv: list[str] | None = None) -> int:
    """Print the front in two or three objectives, and hypervolumes with their spread over seeds."""
    parser = cli.source_parser("analysis.fronts", "Print a front in any two or three objectives.")
    cli.add_metric(parser)
    parser.add_argument(
        "--objectives",
        default=f"val/acc_worst,{BITS}",
        help="two or three metrics, joined by commas: group metrics as val/KEY, and costs (default: %(default)s)",
    )

    def act(arguments: Any) -> None:
        keys = [key.strip() for key in arguments.objectives.split(",") if key.strip()]
        chosen = objectives(keys)
        cells = select_cells(cli.read_source(arguments), metric=arguments.metric)
        print(arguments.chosen_by, end="\n\n")
        points = aggregate(cells)
        front = points[mark_front_of(points, chosen)]
        columns = dict.fromkeys([*POINT, *(c for o in chosen for c in (o.chooses, o.reports)), "num_seeds"])
        print(front[list(columns)].to_string(index=False))
        print("\nHypervolume on test data of the fronts chosen on validation, as a share of the box:")
        print(seed_hypervolumes(cells, keys=keys).to_string(index=False, float_format=lambda v: f"{v:.4g}"))

    return cli.run(parser, act, argv)


if __name__ == "__main__":
    raise SystemExit(main())
