"""The columns that identify a row, and how single values are named and printed."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable

import numpy as np
import pandas as pd

from fqsweep.errors import InputError
from fqsweep.names import GROUP_METRICS, NO_VALUE, budget_label, budget_order, metric_of

PANEL = ("dataset", "group_attribute", "architecture")  # what may be compared with each other
POINT = (*PANEL, "variant", "budget")  # one marker of a figure, one row of a table
CELL = (*POINT, "seed")  # one cell of the grid
BITS = "bits/mean_weight"
BYTES = "size/packed_bytes"
GROUP_ACCURACY = "acc_group/"
GROUP_COUNT = "count_group/"
REFERENCE_VARIANT = "fp32"
ABSENT = "–"
_BUDGETS = ("budget_bits", "budget_bytes")


def check_selection_metric(metric: str) -> str:
    """Return ``metric`` if it may choose between runs: a recorded group metric on validation data.

    Raises:
        InputError: it reads test data, or is no recorded metric.
    """
    allowed = [f"val/{m.key}" for m in GROUP_METRICS]
    if metric in allowed:
        return metric
    if metric.startswith("test/"):
        raise InputError(f"Test data may not choose a model: instead of {metric!r} use val/{metric[5:]}.")
    nearest = difflib.get_close_matches(metric, allowed, n=1, cutoff=0.0)[0]
    raise InputError(f"The metric must be one of {', '.join(allowed)}, but is {metric!r}: use {nearest}?")


def on_test(metric: str) -> str:
    """The same metric on test data.

    >>> on_test("val/acc_worst")
    'test/acc_worst'
    """
    return "test/" + metric.removeprefix("val/")


def is_maximized(metric: str) -> bool:
    """Whether more of ``metric`` is better."""
    return metric_of(metric).direction == "maximize"


def panels(frame: pd.DataFrame) -> list[tuple[tuple[str, ...], pd.DataFrame]]:
    """The frame's parts by (dataset, group_attribute, architecture), in sorted order."""
    return [(tuple(map(str, key)), part) for key, part in frame.groupby(list(PANEL), sort=True)]


def of_panel(frame: pd.DataFrame, panel: Iterable[str]) -> pd.DataFrame:
    """The rows of one panel."""
    here = pd.Series(True, index=frame.index)
    for column, value in zip(PANEL, panel, strict=True):
        here &= frame[column].astype(str).eq(str(value))
    return frame[here]


def panel_title(panel: Iterable[str]) -> str:
    """A panel in words.

    >>> panel_title(("isic2019", "sex", "resnet18"))
    'isic2019, groups by sex, resnet18'
    """
    dataset, attribute, architecture = panel
    return f"{dataset}, groups by {attribute}, {architecture}"


def is_full_precision(frame: pd.DataFrame) -> pd.Series:
    """Which rows are full precision: by their method, or in records without one by their variant."""
    method = frame["method"].where(frame["method"] != NO_VALUE, frame["variant"])
    return method.astype(str).eq(REFERENCE_VARIANT)


def with_budget(runs: pd.DataFrame) -> pd.DataFrame:
    """Add ``budget``, the label that names a run's budget, and make both kinds of budgets numbers.

    A budget is in bits per weight ("0.5"), in bytes on disk ("1.5 MB"), or ``none``: full precision, and
    methods that were given none. Records from before there were budgets in bytes have no ``budget_bytes``.
    """
    known = {c: runs.get(c, np.nan) for c in ("method", *_BUDGETS)}
    numbers = {c: pd.to_numeric(pd.Series(known[c], index=runs.index), errors="coerce") for c in _BUDGETS}
    labels = [
        budget_label(bits, size)
        for bits, size in zip(*(numbers[c].astype(float) for c in _BUDGETS), strict=True)
    ]
    method = pd.Series(known["method"], index=runs.index, dtype=object).fillna(NO_VALUE)
    return runs.assign(**numbers, method=method, budget=labels)


def tie_column(runs: pd.DataFrame) -> str:
    """The column that decides between runs of equal figures, the smaller first.

    A trial's key, where there is one: it stays the same when a sweep is run or recorded again; run ids are random.
    """
    return "key" if "key" in runs and runs["key"].notna().all() else "run_id"


def budgets(frame: pd.DataFrame) -> list[str]:
    """The budgets of quantised rows, in bits ascending, then in bytes ascending."""
    return sorted(frame.loc[~is_full_precision(frame), "budget"].unique(), key=budget_order)


def group_names(frame: pd.DataFrame, *, split: str) -> list[str]:
    """The groups whose accuracy on ``split`` is known in some row, in sorted order."""
    prefix = f"{split}/{GROUP_ACCURACY}"
    known = [c for c in frame.columns if c.startswith(prefix) and bool(frame[c].notna().any())]
    return sorted(c.removeprefix(prefix) for c in known)


def variant_rank(variant: str) -> tuple[int, str]:
    """Sort key of variants: full precision, uniform, published recipes, then ours."""
    for rank, start in enumerate(("fp32", "uniform")):
        if variant.startswith(start):
            return rank, variant
    return {"static": 3, "baq": 4}.get(variant.split("-")[0].split(" ")[0], 2), variant


def variants(frame: pd.DataFrame) -> list[str]:
    """The variants that occur, in the order of tables and legends."""
    return sorted(frame["variant"].astype(str).unique(), key=variant_rank)


def budget_phrase(label: str) -> str:
    """A budget in a sentence.

    >>> budget_phrase("1"), budget_phrase("0.5"), budget_phrase("1.5 MB"), budget_phrase("none")
    ('1 bit per weight', '0.5 bits per weight', '1.5 MB on disk', 'no budget')
    """
    kind, number = budget_order(label)
    if kind == 1:
        return f"{label} bit{'' if number == 1 else 's'} per weight"
    return f"{label} on disk" if kind == 2 else "no budget"


def listing(items: list[str], *, most: int | None = None) -> str:
    """Names in a sentence; the first ``most`` of them and how many others there are, where those are two or more.

    >>> listing(["a", "b", "c"]), listing(["a", "b", "c", "d", "e"], most=3)
    ('a, b and c', 'a, b, c and 2 others')
    """
    if most is not None and len(items) > most + 1:
        return f"{', '.join(items[:most])} and {len(items) - most} others"
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def percent(value: float, *, digits: int = 1) -> str:
    """A fraction in percent without the sign; a dash where it is unknown.

    >>> percent(0.8412), percent(float("nan"))
    ('84.1', '–')
    """
    return ABSENT if not math.isfinite(value) else f"{100 * value:.{digits}f}"


def bytes_text(num_bytes: float) -> str:
    """A size in KiB or MiB.

    >>> bytes_text(2048), bytes_text(44.7 * 2**20)
    ('2.0 KiB', '44.7 MiB')
    """
    if not math.isfinite(num_bytes):
        return ABSENT
    return f"{num_bytes / 2**10:.1f} KiB" if num_bytes < 2**20 else f"{num_bytes / 2**20:.1f} MiB"


def duration_text(seconds: float) -> str:
    """A time in the unit that reads best.

    >>> duration_text(42), duration_text(600), duration_text(9000)
    ('42 s', '10 min', '2.5 h')
    """
    if not math.isfinite(seconds):
        return ABSENT
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
