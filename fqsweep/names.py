"""Every metric, parameter and tag key that is recorded, with its unit, direction and meaning.

Reports, tables, searches and the reference take units, directions and meanings from here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Direction = Literal["maximize", "minimize", "none"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One recorded number: ``key`` without its split prefix, and how to read it."""

    key: str
    unit: str
    direction: Direction
    meaning: str


# Recorded twice, as val/<key> and test/<key>.
GROUP_METRICS: tuple[Metric, ...] = (
    Metric(key="acc_overall", unit="frac", direction="maximize", meaning="accuracy over all samples"),
    Metric(key="acc_avg", unit="frac", direction="maximize", meaning="mean of the groups' accuracies"),
    Metric(key="acc_worst", unit="frac", direction="maximize", meaning="accuracy of the worst-served group"),
    Metric(key="acc_gap", unit="frac", direction="minimize", meaning="acc_avg - acc_worst"),
    Metric(
        key="balanced_acc",
        unit="frac",
        direction="maximize",
        meaning="balanced accuracy: mean recall over classes, all samples",
    ),
    Metric(
        key="balanced_acc_worst",
        unit="frac",
        direction="maximize",
        meaning="balanced accuracy of the worst-served group",
    ),
    Metric(
        key="eopp0", unit="frac", direction="minimize", meaning="mean over classes of the TNR gap of groups"
    ),
    Metric(
        key="eopp1", unit="frac", direction="minimize", meaning="mean over classes of the TPR gap of groups"
    ),
    Metric(key="eodd", unit="frac", direction="minimize", meaning="mean over classes of TPR gap + FPR gap"),
    Metric(
        key="dp_gap", unit="frac", direction="minimize", meaning="mean over classes of the predicted-rate gap"
    ),
    Metric(key="auc_macro", unit="frac", direction="maximize", meaning="one-vs-rest AUC, mean over classes"),
    Metric(key="auc_worst", unit="frac", direction="maximize", meaning="macro AUC of the worst-served group"),
    Metric(key="ece", unit="frac", direction="minimize", meaning="expected calibration error, 15 bins"),
)
# Of those, what says nothing of groups.
GROUP_FREE = ("acc_overall", "balanced_acc", "auc_macro", "ece")
# Recorded once a run.
COST_METRICS: tuple[Metric, ...] = (
    Metric(
        key="bits/mean_weight",
        unit="bits",
        direction="minimize",
        meaning="mean bits per quantised weight, weighted by parameters; 32 for full precision",
    ),
    Metric(
        key="size/packed_bytes", unit="bytes", direction="minimize", meaning="size of the packed model file"
    ),
    Metric(
        key="ops/effective_gbops",
        unit="1e9 bit operations",
        direction="minimize",
        meaning="multiply-accumulates x weight bits x 32 activation bits; reads of dropped channels count",
    ),
    Metric(key="time/train_s", unit="s", direction="minimize", meaning="time in this trial's own training"),
    Metric(key="time/total_s", unit="s", direction="minimize", meaning="time of this trial from start to end"),
)
SPLIT_PREFIXES = ("val", "test")

# Options of a method as they are recorded; those of fine-tuning only where there is some.
PARAMS_OF_ALLOCATION: tuple[str, ...] = (
    "importance",
    "reducer",
    "allocator",
    "granularity",
    "choices",
    "scale",
    "exempt",
    "pin",
    "limits",
)
PARAMS_OF_FINETUNING: tuple[str, ...] = (
    "fairness_weight",
    "bitrate_weight",
    "regulariser",
    "distillation_weight",
    "bit_gradient",
    "bit_learning_rate",
    "bit_warmup_frac",
    "settle_frac",
    "mix_temperature",
)
# The same parameters on every child run ("none" where a method has no such thing), because the
# compare page of the MLflow UI shows only runs that have every chosen column.
RUN_PARAMS: tuple[str, ...] = (
    "dataset",
    "architecture",
    "method",
    "variant",
    "budget_bits",
    "budget_bytes",
    "seed",
    "group_attribute",
    *PARAMS_OF_ALLOCATION,
    "match_moments",
    "reconstruct",
    "finetune_epochs",
    *PARAMS_OF_FINETUNING,
)
NO_VALUE = "none"

METHODS: tuple[str, ...] = (
    "fp32",
    "uniform",
    "static",
    "baq",
    "fairgrape",
    "fairquantize",
    "hawq",
    "fairquant",
    "reference",
)

KIND_SWEEP = "sweep"
KIND_TRIAL = "trial"
TAG_KEY = "fqsweep.key"
TAG_SWEEP = "fqsweep.sweep"
TAG_KIND = "fqsweep.kind"
TAG_SPACE = "fqsweep.space"
TAG_PRUNED = "pruned"
TAG_RETIRED = "retired"  # no result of the search space as it is
TAG_FRONT = "front"
TAG_RECOMMENDED = "recommended"
TAG_REASON = "recommended.reason"
TAG_PARENT = "mlflow.parentRunId"
# What a filter of the MLflow UI can ask for (``tags.front = 'true'``).
TAGS: dict[str, str] = {
    "method": "of a trial: its method",
    "variant": "of a trial: its row of the results, such as `uniform-4-ft`",
    TAG_KEY: "of a trial: its key, the hash of what determines its result and the name of its folder",
    TAG_KIND: f"`{KIND_SWEEP}` for the parent run of a sweep, `{KIND_TRIAL}` for a trial",
    TAG_SWEEP: "name of the sweep, as in its search space",
    TAG_SPACE: "of the parent run: file name of the search space, as it was last started",
    TAG_PRUNED: "the trial was stopped early; it has no test metrics",
    TAG_RETIRED: "no result of the search space as it is (its cell left it, or its search chose other weights)",
    TAG_FRONT: (
        "the trial's row is on the front: of its mean over seeds, no row has both fewer bits and a better validation "
        "metric"
    ),
    TAG_RECOMMENDED: "the trial to take under some budget",
    TAG_REASON: "why it is recommended",
}
# Of the parent run: what the counters of the driver's machine added up to, GPUs and CPU packages together.
ENERGY_KWH = "energy/counted_kwh"
SHARED_S = "time/shared_s"  # of the parent run: what parents and cost tables took together
# Families of keys that are recorded beside the metrics above, and what they hold.
MORE_KEYS: dict[str, str] = {
    "val/loss, test/loss": "of a trial: mean cross-entropy of its images",
    "val/acc_group/GROUP, test/acc_group/GROUP": "of a trial: accuracy of one group",
    "val/count_group/GROUP, test/count_group/GROUP": "of a trial: images of one group",
    "epoch/...": "of a trial, what each epoch of its training gave (`epoch/train/loss`, `epoch/val/...`)",
    "cells/done, cells/...": "of the parent run: how many cells are done, failed, running, waiting",
    SHARED_S: "of the parent run: seconds that parents and cost tables took together",
    ENERGY_KWH: "of the parent run: kWh that the counters of the driver's machine added up to",
    "system/...": "of the parent run: load of the driver's machine while trials run",
}
BITS = "bits/mean_weight"
LEARNED_BITS = "bits/learned_mean"  # of an epoch, while bits are learned
DEFAULT_EXPERIMENT = "fqsweep"
DEFAULT_SELECTION = "val/acc_worst"


def is_of_groups(key: str) -> bool:
    """Whether a metric depends on how the samples are grouped: ``val/acc_worst`` does, ``val/acc_overall`` not."""
    name = key.rpartition("/")[2]
    return name not in GROUP_FREE and any(metric.key == name for metric in GROUP_METRICS)


def group_metric_key(split: str, what: str, group: str) -> str:
    """Key of a metric of one group, ``what`` being ``acc_group`` or ``count_group``.

    MLflow takes letters, digits, blanks and ``_-.:/`` in a key. Two groups may come to one key:
    ``fqsweep.engine.checks`` refuses those.

    >>> [group_metric_key("val", "acc_group", name) for name in ("male x <40", "60+", "ER+")]
    ['val/acc_group/male x under 40', 'val/acc_group/60 and over', 'val/acc_group/ER plus']
    """
    text = re.sub(r"(?<=\d)\+(?=$| x )", " and over", group)
    text = re.sub(r"\s*\+\s*", " plus ", text).strip().replace("<", "under ").replace(">", "over ")
    return f"{split}/{what}/{part_of_key(text)}"


def part_of_key(text: str) -> str:
    """``text`` as a part of a key that MLflow takes, between slashes.

    >>> part_of_key("ward (3), A/B")
    'ward _3__ A_B'
    """
    return "".join(c if c.isalnum() or c in " _-.:" else "_" for c in text)


def metric_keys() -> tuple[str, ...]:
    """All metric keys of a finished child run, with their split prefixes."""
    grouped = tuple(f"{split}/{metric.key}" for split in SPLIT_PREFIXES for metric in GROUP_METRICS)
    return grouped + tuple(metric.key for metric in COST_METRICS)


def metric_of(key: str) -> Metric:
    """The record behind a full metric key such as ``val/acc_worst``.

    Raises:
        KeyError: no such metric.
    """
    bare = key.split("/", 1)[1] if key.split("/", 1)[0] in SPLIT_PREFIXES else key
    for metric in GROUP_METRICS + COST_METRICS:
        if metric.key == bare:
            return metric
    raise KeyError(key)


def selection_of(objectives: Iterable[str]) -> str:
    """What chooses between the runs of a search: its first objective that is to be maximised on validation data.

    >>> selection_of(["bits/mean_weight", "val/acc_gap", "val/auc_worst"]), selection_of(["bits/mean_weight"])
    ('val/auc_worst', 'val/acc_worst')
    """
    rising = (key for key in objectives if key.startswith("val/") and metric_of(key).direction == "maximize")
    return next(rising, DEFAULT_SELECTION)


def budget_label(budget_bits: float, budget_bytes: float) -> str:
    """A budget as it is written, without loss: in bits per weight, in bytes on disk, or ``none``.

    >>> budget_label(0.5, math.nan), budget_label(math.nan, 1_500_000), budget_label(math.nan, math.nan)
    ('0.5', '1.5 MB', 'none')
    """
    if math.isfinite(budget_bytes):
        unit, size = ("MB", 1e6) if budget_bytes >= 1e6 else ("kB", 1e3)
        return f"{budget_bytes / size:.12g} {unit}"
    return f"{budget_bits:.12g}" if math.isfinite(budget_bits) else NO_VALUE


def budget_with_unit(label: str) -> str:
    """A budget as a row of a list is called.

    >>> budget_with_unit("0.5"), budget_with_unit("1.5 MB"), budget_with_unit("none")
    ('0.5 bit', '1.5 MB', 'fp32')
    """
    if label == NO_VALUE:
        return "fp32"
    return label if label.endswith("B") else f"{label} bit"


def budget_order(label: str) -> tuple[int, float]:
    """Sort key of budgets: none, then bits ascending, then bytes ascending.

    >>> sorted(["900 kB", "1.5 MB", "4", "none", "0.5"], key=budget_order)
    ['none', '0.5', '4', '900 kB', '1.5 MB']
    """
    if label == NO_VALUE:
        return 0, 0.0
    number, _, unit = label.partition(" ")
    return (2, float(number) * {"MB": 1e6, "kB": 1e3}[unit]) if unit else (1, float(number))
