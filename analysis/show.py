"""One run in the terminal: what was asked for, metrics by split, groups, bits of each layer."""

from __future__ import annotations

import sys
from typing import Any

import pandas as pd

from analysis import cli
from analysis.columns import (
    ABSENT,
    GROUP_ACCURACY,
    GROUP_COUNT,
    bytes_text,
    duration_text,
    group_names,
    percent,
)
from analysis.intervals import share_interval
from analysis.mlflow_runs import RunRecord, load_layers, load_run
from fqsweep.names import COST_METRICS, GROUP_METRICS, NO_VALUE, TAG_FRONT, TAG_REASON, TAG_RECOMMENDED

MAX_BAR = 32  # characters of the widest bar of bits
WIDEST_BITS = 8


def run_text(run: RunRecord, layers: pd.DataFrame) -> str:
    """Everything a run recorded, as lines of at most 110 characters where names allow it."""
    parts = [_head(run), _params(run.params), _metrics(run.metrics), _groups(run.metrics), _costs(run.metrics)]
    return "\n\n".join(part for part in [*parts, _layers(layers)] if part)


def _head(run: RunRecord) -> str:
    lines = [f"run {run.run_id}: {run.name or 'no name'}, {run.status.lower()}"]
    if run.tags.get(TAG_FRONT):
        lines.append("on the front of validation")
    if run.tags.get(TAG_RECOMMENDED):
        lines.append(f"recommended: {run.tags.get(TAG_REASON, 'true')}")
    return "\n".join(lines)


def _params(params: dict[str, str]) -> str:
    told = {key: value for key, value in params.items() if value != NO_VALUE}
    width = max(map(len, told), default=0)
    return "\n".join(f"  {key:<{width}}  {value}" for key, value in told.items())


def _metrics(metrics: dict[str, float]) -> str:
    rows = [
        (m.key, *(_figure(metrics, f"{split}/{m.key}") for split in ("val", "test")), m.meaning)
        for m in GROUP_METRICS
        if f"val/{m.key}" in metrics or f"test/{m.key}" in metrics
    ]
    return _aligned([("metric, %", "validation", "test", ""), *rows], right=(1, 2)) if rows else ""


def _figure(metrics: dict[str, float], key: str) -> str:
    return percent(metrics.get(key, float("nan")), digits=2)


def _groups(metrics: dict[str, float]) -> str:
    rows = []
    for name in group_names(pd.DataFrame([metrics]), split="test"):
        accuracy = metrics[f"test/{GROUP_ACCURACY}{name}"]
        count = int(metrics.get(f"test/{GROUP_COUNT}{name}", 0))
        interval = share_interval(accuracy, count) if count else None
        ends = f"{percent(interval[0])} to {percent(interval[1])}" if interval else ABSENT
        validation = _figure(metrics, f"val/{GROUP_ACCURACY}{name}")
        rows.append((name, validation, percent(accuracy, digits=2), ends, str(count) if count else ABSENT))
    head = ("group, accuracy %", "validation", "test", "95 % of images alone", "test images")
    return _aligned([head, *rows], right=(1, 2, 3, 4)) if rows else ""


def _costs(metrics: dict[str, float]) -> str:
    texts = {"bytes": bytes_text, "s": duration_text}
    known = [m for m in COST_METRICS if m.key in metrics]
    rows: list[tuple[str, ...]] = [
        (m.key, texts.get(m.unit, "{:.3f}".format)(metrics[m.key]), m.meaning) for m in known
    ]
    return _aligned(rows, right=(1,)) if rows else ""


def _layers(layers: pd.DataFrame) -> str:
    """One line a layer: its mean bits, as a number and as a bar."""
    if layers.empty:
        return "Bits of each layer are not recorded (full precision, or no bits.csv)."
    rows = [
        (str(name), f"{bits:.2f}", str(units), "#" * round(bits * MAX_BAR / WIDEST_BITS))
        for name, bits, units in zip(layers["layer"], layers["mean_bits"], layers["units"], strict=True)
    ]
    return _aligned([("layer", "mean bits", "units", ""), *rows], right=(1, 2))


def _aligned(rows: list[tuple[str, ...]], *, right: tuple[int, ...]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  "
        + "  ".join(
            text.rjust(width) if i in right else text.ljust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def main(argv: list[str] | None = None) -> int:
    """Print one run."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m analysis.show", description="Print one run of a sweep.")
    parser.add_argument("run_id", help="id of the run, or its first letters")
    parser.add_argument("--tracking-uri", required=True)

    def act(arguments: Any) -> None:
        run = load_run(arguments.tracking_uri, arguments.run_id)
        sys.stdout.write(run_text(run, load_layers(arguments.tracking_uri, [run.run_id])) + "\n")

    return cli.run(parser, act, argv)


if __name__ == "__main__":
    raise SystemExit(main())
