"""Every point against one reference, whatever their budgets: what does a smaller model cost the worst-served group?

    python -m analysis.against --tracking-uri URI --sweep NAME [--reference fp32 | uniform-8] [--margin 1]
    python -m analysis.against --tracking-uri URI --sweep NAME --reference static --same-budget

With ``--same-budget`` a point is compared with the reference at its own budget: what an ablation asks.
Differences are paired by seed, on test data, with their 95 % interval (Student's t), which is not adjusted for the
number of rows: a row is an answer to one question that was asked before, not the best of many.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from analysis import cli
from analysis.columns import (
    ABSENT,
    BITS,
    BYTES,
    CELL,
    PANEL,
    REFERENCE_VARIANT,
    check_selection_metric,
    is_maximized,
    on_test,
    panel_title,
    panels,
    percent,
)
from analysis.pareto import select_cells
from analysis.stats import MIN_SEEDS, PairedTest, paired_test
from analysis.tables import markdown_safe
from fqsweep.errors import InputError
from fqsweep.names import NO_VALUE, budget_order

DEFAULT_METRICS = ("balanced_acc_worst", "auc_worst")
MARGIN_POINTS = 1.0


def against_reference(
    cells: pd.DataFrame, *, metric: str, reference: str, margin_frac: float, same_budget: bool = False
) -> pd.DataFrame:
    """Compare every variant and budget with the reference variant, paired by seed.

    Args:
        cells: one row a cell (``pareto.select_cells``).
        metric: full metric key, on ``test/``.
        reference: a variant; of several budgets of it the largest.
        margin_frac: what is still "as good", in units of the metric.
        same_budget: compare with the reference at the point's own budget, and leave out points at other budgets.

    Returns:
        One row a point: panel, ``variant, budget``, mean ``bits`` and ``bytes``, ``value`` and ``reference`` (means
        over the seeds that both have), ``reference_budget, times_smaller, num_pairs, difference, low, high, p_value,
        verdict``.

    Raises:
        InputError: no run has the reference variant, or none has its budget.
    """
    known = sorted(set(cells["variant"].astype(str)))
    if reference not in known:
        raise InputError(_no_such_reference(reference, known))
    rows = []
    for panel, part in panels(cells):
        own = part[part["variant"] == reference]
        largest = max(own["budget"], key=budget_order, default=None)
        for (variant, budget), point in part.groupby(["variant", "budget"], sort=False):
            against = budget if same_budget else largest
            by_seed = own[own["budget"] == against].set_index("seed")
            if (by_seed.empty and same_budget) or (variant, budget) == (reference, against):
                continue
            value = point.set_index("seed")[metric]
            difference = (value - by_seed[metric]).dropna()
            result = paired_test(difference)
            rows.append(
                {
                    **dict(zip(PANEL, panel, strict=True)),
                    "variant": variant,
                    "budget": budget,
                    "bits": point[BITS].mean(),
                    "bytes": point[BYTES].mean(),
                    "value": value[difference.index].mean(),
                    "reference": by_seed.loc[difference.index, metric].mean(),
                    "reference_budget": against,
                    "times_smaller": by_seed[BYTES].mean() / point[BYTES].mean(),
                    "num_pairs": result.num_pairs,
                    "difference": result.mean,
                    "low": result.low,
                    "high": result.high,
                    "p_value": result.p_value,
                    "verdict": verdict(result, margin_frac=margin_frac, maximize=is_maximized(metric)),
                }
            )
    if not rows:
        raise InputError(f"No other run has a budget of the reference {reference!r}.")
    return pd.DataFrame(rows)


def _no_such_reference(reference: str, known: list[str]) -> str:
    start = f"There is no run of the reference {reference!r}"
    of_sweeps = [variant for variant in known if variant.startswith(f"{reference} (")]
    if of_sweeps:
        return f"{start}: each of the joined sweeps has its own, use {' or '.join(map(repr, of_sweeps))}."
    return f"{start}: use one of {', '.join(known)}."


def verdict(result: PairedTest, *, margin_frac: float, maximize: bool) -> str:
    """What the interval of the difference says.

    >>> as_good = PairedTest(num_pairs=5, mean=-0.002, low=-0.006, high=0.002, p_value=0.3)
    >>> verdict(as_good, margin_frac=0.01, maximize=True)
    'as good'
    """
    if result.num_pairs >= MIN_SEEDS and _all_equal(result.mean, result.low):
        return "as good"
    if result.num_pairs < MIN_SEEDS or not math.isfinite(result.low):
        return "cannot be told"
    low, high = (result.low, result.high) if maximize else (-result.high, -result.low)
    if low > 0:
        return "better"
    if high < -margin_frac:
        return "worse by more than the margin"
    if low >= -margin_frac:
        return "as good" if high >= 0 else "worse, within the margin"
    return "worse" if high < 0 else "cannot be told"


def _all_equal(mean: float, low: float) -> bool:
    """Whether every paired difference is 0: there is no spread, so no interval, and nothing to be unsure of."""
    return mean == 0 and math.isnan(low)


def as_markdown(compared: dict[str, pd.DataFrame], *, reference: str, margin_points: float) -> str:
    """One pipe table a panel, the metrics side by side; differences in points (hundredths)."""
    first, *others = compared.values()
    keys = [*PANEL, "variant", "budget"]
    parts = [
        f"Test data in %, means over the seeds that a point shares with {markdown_safe(reference)}; differences from "
        "it in points, paired by seed, with their 95 % interval. "
        f"{_as_good_sentence(list(compared), margin_points=margin_points)}"
    ]
    for panel, part in panels(first):
        budgets = set(part["reference_budget"]) - {NO_VALUE}
        against = f"{reference} at {budgets.pop()}" if len(budgets) == 1 else reference
        lines = [f"### {markdown_safe(panel_title(panel))}", ""]
        heads = ["variant", "budget", "bits", "times smaller"]
        heads += [head for key in compared for head in (key, f"difference ({against})", "seeds", "verdict")]
        lines += [f"| {' | '.join(heads)} |", "|:--" + "|--:" * (len(heads) - 1) + "|"]
        for _, row in part.iterrows():
            texts = [str(row["variant"]), str(row["budget"])]
            texts += [f"{row['bits']:.2f}", f"{row['times_smaller']:.1f}", *_texts(row)]
            for other in others:
                match = (other[keys] == row[keys]).all(axis=1)
                texts += _texts(other[match].iloc[0])
            lines.append(f"| {' | '.join(map(markdown_safe, texts))} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _as_good_sentence(keys: list[str], *, margin_points: float) -> str:
    """What ``as good`` means for these metrics: the margin lies on the side that is worse."""
    less = [key for key in keys if not is_maximized(key)]
    side, other = f"above -{margin_points:g} point", f"below +{margin_points:g} point"
    if less and len(less) == len(keys):
        side = f"{other} (less is better)"
    elif less:
        side = f"{side}, where less is better ({', '.join(less)}) {other},"
    return f"As good: the interval lies {side} and holds 0."


def _texts(row: pd.Series) -> list[str]:
    return [percent(row["value"]), _difference_text(row), str(row["num_pairs"]), row["verdict"]]


def _difference_text(row: pd.Series) -> str:
    num = row["num_pairs"]
    if num == 0:
        return ABSENT
    if _all_equal(row["difference"], row["low"]):
        return f"+0.00 (no difference in {num} seed{'' if num == 1 else 's'})"
    interval = f" ({100 * row['low']:+.2f} to {100 * row['high']:+.2f})" if math.isfinite(row["low"]) else ""
    return f"{100 * row['difference']:+.2f}{interval}"


def main(argv: list[str] | None = None) -> int:
    """Print every point against the reference, as Markdown."""
    parser = cli.source_parser("analysis.against", "Compare every point with one reference, paired by seed.")
    cli.add_metric(parser)
    parser.add_argument(
        "--reference", default=REFERENCE_VARIANT, help="variant to compare with (default: %(default)s)"
    )
    parser.add_argument(
        "--same-budget", action="store_true", help="compare with the reference at each point's own budget"
    )
    parser.add_argument(
        "--margin", type=float, default=MARGIN_POINTS, help="points that count as equal (default: %(default)s)"
    )
    parser.add_argument(
        "--show",
        action="append",
        help=f"group metric to compare; again for more (default: {', '.join(DEFAULT_METRICS)})",
    )

    def act(arguments: Any) -> None:
        cells = select_cells(cli.read_source(arguments), metric=arguments.metric)
        print(arguments.chosen_by, end="\n\n")
        assert not cells.duplicated(list(CELL)).any()
        compared = {
            name: against_reference(
                cells,
                metric=on_test(check_selection_metric(f"val/{name}")),
                reference=arguments.reference,
                margin_frac=arguments.margin / 100,
                same_budget=arguments.same_budget,
            )
            for name in arguments.show or DEFAULT_METRICS
        }
        print(as_markdown(compared, reference=arguments.reference, margin_points=arguments.margin))

    return cli.run(parser, act, argv)


if __name__ == "__main__":
    raise SystemExit(main())
