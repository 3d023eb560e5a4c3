from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs_table import run_row, runs_of
from scipy import stats

from analysis.fronts import attainment_surfaces, mark_front_of, objective, objectives, seed_hypervolumes
from analysis.pareto import hypervolume, pareto_front, select_cells
from fqsweep.errors import InputError

METRIC = "val/acc_worst"
KEYS = (METRIC, "bits/mean_weight")
TRIPLES = st.lists(st.tuples(*[st.integers(0, 3).map(float)] * 3), max_size=10)


@given(TRIPLES)
@settings(max_examples=100, deadline=None)
def test_the_front_in_three_objectives_agrees_with_its_definition(points):
    directions = ["maximize", "minimize", "minimize"]
    signed = [(-a, b, c) for a, b, c in points]
    expected = [
        not any(all(x <= y for x, y in zip(q, p, strict=True)) and q != p for q in signed) for p in signed
    ]
    assert pareto_front(points, directions=directions).tolist() == expected


def test_any_objectives_choose_on_validation():
    rows = [
        run_row("a", 1, 0, 0.8, **{"val/eodd": 0.3, "size/packed_bytes": 10.0}),
        run_row("b", 1, 0, 0.8, **{"val/eodd": 0.1, "size/packed_bytes": 20.0, "test/eodd": 0.9}),
        run_row("c", 1, 0, 0.8, **{"val/eodd": 0.3, "size/packed_bytes": 11.0}),
    ]
    chosen = objectives(["val/eodd", "size/packed_bytes"])
    assert mark_front_of(runs_of(*rows), chosen).tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["val/eodd"], "two or three different objectives"),
        (["val/eodd", "val/eodd"], "two or three different objectives"),
        (["test/eodd", "val/ece"], "must be one of"),
    ],
)
def test_objectives_that_make_no_front_are_refused(keys, message):
    with pytest.raises(InputError, match=message):
        objectives(keys)


def test_costs_choose_and_report_themselves():
    assert objective("ops/effective_gbops").reports == "ops/effective_gbops"


def seeded(values: dict[int, float], *, bits: float = 4):
    rows = [run_row("a", bits, seed, value, **{"test/acc_worst": value}) for seed, value in values.items()]
    return select_cells(runs_of(*rows), metric=METRIC)


def test_the_hypervolume_of_each_seed_has_a_closed_form():
    volumes = seed_hypervolumes(seeded({0: 0.5, 1: 0.7}), keys=KEYS).iloc[0]
    assert volumes["mean"] == pytest.approx((8 - 4) / 8 * 0.6)
    assert volumes["std"] == pytest.approx(0.5 * np.std([0.5, 0.7], ddof=1))
    assert volumes["num_seeds"] == 2


def test_the_interval_of_hypervolumes_is_students():
    values = np.array([0.5, 0.52, 0.54, 0.6, 0.9])
    volumes = seed_hypervolumes(seeded(dict(enumerate(values))), keys=KEYS).iloc[0]
    half = stats.t.ppf(0.975, 4) * (0.5 * values).std(ddof=1) / math.sqrt(5)
    assert volumes["high"] - volumes["mean"] == pytest.approx(half)
    assert volumes["mean"] - volumes["low"] == pytest.approx(half)
    assert math.isnan(seed_hypervolumes(seeded({0: 0.5}), keys=KEYS)["low"].item())


def test_the_volume_is_of_test_figures_of_what_validation_chose():
    rows = [
        run_row("a", 4, 0, 0.9, **{"test/acc_worst": 0.5}),
        run_row("a", 2, 0, 0.1, **{"test/acc_worst": 0.4}),
        run_row("a", 3, 0, 0.05, **{"test/acc_worst": 0.99}),
    ]
    volumes = seed_hypervolumes(select_cells(runs_of(*rows), metric=METRIC), keys=KEYS)
    assert volumes["mean"].item() == pytest.approx((4 * 0.5 + 2 * 0.4) / 8)


def test_a_missing_test_figure_is_no_volume():
    cells = select_cells(runs_of(run_row("a", 4, 0, 0.9, **{"test/acc_worst": math.nan})), metric=METRIC)
    assert math.isnan(seed_hypervolumes(cells, keys=KEYS)["mean"].item())


def attained_by_definition(fronts, share):
    """The corners of what at least ``share`` of the fronts attain, by trying every place."""
    bits = sorted({b for front in fronts for b, _ in front})
    values = sorted({a for front in fronts for _, a in front})
    places = [
        (b, a)
        for b, a in itertools.product(bits, values)
        if sum(any(x <= b and y >= a for x, y in front) for front in fronts) >= share * len(fronts)
    ]
    marks = pareto_front(places, directions=["minimize", "maximize"])
    return sorted(place for place, on_front in zip(places, marks, strict=True) if on_front)


@given(st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_attainment_surfaces_agree_with_their_definition(seed):
    rng = np.random.default_rng(seed)
    rows = [run_row("a", b, s, float(rng.integers(1, 9)) / 10) for s in range(4) for b in (1, 2, 4)]
    rows = [row | {"test/acc_worst": row[METRIC]} for row in rows]
    found = attainment_surfaces(runs_of(*rows).assign(method="a"), metric=METRIC)
    fronts = [[(r["bits/mean_weight"], r[METRIC]) for r in rows if r["seed"] == s] for s in range(4)]
    for percent in (25, 50, 75):
        part = found[found["percent"] == percent]
        corners = sorted(zip(part["bits/mean_weight"], part["test/acc_worst"], strict=True))
        assert corners == attained_by_definition(fronts, percent / 100)


def test_two_seeds_have_no_quartiles():
    assert attainment_surfaces(seeded({0: 0.5, 1: 0.6}), metric=METRIC).empty


def test_a_hundred_thousand_points_have_their_front_within_a_second():
    points = np.random.default_rng(0).random((100_000, 3))
    start = time.perf_counter()
    pareto_front(points, directions=["minimize", "maximize", "minimize"])
    hypervolume(points[:, :2], reference=(1, 0), directions=["minimize", "maximize"])
    assert time.perf_counter() - start < 1
