"""How groups' costs become one table, and a table on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fqsweep.cost_table import load_importance, reduce_groups, save_importance
from tests.tiny_network import images, measure, tiny_network

COST = np.array([[[4.0, 1.0], [2.0, 0.0]], [[0.0, 0.0], [6.0, 2.0]], [[1.0, 1.0], [1.0, 1.0]]])
LOSS = np.array([0.2, 0.9, 0.5])


@pytest.mark.parametrize(
    ("reducer", "expected"),
    [
        ("mean", [[5 / 3, 2 / 3], [3.0, 1.0]]),
        ("max", [[4.0, 1.0], [6.0, 2.0]]),
        ("cvar", [[2.5, 1.0], [4.0, 1.5]]),
        ("subtractive", [[-4.0, -1.0], [4.0, 2.0]]),
    ],
)
def test_reducers_by_hand(reducer: Any, expected: list[list[float]]) -> None:
    assert np.allclose(reduce_groups(COST, reducer, loss_g=LOSS), expected)


def test_balanced_counts_groups_alike_whatever_the_size_of_their_losses() -> None:
    plain = reduce_groups(COST, "balanced", loss_g=LOSS)
    louder = COST * np.array([1.0, 1000.0, 1.0])[:, None, None]
    found = reduce_groups(louder, "balanced", loss_g=LOSS)
    assert np.allclose(found / found.sum(), plain / plain.sum())
    # Totals 7, 8 and 4 are brought to their mean, 19/3, each.
    wanted = (19 / 3) * (4 / 7 + 0 / 8 + 1 / 4) / 3
    assert plain[0, 0] == pytest.approx(wanted)


def test_balanced_of_a_group_without_costs_is_finite() -> None:
    found = reduce_groups(np.stack([COST[0], np.zeros((2, 2))]), "balanced", loss_g=LOSS[:2])
    assert np.isfinite(found).all() and (found >= 0).all()


@pytest.mark.parametrize("reducer", ["mean", "max", "cvar", "balanced"])
def test_one_group_is_its_own_reduction(reducer: Any) -> None:
    assert np.allclose(reduce_groups(COST[:1], reducer, loss_g=LOSS[:1]), COST[0])


@pytest.mark.parametrize("reducer", ["mean", "max", "cvar", "balanced"])
def test_the_order_of_groups_does_not_matter(reducer: Any) -> None:
    assert np.allclose(
        reduce_groups(COST[::-1], reducer, loss_g=LOSS[::-1]), reduce_groups(COST, reducer, loss_g=LOSS)
    )


def test_cvar_is_not_the_mean_of_few_groups() -> None:
    for count in (2, 3):
        found = reduce_groups(COST[:count], "cvar", loss_g=LOSS)
        assert not np.allclose(found, COST[:count].mean(axis=0))


def test_reducers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="subtractive contrasts two groups"):
        reduce_groups(COST[:1], "subtractive", loss_g=LOSS[:1])
    with pytest.raises(ValueError, match="reducer 'none' does not make one table"):
        reduce_groups(COST, "none", loss_g=LOSS)


def test_a_table_comes_back_from_disk_as_it_was(tmp_path: Path) -> None:
    found, _ = measure(tiny_network(), "grape", images())
    save_importance(tmp_path / "deep" / "table.npz", found)
    again = load_importance(tmp_path / "deep" / "table.npz")
    for name in ("cost_gub", "step_ub", "loss_g", "count_g"):
        assert np.array_equal(getattr(again, name), getattr(found, name), equal_nan=True)
        assert getattr(again, name).dtype == getattr(found, name).dtype
    assert (again.choices, again.passes, again.seconds) == (found.choices, found.passes, found.seconds)
