"""How well each group is served: group metrics on predictions. NumPy and pandas, no torch.

Axes: n samples, c classes, g groups.
Source: FairPrune (Wu, Zeng, Xu, Shi and Hu 2022), as FairQuant (Woergaard and Selvan 2026) uses it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Float = NDArray[np.float64]
Int = NDArray[np.int64]
NUM_CALIBRATION_BINS = 15


@dataclass(frozen=True, kw_only=True)
class FairnessReport:
    """Group metrics of one set of predictions, all as fractions.

    Attributes:
        acc_overall: accuracy over all samples.
        acc_avg, acc_worst, acc_gap: mean and minimum over scored groups, and acc_avg - acc_worst.
        balanced_acc: mean recall over the classes that occur; balanced_acc_worst: the lowest of any group.
        eopp0, eopp1: mean over classes of (max - min over groups) of TNR and of TPR.
        eodd: mean over classes of (TPR gap + FPR gap).
        dp_gap: mean over classes of (max - min over groups) of the predicted rate.
        acc_per_group, count_per_group: (g,); a group that is too small has accuracy NaN and takes no part.
        confusion_gtp: (g, true class, predicted class), counts.
    """

    acc_overall: float
    acc_avg: float
    acc_worst: float
    acc_gap: float
    balanced_acc: float
    balanced_acc_worst: float
    eopp0: float
    eopp1: float
    eodd: float
    dp_gap: float
    acc_per_group: Float
    count_per_group: Int
    confusion_gtp: Int


def fairness_report(
    predictions: NDArray[np.integer],
    labels: NDArray[np.integer],
    groups: NDArray[np.integer],
    *,
    num_classes: int,
    num_groups: int,
    min_count: int = 1,
) -> FairnessReport:
    """Compare how groups are served.

    For each class, one against the rest, TPR and TNR are taken per group. A (group, class) pair without
    samples takes no part; a class where fewer than two groups can be compared counts 0.

    Args:
        predictions, labels: integers (n,) in [0, num_classes).
        groups: integers (n,) in [0, num_groups).
        num_classes, num_groups: how many there are, also where some do not occur.
        min_count: a group with fewer samples is not scored.

    Raises:
        ValueError: arrays do not fit together, or fewer than two groups have ``min_count`` samples.

    Example:
        >>> report = fairness_report(np.array([0, 1, 1, 1]), np.array([0, 1, 0, 1]), np.array([0, 0, 1, 1]),
        ...                          num_classes=2, num_groups=2)
        >>> report.acc_worst, report.acc_gap, report.eopp1
        (0.5, 0.25, 0.5)
    """
    predictions, labels, groups = _checked(predictions, labels, groups, num_classes, num_groups)
    count_gtp = np.zeros((num_groups, num_classes, num_classes), dtype=np.int64)
    np.add.at(count_gtp, (groups, labels, predictions), 1)
    count_g = count_gtp.sum(axis=(1, 2))
    scored_g = count_g >= max(min_count, 1)
    if scored_g.sum() < 2:
        raise ValueError(
            f"At least 2 groups with >= {min_count} samples are needed, but got counts {count_g.tolist()}."
        )
    acc_g = _divide(np.einsum("gcc->g", count_gtp), count_g)
    acc_g[~scored_g] = np.nan
    tpr_gc, fpr_gc, rate_gc = _rates(count_gtp[scored_g])
    tpr_gap_c, fpr_gap_c, rate_gap_c = _gaps(tpr_gc), _gaps(fpr_gc), _gaps(rate_gc)
    total_tp = count_gtp.sum(axis=0)
    acc_avg, acc_worst = float(np.nanmean(acc_g)), float(np.nanmin(acc_g))
    return FairnessReport(
        acc_overall=float(np.trace(total_tp) / total_tp.sum()),
        acc_avg=acc_avg,
        acc_worst=acc_worst,
        acc_gap=acc_avg - acc_worst,
        balanced_acc=float(np.nanmean(_divide(np.diag(total_tp), total_tp.sum(axis=1)))),
        balanced_acc_worst=float(np.nanmean(tpr_gc, axis=1).min()),
        eopp0=float(fpr_gap_c.mean()),  # TNR = 1 - FPR: the same gap
        eopp1=float(tpr_gap_c.mean()),
        eodd=float((tpr_gap_c + fpr_gap_c).mean()),
        dp_gap=float(rate_gap_c.mean()),
        acc_per_group=acc_g,
        count_per_group=count_g,
        confusion_gtp=count_gtp,
    )


def _checked(
    predictions: NDArray[np.integer],
    labels: NDArray[np.integer],
    groups: NDArray[np.integer],
    num_classes: int,
    num_groups: int,
) -> tuple[Int, Int, Int]:
    checked = []
    for name, array, limit in (
        ("predictions", predictions, num_classes),
        ("labels", labels, num_classes),
        ("groups", groups, num_groups),
    ):
        values = np.asarray(array)
        if values.ndim != 1 or (values.size and values.dtype.kind not in "iub"):
            raise ValueError(f"{name} must be a 1-D integer array, got {values.dtype} of shape {values.shape}")
        if values.size and (values.min() < 0 or values.max() >= limit):
            raise ValueError(f"{name} must lie in [0, {limit}), got {values.min()} to {values.max()}")
        checked.append(values.astype(np.int64))
    if not len(checked[0]) == len(checked[1]) == len(checked[2]):
        raise ValueError(
            f"predictions, labels and groups must be equally long, got {[len(c) for c in checked]}"
        )
    return checked[0], checked[1], checked[2]


def _divide(part: NDArray[np.integer], whole: NDArray[np.integer]) -> Float:
    """part / whole, NaN where whole is 0."""
    quotient: Float = np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=np.asarray(whole) > 0)
    return quotient


def _rates(count_gtp: Int) -> tuple[Float, Float, Float]:
    """TPR, FPR and predicted rate per group and class from counts (group, true class, predicted class)."""
    true_gc, predicted_gc = count_gtp.sum(axis=2), count_gtp.sum(axis=1)
    hit_gc = np.einsum("gcc->gc", count_gtp)
    total_g1 = true_gc.sum(axis=1, keepdims=True)
    tpr_gc = _divide(hit_gc, true_gc)
    fpr_gc = _divide(predicted_gc - hit_gc, total_g1 - true_gc)
    return tpr_gc, fpr_gc, predicted_gc / total_g1


def _gaps(rate_gc: Float) -> Float:
    """Per class max - min over the groups that have the rate; 0 where fewer than two have it."""
    known_gc = ~np.isnan(rate_gc)
    high_c = np.where(known_gc, rate_gc, -np.inf).max(axis=0)
    low_c = np.where(known_gc, rate_gc, np.inf).min(axis=0)
    comparable_c = known_gc.sum(axis=0) >= 2
    gap_c: Float = np.subtract(high_c, low_c, out=np.zeros(rate_gc.shape[1]), where=comparable_c)
    return gap_c


def score_probabilities(
    probability_nc: Float,
    labels: NDArray[np.integer],
    groups: NDArray[np.integer],
    *,
    num_groups: int,
    min_count: int,
) -> tuple[dict[str, float], FairnessReport]:
    """Every recorded group metric (``names.GROUP_METRICS``) of one split.

    Args:
        probability_nc: float (n, classes), rows summing to 1.
        labels, groups: integers (n,).
        num_groups: number of groups.
        min_count: a group with fewer samples is not scored.

    Raises:
        ValueError: as ``fairness_report``; or a probability that is not finite.
    """
    if not np.isfinite(probability_nc).all():
        raise ValueError("the model's output is not finite on some image; no metric is recorded")
    report = fairness_report(
        probability_nc.argmax(axis=1),
        labels,
        groups,
        num_classes=probability_nc.shape[1],
        num_groups=num_groups,
        min_count=min_count,
    )
    scored = np.flatnonzero(report.count_per_group >= max(min_count, 1))
    auc_g = [macro_auc(probability_nc[groups == g], labels[groups == g]) for g in scored]
    names = ("acc_overall", "acc_avg", "acc_worst", "acc_gap", "balanced_acc", "balanced_acc_worst")
    metrics = {name: float(getattr(report, name)) for name in (*names, "eopp0", "eopp1", "eodd", "dp_gap")}
    metrics["auc_macro"] = macro_auc(probability_nc, labels)
    metrics["auc_worst"] = float(np.nanmin(auc_g)) if not np.isnan(auc_g).all() else float("nan")
    metrics["ece"] = calibration_error(probability_nc, labels)
    unknown = sorted(name for name, value in metrics.items() if not np.isfinite(value))
    if unknown:
        raise ValueError(f"{', '.join(unknown)} cannot be computed: no class has both positives and negatives")
    return metrics, report


def macro_auc(probability_nc: Float, labels: NDArray[np.integer]) -> float:
    """Mean over classes of the one-vs-rest area under the ROC curve.

    An area is the share of (positive, negative) pairs in the right order, ties as halves, counted from ranks (Mann
    and Whitney 1947). All classes are ranked in one call: with one call of a library's ROC curve for each, an epoch
    of many classes and groups would wait for its scores.

    Classes without positives or without negatives take no part; NaN where none is left.
    """
    positive_nc = labels[:, None] == np.arange(probability_nc.shape[1])
    num_positive_c = positive_nc.sum(axis=0)
    num_pairs_c = num_positive_c * (len(labels) - num_positive_c)
    scored_c = num_pairs_c > 0
    if not scored_c.any():
        return float("nan")
    rank_nc = pd.DataFrame(probability_nc[:, scored_c]).rank().to_numpy()
    rank_sum_c = (rank_nc * positive_nc[:, scored_c]).sum(axis=0)
    num_positive_c = num_positive_c[scored_c]
    smallest_sum_c = num_positive_c * (num_positive_c + 1) / 2
    return float(np.mean((rank_sum_c - smallest_sum_c) / num_pairs_c[scored_c]))


def calibration_error(probability_nc: Float, labels: NDArray[np.integer]) -> float:
    """Expected calibration error of the top class over 15 equal bins (Guo, Pleiss, Sun, Weinberger 2017)."""
    confidence_n = probability_nc.max(axis=1)
    correct_n = probability_nc.argmax(axis=1) == labels
    bin_n = np.minimum((confidence_n * NUM_CALIBRATION_BINS).astype(int), NUM_CALIBRATION_BINS - 1)
    difference_b = np.bincount(bin_n, weights=correct_n - confidence_n, minlength=NUM_CALIBRATION_BINS)
    return float(np.abs(difference_b).sum() / len(labels))
