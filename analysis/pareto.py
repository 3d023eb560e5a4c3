"""From runs to cells, from cells to points, from points to fronts. Choices read validation data only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import moocore
import numpy as np
import pandas as pd

from analysis import cli
from analysis.columns import (
    BITS,
    BYTES,
    CELL,
    PANEL,
    POINT,
    check_selection_metric,
    is_full_precision,
    is_maximized,
    listing,
    on_test,
    tie_column,
    variants,
    with_budget,
)
from analysis.intervals import student_half_width
from fqsweep.errors import InputError
from fqsweep.names import GROUP_METRICS, Direction, budget_order

# Values that agree to so many digits are equal: a tie is no win.
TIE_DIGITS = 9
# Mean bits that agree to so many digits are equal: of one budget, allocations leave different crumbs.
BITS_DIGITS = 3
REFERENCE_BITS = 8.0  # the widest quantised weight
REFERENCE_VALUE = {True: 0.0, False: 1.0}  # the worst fraction, by whether the metric is maximised
SPREAD_METRICS = tuple(f"{split}/{m.key}" for split in ("val", "test") for m in GROUP_METRICS)
BUDGET_SLACK = 1e-6  # relative rounding of a recorded mean of bits


def pareto_front(points: Any, *, directions: Sequence[Direction]) -> np.ndarray:
    """Mark the points that no other point dominates.

    A point dominates another if it is at least as good in every objective and better in one. Equal points
    do not dominate each other, so duplicates of a front's point are all marked. Points with NaN take no part.
    Dominance comes from moocore (Fonseca, Lopez-Ibanez et al.), O(n log n) in two and three dimensions.

    Args:
        points: float, (points, objectives).
        directions: ``maximize`` or ``minimize`` for each objective.

    Returns:
        bool, (points,).

    >>> pareto_front([[1, 0.8], [2, 0.9], [2, 0.7]], directions=["minimize", "maximize"]).tolist()
    [True, True, False]
    """
    values = np.asarray(points, dtype=float).reshape(-1, len(directions))
    usable = np.isfinite(values).all(axis=1)
    marked = np.zeros(len(values), dtype=bool)
    if usable.any():
        marked[usable] = moocore.is_nondominated(
            values[usable], maximise=_maximise(directions), keep_weakly=True
        )
    return marked


def hypervolume(points: Any, *, reference: Sequence[float], directions: Sequence[Direction]) -> float:
    """The volume that ``points`` dominate above ``reference``; points beyond it add nothing (moocore).

    >>> hypervolume([[1, 0.8]], reference=[8, 0], directions=["minimize", "maximize"])
    5.6
    """
    values = np.asarray(points, dtype=float).reshape(-1, len(directions))
    values = values[np.isfinite(values).all(axis=1)]
    if len(values) == 0:
        return 0.0
    volume = moocore.hypervolume(values, ref=np.asarray(reference, dtype=float), maximise=_maximise(directions))
    return round(float(volume), 12)


def _maximise(directions: Sequence[Direction]) -> list[bool]:
    assert all(d in ("maximize", "minimize") for d in directions), directions
    return [d == "maximize" for d in directions]


def select_cells(runs: pd.DataFrame, *, metric: str) -> pd.DataFrame:
    """Choose the run that represents each cell: the best ``metric`` on validation data.

    Ties go to fewer bits, then to the smaller trial key, so that the choice depends neither on the order of rows
    nor on the ids that MLflow drew. Runs without the metric cannot be chosen.

    Args:
        runs: one row a run (``mlflow_runs.load_runs``).
        metric: a validation metric, such as ``val/acc_worst``.

    Returns:
        One row a cell: the chosen run, and ``num_runs``, how many it was chosen from, those that were stopped early
        (``attrs["pruned"]``) among them.

    Raises:
        InputError: the metric is unknown or reads test data, or no run has it.
    """
    usable = with_budget(runs)
    usable = usable[usable[check_selection_metric(metric)].notna()]
    if usable.empty:
        raise InputError(f"A run must have recorded {metric}, but none of {len(runs)} has: use another.")
    grouped = best_first(usable, tie_column(usable), metric=metric).groupby(list(CELL), dropna=False, sort=True)
    chosen = grouped.head(1).copy()
    stopped = _num_stopped(runs).reindex(pd.MultiIndex.from_frame(chosen[list(CELL)]), fill_value=0)
    chosen["num_runs"] = grouped["run_id"].transform("size").loc[chosen.index] + stopped.to_numpy()
    return _in_order(chosen)


def _num_stopped(runs: pd.DataFrame) -> pd.Series:
    """How many trials of each cell were stopped early: validation data chose against them too."""
    rows = runs.attrs.get("pruned", [])
    if not rows:
        return pd.Series(dtype=int)
    stopped = with_budget(pd.DataFrame(rows))
    return stopped.assign(seed=pd.to_numeric(stopped["seed"], errors="coerce")).groupby(list(CELL)).size()


def aggregate(cells: pd.DataFrame) -> pd.DataFrame:
    """Average the cells over seeds: one row a (panel, variant, budget).

    Returns:
        For every number its mean under the same name; for the group metrics also ``<key>:std``,
        ``<key>:low`` and ``<key>:high`` (see ``intervals.summarize``); ``num_runs``, the most that a cell was chosen
        from; ``num_seeds``, ``seeds`` and ``run_ids`` (both joined by spaces, in the same order).
    """
    assert not cells.duplicated(list(CELL)).any(), "one row a cell: call select_cells first"
    grouped = cells.sort_values("seed").groupby(list(POINT), dropna=False, sort=True)
    points = grouped[["method", "budget_bits", "budget_bytes"]].first()
    points["num_runs"] = grouped["num_runs"].max()
    points["num_seeds"] = grouped.size()
    points = points.join(grouped[["seed", "run_id"]].agg(_joined).set_axis(["seeds", "run_ids"], axis=1))
    numbers = [c for c in cells.select_dtypes("number").columns if "/" in c]
    return _in_order(pd.concat([points, grouped[numbers].mean(), _spreads(grouped)], axis=1).reset_index())


def _spreads(grouped: Any) -> pd.DataFrame:
    """``intervals.summarize`` of each group and metric: standard deviation and the ends of the interval."""
    keys = list(SPREAD_METRICS)
    mean, std, num = grouped[keys].mean(), grouped[keys].std(), grouped[keys].count()
    std = std.where((grouped[keys].max() > grouped[keys].min()) | (num < 2), 0.0)
    half = student_half_width(std, num)
    frames = {"std": std, "low": mean - half, "high": mean + half}
    return pd.concat([f.add_suffix(f":{name}") for name, f in frames.items()], axis=1)


def _joined(values: pd.Series) -> str:
    return " ".join(str(v) for v in values)


def _in_order(frame: pd.DataFrame) -> pd.DataFrame:
    """Sorted by panel, budget (full precision first), variant, seed."""
    rank = {v: i for i, v in enumerate(variants(frame))}
    order = frame.assign(_rank=frame["variant"].map(rank))
    order["_budget"] = frame["budget"].map(budget_order)
    by = [*PANEL, "_budget", "_rank", *(["seed"] if "seed" in frame else [])]
    return order.sort_values(by).drop(columns=["_rank", "_budget"]).reset_index(drop=True)


def mark_front(points: pd.DataFrame, *, metric: str) -> pd.DataFrame:
    """Add ``on_front``: no point of the same panel has both fewer bits, to three digits, and a better ``metric``."""
    directions: list[Direction] = ["minimize", "maximize" if is_maximized(metric) else "minimize"]
    return points.assign(on_front=panel_fronts(points, [BITS, metric], directions=directions))


def panel_fronts(points: pd.DataFrame, columns: Sequence[str], *, directions: Sequence[Direction]) -> pd.Series:
    """Which points no other point of the same panel dominates in the columns, as ``comparable`` values."""
    marks = pd.Series(False, index=points.index)
    for _, part in points.groupby(list(PANEL), sort=True):
        marks[part.index] = pareto_front(part[list(columns)].apply(comparable), directions=directions)
    return marks


def variant_hypervolumes(points: pd.DataFrame, *, metric: str) -> pd.DataFrame:
    """The share of the rectangle up to the reference point that each variant dominates.

    Objectives: true mean bits and ``metric``. Reference point: 8 bits, and 0 (1 where less is better), so that
    1 would be a perfect model of no bits. Full precision lies beyond it and has none.

    Returns:
        The panel's columns, ``variant``, ``hypervolume_frac`` from 0 to 1.
    """
    maximize = is_maximized(metric)
    directions: list[Direction] = ["minimize", "maximize" if maximize else "minimize"]
    reference = (REFERENCE_BITS, REFERENCE_VALUE[maximize])
    quantised = points[~is_full_precision(points)]
    rows = [
        dict(zip((*PANEL, "variant"), key, strict=True))
        | {"hypervolume_frac": hypervolume(part[[BITS, metric]], reference=reference, directions=directions)}
        for key, part in quantised.groupby([*PANEL, "variant"], sort=True)
    ]
    frame = pd.DataFrame(rows, columns=[*PANEL, "variant", "hypervolume_frac"])
    frame["hypervolume_frac"] /= REFERENCE_BITS
    return frame


def leaders(points: pd.DataFrame, *, metric: str) -> pd.DataFrame:
    """The variant with the best mean validation ``metric`` at each budget of each panel.

    Returns:
        One row each; ``level_with`` are the variants that have the same value there, a tuple of names. Of these the
        one with fewer bits is taken, then the one chosen from fewer runs, then the first by its name.
    """
    known = points[~is_full_precision(points) & points[metric].notna()]
    ordered = best_first(known, "num_runs", "variant", metric=metric)
    place = [*PANEL, "budget"]
    lead = ordered.drop_duplicates(place)
    value = comparable_values(ordered[metric])
    is_best = value == value.groupby([ordered[c] for c in place]).transform("first")
    level = ordered[is_best & ~ordered.index.isin(lead.index)]
    names = level.groupby(place)["variant"].agg(tuple).to_dict()
    level_with = [names.get(tuple(at), ()) for at in lead[place].itertuples(index=False)]
    return _in_order(lead.assign(level_with=pd.Series(level_with, index=lead.index, dtype=object)))


def comparable_values(values: pd.Series) -> pd.Series:
    """Values without the last digits, in which means of the same numbers differ by the order of their sum."""
    return values.round(TIE_DIGITS)


def comparable_bits(bits: pd.Series) -> pd.Series:
    """Mean bits to ``BITS_DIGITS`` digits: what is left of a budget makes nothing smaller.

    >>> comparable_bits(pd.Series([1.499964, 1.5, 0.125, 2.49])).tolist()
    [1.5, 1.5, 0.125, 2.49]
    """
    return bits.map(lambda value: float(f"{value:.{BITS_DIGITS}g}"))


def comparable(column: pd.Series) -> pd.Series:
    """``comparable_bits`` of the column of mean bits, ``comparable_values`` of others."""
    return comparable_bits(column) if column.name == BITS else comparable_values(column)


def best_first(frame: pd.DataFrame, *ties: str, metric: str) -> pd.DataFrame:
    """Sorted by the metric, then by fewer bits (``comparable_bits``), then by the columns ``ties``."""
    value = frame[metric] if is_maximized(metric) else -frame[metric]
    return highest_first(frame, value, *ties)


def highest_first(frame: pd.DataFrame, value: pd.Series, *ties: str) -> pd.DataFrame:
    """As ``best_first``, by values of which more is better."""
    ordered = frame.assign(_value=comparable_values(value), _bits=comparable_bits(frame[BITS]))
    ascending = [False, True, *(True for _ in ties)]
    return ordered.sort_values(["_value", "_bits", *ties], ascending=ascending).drop(
        columns=["_value", "_bits"]
    )


def more_runs_sentence(points: pd.DataFrame, *, metric: str) -> str:
    """Name the leaders that were chosen from more runs a cell than others at their budget; empty where none was.

    The best of several validation values is too high by chance, and the more so the more there are.
    """
    quantised = points[~is_full_precision(points)]
    fewest = quantised.groupby([*PANEL, "budget"])["num_runs"].transform("min")
    lead = leaders(quantised.assign(fewest=fewest), metric=metric)
    lead = lead[lead["num_runs"] > lead["fewest"]]
    if lead.empty:
        return ""
    most, few = lead.groupby("variant", sort=False)["num_runs"].max(), int(lead["fewest"].min())
    if len(most) == 1:
        named, its = (
            f"{most.index[0]} was chosen from up to {most.iloc[0]} runs a cell",
            "its validation mean is",
        )
    else:
        those = listing([f"{variant} (up to {num})" for variant, num in most.items()])
        named, its = f"{those} were chosen from several runs a cell", "their validation means are"
    return f"{named} where others have {few}: {its} too high by that."


def under_budget(frame: pd.DataFrame, budget: str) -> pd.DataFrame:
    """The rows that fit a budget: by their true mean bits, or by the size of their file."""
    kind, limit = budget_order(budget)
    if kind == 0:
        return frame
    return frame[frame[BITS] <= limit * (1 + BUDGET_SLACK)] if kind == 1 else frame[frame[BYTES] <= limit]


def main(argv: list[str] | None = None) -> int:
    """Print the front and each variant's hypervolume."""
    parser = cli.source_parser("analysis.pareto", "Print the front of validation against true mean bits.")
    cli.add_metric(parser)

    def act(arguments: Any) -> None:
        runs = cli.read_source(arguments)
        metric = arguments.metric
        print(arguments.chosen_by, end="\n\n")
        points = mark_front(aggregate(select_cells(runs, metric=metric)), metric=metric)
        columns = [*POINT, BITS, metric, on_test(metric), "num_runs", "num_seeds"]
        print(points.loc[points["on_front"], columns].to_string(index=False))
        print(f"\nHypervolume up to {REFERENCE_BITS:g} bits and {REFERENCE_VALUE[is_maximized(metric)]:g}:")
        print(variant_hypervolumes(points, metric=metric).to_string(index=False))

    return cli.run(parser, act, argv)


if __name__ == "__main__":
    raise SystemExit(main())
