"""The rule that stops trials early: hand-computed bars."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fqsweep.engine.stopping import Curve, is_unpromising, set_bars

ACC, BITS, GAP = "val/acc_worst", "bits/mean_weight", "val/acc_gap"


def curve(*values: float, whole: bool = True, key: str = ACC) -> Curve:
    return Curve(epochs=[{key: value} for value in values], whole=whole)


def test_the_median_rule_takes_the_median_of_what_whole_siblings_showed_on_average() -> None:
    siblings = [curve(0.2, 0.5), curve(0.4, 0.3), curve(0.3, 0.9), curve(0.0, whole=False)]
    bars = set_bars(siblings, rule="median", objectives=(ACC, BITS))
    assert bars == {0: {ACC: 0.3}, 1: {ACC: pytest.approx(0.35)}}
    assert is_unpromising([{ACC: 0.285}], bars) and not is_unpromising([{ACC: 0.295}], bars), (
        "a point is no difference"
    )
    assert not is_unpromising([{ACC: 0.6}, {ACC: 0.1}], bars), "the best so far counts"
    rounds = [Curve(epochs=[{ACC: 0.5}, {}, {ACC: 0.7}])] * 2
    assert set_bars(rounds, rule="median", objectives=(ACC,))[2] == {ACC: pytest.approx(0.6)}


def test_halving_asks_at_epochs_1_2_4_8_for_the_best_third_of_all_siblings() -> None:
    siblings = [curve(0.1, whole=False), *(curve(*([v] * 9)) for v in (0.2, 0.3, 0.4, 0.5, 0.6))]
    bars = set_bars(siblings, rule="halving", objectives=(ACC,))
    assert bars == {0: {ACC: 0.5}, 1: {ACC: 0.5}, 3: {ACC: 0.5}, 7: {ACC: 0.5}}


def test_a_trial_goes_on_while_any_objective_holds_its_bar() -> None:
    siblings = [Curve(epochs=[{ACC: 0.5, GAP: 0.1}])] * 2
    bars = set_bars(siblings, rule="median", objectives=(ACC, GAP))
    assert bars == {0: {ACC: 0.5, GAP: 0.1}}
    assert not is_unpromising([{ACC: 0.1, GAP: 0.1}], bars)
    assert not is_unpromising([{ACC: 0.5, GAP: 0.9}], bars)
    assert is_unpromising([{ACC: 0.1, GAP: 0.2}], bars)


@pytest.mark.parametrize(
    ("siblings", "rule", "objectives"),
    [
        ([curve(0.5)] * 5, "none", (ACC,)),
        ([curve(0.5)], "median", (ACC,)),
        ([curve(0.5), curve(0.4, whole=False)], "median", (ACC,)),
        ([curve(0.5)] * 5, "median", (BITS,)),
        ([], "halving", (ACC,)),
    ],
)
def test_no_bar_is_set_where_nothing_can_be_said(
    siblings: list[Curve], rule: str, objectives: tuple[str, ...]
) -> None:
    bars = set_bars(siblings, rule=rule, objectives=objectives)  # type: ignore[arg-type]
    assert bars == {}
    assert not is_unpromising([{ACC: 0.0}], bars)


@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=2, max_size=9))
def test_the_best_sibling_is_never_below_any_bar(values: list[list[float]]) -> None:
    leading = [{ACC: max(max(one[: n + 1]) for one in values)} for n in range(3)]
    for rule in ("median", "halving"):
        bars = set_bars([curve(*one) for one in values], rule=rule, objectives=(ACC,))  # type: ignore[arg-type]
        assert not any(is_unpromising(leading[: n + 1], bars) for n in range(3))
