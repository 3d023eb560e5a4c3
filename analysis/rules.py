"""Selection rules side by side: which run each would take, on validation data, and what that costs on test.

Source of the first three: Zong, Yang and Hospedales, MEDFAIR, ICLR 2023, section 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis import cli
from analysis.columns import (
    BITS,
    BYTES,
    GROUP_ACCURACY,
    budget_phrase,
    bytes_text,
    group_names,
    is_full_precision,
    is_maximized,
    on_test,
    panel_title,
    panels,
    percent,
    tie_column,
)
from analysis.pareto import highest_first, select_cells

DEFAULT_SHARE = 0.1  # of full precision's file, where no limit in bytes is given
# What the worst-served group may be judged by; the first, where the metric that chooses is another one.
WORST = {"val/acc_worst": "accuracy", "val/balanced_acc_worst": "balanced accuracy", "val/auc_worst": "AUC"}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What one rule takes in one panel; ``run_id`` is empty where it cannot choose, and ``reason`` says why.

    Attributes:
        worst_metric: what ``test_worst`` is: the key, on test data, by which the rule ``minimax`` chooses.
    """

    rule: str
    panel: tuple[str, ...]
    run_id: str
    variant: str
    budget: str
    seed: int | None
    true_bits: float
    packed_bytes: float
    test_overall: float
    test_worst: float
    worst_metric: str
    reason: str


def distance_to_ideal(cells: pd.DataFrame) -> pd.Series:
    """Euclidean distance of each run's group accuracies on validation to the best of each group (DTO).

    NaN where a run lacks a group; all NaN where no group accuracy is recorded.
    """
    columns = [f"val/{GROUP_ACCURACY}{name}" for name in group_names(cells, split="val")]
    if not columns:
        return pd.Series(math.nan, index=cells.index)
    value_ig = cells[columns].to_numpy(dtype=float)
    return pd.Series(np.linalg.norm(np.nanmax(value_ig, axis=0) - value_ig, axis=1), index=cells.index)


def choose_by_rules(cells: pd.DataFrame, *, metric: str, max_bytes: float | None = None) -> list[Choice]:
    """Apply every rule to the quantised runs of each panel.

    Args:
        cells: the chosen run of each cell (``pareto.select_cells``).
        metric: the validation metric of the rule under a limit in bytes, and of ``minimax`` where it is one of the
            worst-served group (``WORST``).
        max_bytes: that limit; None for ``DEFAULT_SHARE`` of full precision's file.
    """
    found = []
    for panel, part in panels(cells):
        quantised = part[~is_full_precision(part)]
        if not quantised.empty:
            limit = _limit(part, max_bytes)
            found += [rule(panel, quantised) for rule in _rules(metric, limit)]
    return found


def _limit(part: pd.DataFrame, max_bytes: float | None) -> float:
    if max_bytes is not None:
        return max_bytes
    return DEFAULT_SHARE * float(part.loc[is_full_precision(part), BYTES].mean())


def worst_of(metric: str) -> str:
    """What judges the worst-served group: ``metric`` where it does that, else accuracy.

    >>> worst_of("val/auc_worst"), worst_of("val/eodd")
    ('val/auc_worst', 'val/acc_worst')
    """
    return metric if metric in WORST else next(iter(WORST))


def _rules(metric: str, limit: float) -> list[Callable[[tuple[str, ...], pd.DataFrame], Choice]]:
    worst = worst_of(metric)

    def overall(panel: tuple[str, ...], part: pd.DataFrame) -> Choice:
        what = "highest accuracy over all samples"
        return _take("best overall", panel, part, part["val/acc_overall"], what, worst)

    def minimax(panel: tuple[str, ...], part: pd.DataFrame) -> Choice:
        what = f"highest {WORST[worst]} of the worst-served group"
        return _take("minimax", panel, part, part[worst], what, worst)

    def ideal(panel: tuple[str, ...], part: pd.DataFrame) -> Choice:
        what = "least distance of the groups' accuracies to the best that any run gives each group"
        return _take("distance to ideal", panel, part, -distance_to_ideal(part), what, worst)

    def small(panel: tuple[str, ...], part: pd.DataFrame) -> Choice:
        if not math.isfinite(limit):
            reason = "no limit in bytes: full precision was not run, and none was given"
            return _none("under a size", panel, reason, worst)
        fitting = part[part[BYTES] <= limit]
        value = fitting[metric] if is_maximized(metric) else -fitting[metric]
        what = f"best {metric} of the {len(fitting)} runs with at most {bytes_text(limit)}"
        return _take("under a size", panel, fitting, value, what, worst)

    return [overall, minimax, ideal, small]


def _take(
    rule: str, panel: tuple[str, ...], part: pd.DataFrame, value: pd.Series, what: str, worst: str
) -> Choice:
    """The run with the highest value; ties go as in ``answers.recommend``."""
    known = part[value.notna()]
    if known.empty:
        return _none(rule, panel, f"{what}: no run has it recorded", worst)
    best = highest_first(known, value[value.notna()], "num_runs", "variant", tie_column(known)).iloc[0]
    return Choice(
        rule=rule,
        panel=panel,
        run_id=str(best["run_id"]),
        variant=str(best["variant"]),
        budget=str(best["budget"]),
        seed=int(best["seed"]),
        true_bits=float(best[BITS]),
        packed_bytes=float(best[BYTES]),
        test_overall=float(best["test/acc_overall"]),
        test_worst=float(best[on_test(worst)]),
        worst_metric=on_test(worst),
        reason=f"{what}, on validation ({len(known)} runs)",
    )


def _none(rule: str, panel: tuple[str, ...], reason: str, worst: str) -> Choice:
    numbers = dict.fromkeys(("true_bits", "packed_bytes", "test_overall", "test_worst"), math.nan)
    return Choice(
        rule=rule,
        panel=panel,
        run_id="",
        variant="",
        budget="",
        seed=None,
        worst_metric=on_test(worst),
        reason=reason,
        **numbers,
    )


def rules_text(choices: list[Choice]) -> str:
    """The choices as lines for a terminal."""
    lines = []
    for panel in dict.fromkeys(choice.panel for choice in choices):
        lines.append(f"{panel_title(panel)}:")
        lines += [f"  {choice.rule}: {_sentence(choice)}" for choice in choices if choice.panel == panel]
    return "\n".join(lines) or "No quantised variant has finished: there is nothing to choose from."


def _sentence(choice: Choice) -> str:
    if not choice.run_id:
        return f"none, because {choice.reason}"
    worst, overall = percent(choice.test_worst), percent(choice.test_overall)
    figures = f"{choice.worst_metric} {worst} %, test/acc_overall {overall} %"
    place = f"{choice.variant}, {budget_phrase(choice.budget)}, seed {choice.seed}, run {choice.run_id}"
    return f"{place}; {figures}. Why: {choice.reason}"


def rules_record(choices: list[Choice], panel: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """What ``recommended.json`` holds of the rules of one panel; numbers that are not known are null."""
    own = [asdict(choice) for choice in choices if choice.panel == panel]
    return {
        choice["rule"]: {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in choice.items()
            if key not in ("rule", "panel")
        }
        for choice in own
    }


def main(argv: list[str] | None = None) -> int:
    """Print what each selection rule takes."""
    parser = cli.source_parser("analysis.rules", "Print which run each selection rule takes.")
    cli.add_metric(parser)
    parser.add_argument(
        "--max-bytes", type=float, help="limit of the rule `under a size` (default: a tenth of fp32)"
    )

    def act(arguments: Any) -> None:
        cells = select_cells(cli.read_source(arguments), metric=arguments.metric)
        print(arguments.chosen_by, end="\n\n")
        print(rules_text(choose_by_rules(cells, metric=arguments.metric, max_bytes=arguments.max_bytes)))

    return cli.run(parser, act, argv)


if __name__ == "__main__":
    raise SystemExit(main())
