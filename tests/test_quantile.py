"""The paper's allocation by rank: its mix, its budget, its refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fqsweep.allocation import allocate_by_quantile


def test_quantile_gives_the_published_mix_where_the_budget_is_what_the_mix_spends() -> None:
    # Ten units of one size: 2 of 2 bits, 4 of 4 bits, 4 of 8 bits spend 5.2 mean bits.
    importance = np.arange(10.0)[::-1]
    allocation = allocate_by_quantile(importance, np.full(10, 3), budget_bits=5.2, choices=(2, 4, 8))
    assert allocation.bits_u.tolist() == [8, 8, 8, 8, 4, 4, 4, 4, 2, 2]
    assert np.isnan(allocation.objective) and allocation.lower_bound == -np.inf


@settings(max_examples=100, deadline=None)
@given(
    importance=st.lists(st.integers(0, 3), min_size=1, max_size=30),
    budget_bits=st.floats(2, 9),
    seed=st.integers(0, 9),
)
def test_quantile_keeps_the_budget_and_the_ranks(importance: list[int], budget_bits: float, seed: int) -> None:
    weights = np.random.default_rng(seed).integers(1, 50, len(importance))
    allocation = allocate_by_quantile(
        np.array(importance, float), weights, budget_bits=budget_bits, choices=(2, 4, 8)
    )
    assert weights @ allocation.bits_u <= budget_bits * weights.sum() * (1 + 1e-12)
    order = np.argsort(importance, kind="stable")
    assert (np.diff(allocation.bits_u[order]) >= 0).all()


@pytest.mark.parametrize("budget_bits", [2.0, 3.1, 5.5, 7.9])
def test_quantile_spends_nearly_all_of_the_budget(budget_bits: float) -> None:
    generator = np.random.default_rng(0)
    weights = generator.integers(1, 20, 2000)
    allocation = allocate_by_quantile(
        generator.random(2000), weights, budget_bits=budget_bits, choices=(2, 4, 8)
    )
    assert budget_bits - 0.02 < allocation.mean_bits <= budget_bits


def test_quantile_gives_all_units_the_highest_choice_where_that_fits() -> None:
    allocation = allocate_by_quantile(np.zeros(5), np.ones(5, int), budget_bits=8, choices=(2, 4, 8))
    assert allocation.bits_u.tolist() == [8] * 5


def test_quantile_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="no allocation fits"):
        allocate_by_quantile(np.zeros(3), np.ones(3, int), budget_bits=1, choices=(2, 4))
    with pytest.raises(ValueError, match="importance must be finite"):
        allocate_by_quantile(np.array([0.0, np.nan]), np.ones(2, int), budget_bits=4, choices=(2, 4))
