"""Which variant ranks first over many data sets: Friedman's test, then Nemenyi's for pairs."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from analysis import cli
from analysis.columns import PANEL, is_full_precision, is_maximized, on_test
from analysis.pareto import select_cells
from analysis.stats import ALPHA

MIN_BLOCKS = 5  # data sets that a test needs
MIN_COMPARISONS = 5  # fewer are read off the table
COMPARISON = (*PANEL, "budget")  # variants on equal terms
PAIR_COLUMNS = ("variant", "other", "p_value", "verdict")
DECIMALS = 9  # mean ranks closer than this are ties


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Mean ranks (1 is best) of the variants that met in ``num_comparisons`` comparisons, and what they prove.

    Attributes:
        num_blocks: the data sets that these comparisons are of.
        mean_rank: by variant, best first; empty where too few comparisons are shared.
        p_value: Friedman's test that all rank alike (Wilcoxon's signed ranks for two); NaN where not tested.
        critical_difference: mean ranks further apart than this differ (Nemenyi); NaN where not tested.
        pairs: ``variant, other, p_value, verdict`` of each pair, the better ranked first; empty where not tested.
    """

    num_comparisons: int
    num_blocks: int
    mean_rank: pd.Series
    p_value: float = math.nan
    critical_difference: float = math.nan
    pairs: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(PAIR_COLUMNS)))


def rank_variants(cells: pd.DataFrame, *, metric: str) -> Ranking:
    """Rank the variants within each (panel, budget) by their mean over seeds, and test whether data sets agree.

    A block is a data set: its budgets, attributes and networks share test images, parents and seeds, so the ranks of
    its comparisons are averaged first, and ranked once more for the test. With fewer than ``MIN_BLOCKS`` data sets
    there is no test, and the averages (each data set counts alike) only describe. Variants are taken by the number of
    comparisons that they were run in, as long as there are ``MIN_COMPARISONS`` that hold all that were taken, and
    half of those in which any two met.
    Source: J. Demsar, JMLR 7 (2006), sections 3.2.2 and 3.2.4.

    Args:
        cells: one row a cell (``pareto.select_cells``).
        metric: full key of the metric, for example ``test/acc_worst``.
    """
    shared = _largest_shared(_comparisons(cells, metric))
    if shared.shape[1] < 2:
        return Ranking(num_comparisons=0, num_blocks=0, mean_rank=pd.Series(dtype=float))
    rank_cv = shared.rank(axis=1, ascending=not is_maximized(metric))
    rank_bv = rank_cv.groupby(level="dataset").mean().round(DECIMALS)
    if len(rank_bv) < MIN_BLOCKS:
        described = rank_bv.mean().sort_values(kind="stable")
        return Ranking(num_comparisons=len(rank_cv), num_blocks=len(rank_bv), mean_rank=described)
    mean_rank = rank_bv.rank(axis=1).mean().sort_values(kind="stable")
    p_value = friedman_p(rank_bv.to_numpy())
    return Ranking(
        num_comparisons=len(rank_cv),
        num_blocks=len(rank_bv),
        mean_rank=mean_rank,
        p_value=p_value,
        critical_difference=critical_difference(rank_bv.shape[1], len(rank_bv)),
        pairs=_pairs(mean_rank, len(rank_bv), overall_p=p_value),
    )


def _comparisons(cells: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Mean over seeds, one row a (panel, budget), one column a variant."""
    known = cells[~is_full_precision(cells) & cells[metric].notna()]
    return known.pivot_table(index=list(COMPARISON), columns="variant", values=metric, aggfunc="mean")


def _largest_shared(value_cv: pd.DataFrame) -> pd.DataFrame:
    several_met_c = value_cv.notna().sum(axis=1) > 1  # where one variant was run alone, nothing is compared
    value_cv = value_cv[several_met_c]
    taken: list[Any] = []
    least = max(MIN_COMPARISONS, len(value_cv) / 2)
    for variant in value_cv.notna().sum().sort_values(ascending=False, kind="stable").index:
        if len(value_cv[[*taken, variant]].dropna()) >= least:
            taken.append(variant)
    return value_cv[taken].dropna()


def friedman_p(value_bv: np.ndarray) -> float:
    """P-value that all columns rank alike over the rows; Wilcoxon's where there are two columns only."""
    if value_bv.shape[1] == 2:
        difference = value_bv[:, 0] - value_bv[:, 1]
        return float(stats.wilcoxon(difference, zero_method="zsplit").pvalue) if difference.any() else 1.0
    if (np.ptp(value_bv, axis=1) == 0).all():
        return 1.0
    return float(stats.friedmanchisquare(*value_bv.T).pvalue)


def critical_difference(num_variants: int, num_blocks: int) -> float:
    """Nemenyi's at ``ALPHA``: q_alpha sqrt(k (k + 1) / (6 N)), q the studentised range over sqrt(2).

    >>> round(critical_difference(4, 14), 2)  # the example of Demsar 2006, section 3.2.2
    1.25
    """
    q = stats.studentized_range.ppf(1 - ALPHA, num_variants, np.inf) / math.sqrt(2)
    return float(q * math.sqrt(num_variants * (num_variants + 1) / (6 * num_blocks)))


def nemenyi_p(rank_difference: float, num_variants: int, num_blocks: int) -> float:
    """Two-sided p-value of a difference between two mean ranks, corrected for all pairs."""
    scale = math.sqrt(num_variants * (num_variants + 1) / (6 * num_blocks))
    return float(stats.studentized_range.sf(abs(rank_difference) / scale * math.sqrt(2), num_variants, np.inf))


def _pairs(mean_rank: pd.Series, num_blocks: int, *, overall_p: float) -> pd.DataFrame:
    """Pairs are told apart only where the test over all found a difference (Demsar 2006, section 3.2.2)."""
    k = len(mean_rank)
    rows = []
    for first, second in itertools.combinations(mean_rank.index, 2):
        p = overall_p if k == 2 else nemenyi_p(mean_rank[second] - mean_rank[first], k, num_blocks)
        is_better = overall_p < ALPHA and p < ALPHA
        word = "better" if is_better else "no evidence"
        rows.append({"variant": first, "other": second, "p_value": p, "verdict": word})
    return pd.DataFrame(rows, columns=list(PAIR_COLUMNS))


def ranking_sentence(ranking: Ranking) -> str:
    """The ranking in words."""
    if ranking.mean_rank.empty:
        return (
            f"No ranking: two variants must share {MIN_COMPARISONS} settings or budgets, and half of those at which "
            "any two were run."
        )
    named = ", ".join(f"{variant} {rank:.2f}" for variant, rank in ranking.mean_rank.items())
    if ranking.num_blocks < MIN_BLOCKS:
        sets = f"{ranking.num_blocks} data set{'' if ranking.num_blocks == 1 else 's'}"
        return (
            f"Mean ranks over {ranking.num_comparisons} settings and budgets of {sets} (1 is best): {named}. They "
            "describe these runs and have no p-value: the settings and budgets of one data set share its images, "
            f"parents and seeds, so a test counts data sets and needs {MIN_BLOCKS}."
        )
    start = f"Mean ranks over {ranking.num_blocks} data sets (1 is best): {named}."
    name = "Wilcoxon" if len(ranking.mean_rank) == 2 else "Friedman"
    if ranking.p_value >= ALPHA:
        return f"{start} No evidence that they differ ({name}, p = {ranking.p_value:.2g})."
    proven = ranking.pairs[ranking.pairs["verdict"] == "better"]
    said = "; ".join(f"{row.variant} is better than {row.other}" for row in proven.itertuples())
    after = f"{said} (p < 0.05, corrected for all pairs)" if said else "no single pair can be told apart"
    return f"{start} They differ ({name}, p = {ranking.p_value:.2g}): {after}."


def main(argv: list[str] | None = None) -> int:
    """Print the ranking of the variants on test data."""
    parser = cli.source_parser("analysis.ranks", "Rank variants over data sets, on test data.")
    cli.add_metric(parser)

    def act(arguments: Any) -> None:
        cells = select_cells(cli.read_source(arguments), metric=arguments.metric)
        print(arguments.chosen_by, end="\n\n")
        ranking = rank_variants(cells, metric=on_test(arguments.metric))
        print(ranking_sentence(ranking))
        if len(ranking.pairs):
            print(f"\nCritical difference of mean ranks: {ranking.critical_difference:.2f}")
            print(ranking.pairs.to_string(index=False, float_format=lambda value: f"{value:.4g}"))

    return cli.run(parser, act, argv)


if __name__ == "__main__":
    raise SystemExit(main())
