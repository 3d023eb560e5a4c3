"""The columns that identify a row, and how single values are named and printed."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable

import pandas as pd

from fqsweep.errors import InputError
from fqsweep.names import GROUP_METRICS, NO_VALUE, metric_of

PANEL = ("dataset", "group_attribute", "architecture")  # what may be compared with each other
POINT = (*PANEL, "variant", "budget_bits")  # one marker of a figure, one row of a table
CELL = (*POINT, "seed")  # one cell of the grid
BITS = "bits/mean_weight"
BYTES = "size/packed_bytes"
DEFAULT_METRIC = "val/acc_worst"
GROUP_ACCURACY = "acc_group/"
GROUP_COUNT = "count_group/"
REFERENCE_VARIANT = "fp32"
ABSENT = "–"


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


def panel_title(panel: Iterable[str]) -> str:
    """A panel in words.

    >>> panel_title(("isic2019", "sex", "resnet18"))
    'isic2019, groups by sex, resnet18'
    """
    dataset, attribute, architecture = panel
    return f"{dataset}, groups by {attribute}, {architecture}"


def budgets(frame: pd.DataFrame) -> list[float]:
    """The budgets in bits that occur, ascending; full precision has none."""
    return sorted(float(b) for b in frame["budget_bits"].dropna().unique())


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


def budget_text(budget_bits: float) -> str:
    """A budget in bits as it is written; ``none`` for full precision.

    >>> budget_text(0.5), budget_text(4.0), budget_text(float("nan"))
    ('0.5', '4', 'none')
    """
    return NO_VALUE if math.isnan(budget_bits) else f"{budget_bits:g}"


def bits_phrase(budget_bits: float) -> str:
    """A budget in a sentence.

    >>> bits_phrase(1.0), bits_phrase(0.5)
    ('1 bit per weight', '0.5 bits per weight')
    """
    return f"{budget_bits:g} bit{'' if budget_bits == 1 else 's'} per weight"


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
