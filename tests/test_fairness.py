"""Group metrics against values worked out by hand and a plain loop.

Axes: n samples, c classes, g groups.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from fqsweep.fairness import calibration_error, fairness_report, macro_auc, score_probabilities
from fqsweep.names import GROUP_METRICS


def by_loops(pred: Any, label: Any, group: Any, num_classes: int, num_groups: int) -> dict[str, float]:
    """The definitions, written out: FairPrune's, one class against the rest."""
    gaps: dict[str, list[float]] = {"tpr": [], "tnr": [], "fpr": [], "rate": []}
    for c in range(num_classes):
        values: dict[str, list[float]] = {name: [] for name in gaps}
        for g in range(num_groups):
            own = group == g
            if not own.any():
                continue
            positive, negative = own & (label == c), own & (label != c)
            if positive.any():
                values["tpr"].append((pred[positive] == c).mean())
            if negative.any():
                values["tnr"].append((pred[negative] != c).mean())
                values["fpr"].append((pred[negative] == c).mean())
            values["rate"].append((pred[own] == c).mean())
        for name, found in values.items():
            gaps[name].append(max(found) - min(found) if len(found) >= 2 else 0.0)
    return {
        "eopp0": np.mean(gaps["tnr"]),
        "eopp1": np.mean(gaps["tpr"]),
        "eodd": np.mean(np.add(gaps["tpr"], gaps["fpr"])),
        "dp_gap": np.mean(gaps["rate"]),
    }


def test_every_metric_of_a_hand_worked_example() -> None:
    # Group 0: class 0 three times (2 hit), class 1 once (hit). Group 1: class 0 once (missed), class 1 twice (1 hit).
    labels = np.array([0, 0, 0, 1, 0, 1, 1])
    predictions = np.array([0, 0, 1, 1, 1, 1, 0])
    groups = np.array([0, 0, 0, 0, 1, 1, 1])
    report = fairness_report(predictions, labels, groups, num_classes=2, num_groups=2)
    assert report.acc_per_group.tolist() == pytest.approx([3 / 4, 1 / 3])
    assert report.count_per_group.tolist() == [4, 3]
    assert report.acc_overall == pytest.approx(4 / 7)
    assert report.acc_avg == pytest.approx((3 / 4 + 1 / 3) / 2)
    assert report.acc_worst == pytest.approx(1 / 3)
    assert report.acc_gap == pytest.approx((3 / 4 - 1 / 3) / 2)
    assert report.balanced_acc == pytest.approx((2 / 4 + 2 / 3) / 2)
    assert report.balanced_acc_worst == pytest.approx((0 / 1 + 1 / 2) / 2)
    # TPR of class 0: 2/3 and 0; of class 1: 1 and 1/2. TNR of class 0 is TPR of class 1, and the reverse.
    assert report.eopp1 == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert report.eopp0 == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert report.eodd == pytest.approx(2 / 3 + 1 / 2)
    # Class 0 is predicted for 2 of 4 and 1 of 3.
    assert report.dp_gap == pytest.approx(1 / 2 - 1 / 3)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.integers(4, 40))
def test_gaps_are_what_the_definitions_written_as_loops_give(seed: int, size: int) -> None:
    generator = np.random.default_rng(seed)
    num_classes, num_groups = int(generator.integers(2, 5)), int(generator.integers(2, 4))
    pred, label = generator.integers(0, num_classes, (2, size))
    group = generator.integers(0, num_groups, size)
    group[:2] = [0, 1]
    report = fairness_report(pred, label, group, num_classes=num_classes, num_groups=num_groups)
    for name, value in by_loops(pred, label, group, num_classes, num_groups).items():
        assert getattr(report, name) == pytest.approx(value, abs=1e-12), name


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_groups_numbers_and_the_samples_order_do_not_matter(seed: int) -> None:
    generator = np.random.default_rng(seed)
    pred, label, group = generator.integers(0, 3, (3, 30))
    group[:3] = [0, 1, 2]
    report = fairness_report(pred, label, group, num_classes=3, num_groups=3)
    order, names = generator.permutation(30), generator.permutation(3)
    other = fairness_report(pred[order], label[order], names[group[order]], num_classes=3, num_groups=3)
    for name in ("acc_avg", "acc_worst", "balanced_acc_worst", "eopp0", "eopp1", "eodd", "dp_gap"):
        assert getattr(other, name) == pytest.approx(getattr(report, name), abs=1e-12)
    assert other.acc_per_group[names] == pytest.approx(report.acc_per_group, nan_ok=True)


def test_groups_that_are_served_alike_have_no_gap() -> None:
    pred, label = np.tile([0, 1, 1, 2], 2), np.tile([0, 1, 2, 2], 2)
    report = fairness_report(pred, label, np.repeat([0, 1], 4), num_classes=3, num_groups=2)
    assert report.acc_gap == report.eopp0 == report.eopp1 == report.eodd == report.dp_gap == 0


def test_a_class_that_only_one_group_has_counts_zero_for_tpr() -> None:
    labels = np.array([0, 1, 0, 0])
    predictions = np.array([0, 0, 0, 0])
    report = fairness_report(predictions, labels, np.array([0, 0, 1, 1]), num_classes=2, num_groups=2)
    # Class 1 occurs in group 0 alone: no TPR gap. Class 0 has negatives in group 0 alone: no TNR gap.
    assert report.eopp1 == 0.0
    assert report.eopp0 == 0.0
    assert report.balanced_acc_worst == pytest.approx(0.5)


def test_a_class_that_never_occurs_counts_in_the_mean_over_classes() -> None:
    labels, predictions, groups = np.array([0, 0]), np.array([0, 1]), np.array([0, 1])
    two = fairness_report(predictions, labels, groups, num_classes=2, num_groups=2)
    four = fairness_report(predictions, labels, groups, num_classes=4, num_groups=2)
    assert two.eopp1 == pytest.approx(1 / 2)
    assert four.eopp1 == pytest.approx(1 / 4)
    assert four.balanced_acc == two.balanced_acc == 0.5


def test_a_group_below_min_count_takes_no_part_but_in_the_overall_accuracy() -> None:
    labels = np.array([0, 0, 1, 1, 0])
    predictions = np.array([0, 0, 1, 0, 1])
    groups = np.array([0, 0, 1, 1, 2])
    report = fairness_report(predictions, labels, groups, num_classes=2, num_groups=3, min_count=2)
    assert report.acc_worst == 0.5
    assert np.isnan(report.acc_per_group[2])
    assert report.count_per_group.tolist() == [2, 2, 1]
    assert report.acc_overall == pytest.approx(3 / 5)


def test_a_group_without_samples_takes_no_part() -> None:
    report = fairness_report(np.array([0, 1]), np.array([0, 0]), np.array([0, 2]), num_classes=2, num_groups=4)
    assert report.acc_worst == 0.0
    assert np.isnan(report.acc_per_group[[1, 3]]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"groups": np.zeros(4, int)},
            r"At least 2 groups with >= 1 samples are needed, but got counts \[4, 0\]",
        ),
        ({"min_count": 3}, r"At least 2 groups with >= 3 samples are needed, but got counts \[2, 2\]"),
        ({"predictions": np.array([0, 1, 2, 0])}, r"predictions must lie in \[0, 2\), got 0 to 2"),
        ({"labels": np.array([0, -1, 1, 0])}, r"labels must lie in \[0, 2\), got -1 to 1"),
        ({"labels": np.array([0.0, 1.0, 1.0, 0.0])}, "labels must be a 1-D integer array, got float64"),
        ({"groups": np.zeros((2, 2), int)}, "groups must be a 1-D integer array"),
        ({"labels": np.array([0, 1])}, r"must be equally long, got \[4, 2, 4\]"),
    ],
)
def test_unusable_predictions_are_refused(change: dict[str, Any], message: str) -> None:
    usable: dict[str, Any] = {
        "predictions": np.array([0, 1, 1, 0]),
        "labels": np.array([0, 1, 0, 0]),
        "groups": np.array([0, 0, 1, 1]),
        "num_classes": 2,
        "num_groups": 2,
    }
    assert fairness_report(**usable).acc_worst == 0.5
    with pytest.raises(ValueError, match=message):
        fairness_report(**{**usable, **change})


def test_empty_predictions_are_refused() -> None:
    empty = np.zeros(0, dtype=np.int64)
    with pytest.raises(ValueError, match="At least 2 groups"):
        fairness_report(empty, empty, empty, num_classes=2, num_groups=2)


# --- probabilities -------------------------------------------------------------------------------


def test_macro_auc_is_the_share_of_pairs_in_the_right_order() -> None:
    score = np.array([0.9, 0.6, 0.4, 0.1])
    labels = np.array([1, 0, 1, 0])
    # Of the pairs (positive, negative) three of four are in order; the other class mirrors it.
    assert macro_auc(np.stack([1 - score, score], axis=1), labels) == pytest.approx(0.75)


@pytest.mark.parametrize("digits", [1, 2, 17])
def test_macro_auc_is_that_of_a_known_library_with_ties_and_without(digits: int) -> None:
    generator = np.random.default_rng(digits)
    probability = generator.dirichlet(np.ones(5), size=200).round(digits)
    labels = generator.integers(0, 4, 200)
    areas = [roc_auc_score(labels == c, probability[:, c]) for c in range(4)]
    assert macro_auc(probability, labels) == pytest.approx(np.mean(areas), abs=1e-14)


def test_macro_auc_leaves_out_classes_without_positives_and_is_nan_where_none_is_left() -> None:
    probability = np.array([[0.8, 0.1, 0.1], [0.3, 0.6, 0.1]])
    assert macro_auc(probability, np.array([0, 1])) == 1.0
    assert np.isnan(macro_auc(probability, np.array([0, 0])))


def test_calibration_error_is_the_distance_of_confidence_from_accuracy() -> None:
    probability = np.array([[0.8, 0.2]] * 5 + [[0.4, 0.6]] * 5)
    labels = np.array([0, 0, 0, 0, 1] + [1, 0, 0, 0, 0])
    # 0.8 confident and 4 of 5 right; 0.6 confident and 1 of 5 right.
    assert calibration_error(probability, labels) == pytest.approx(0.5 * 0.0 + 0.5 * 0.4)


def test_certain_and_right_is_perfectly_calibrated() -> None:
    assert calibration_error(np.eye(3), np.arange(3)) == 0.0


def test_scores_hold_every_recorded_group_metric() -> None:
    generator = np.random.default_rng(0)
    probability = generator.dirichlet(np.ones(3), 60)
    labels, groups = generator.integers(0, 3, 60), generator.integers(0, 2, 60)
    metrics, report = score_probabilities(probability, labels, groups, num_groups=2, min_count=1)
    assert set(metrics) == {metric.key for metric in GROUP_METRICS}
    auc_g = [macro_auc(probability[groups == g], labels[groups == g]) for g in (0, 1)]
    assert metrics["auc_worst"] == min(auc_g)
    assert metrics["acc_overall"] == (probability.argmax(axis=1) == labels).mean() == report.acc_overall


def test_output_that_is_not_finite_is_never_scored() -> None:
    probability = np.full((4, 2), 0.5)
    probability[2] = np.nan
    with pytest.raises(ValueError, match="output is not finite on some image"):
        score_probabilities(
            probability, np.array([0, 1, 0, 1]), np.array([0, 0, 1, 1]), num_groups=2, min_count=1
        )


def test_an_auc_that_cannot_be_computed_is_never_recorded_as_nan() -> None:
    with pytest.raises(ValueError, match="auc_macro, auc_worst cannot be computed"):
        score_probabilities(
            np.full((4, 2), 0.5), np.zeros(4, int), np.array([0, 0, 1, 1]), num_groups=2, min_count=1
        )


def test_the_worst_auc_is_taken_over_the_groups_that_have_one() -> None:
    probability = np.array([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.2, 0.8]])
    labels = np.array([0, 0, 1, 0])
    metrics, _ = score_probabilities(probability, labels, np.array([0, 0, 1, 1]), num_groups=2, min_count=1)
    assert metrics["auc_worst"] == 0.0
