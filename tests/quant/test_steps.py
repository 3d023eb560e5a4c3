"""Start steps: what each rule minimises, against a search over a fine grid.

Axes: u units, n weights of a unit.
"""

from __future__ import annotations

import pytest
import torch

from fqsweep.quant.grid import quantise_units
from fqsweep.quant.levels import absmax_steps
from fqsweep.quant.steps import choose_steps

ALL = tuple(range(9))


def error_of(
    weight: torch.Tensor, step: torch.Tensor, bits: int, importance: torch.Tensor | None
) -> torch.Tensor:
    error = (quantise_units(weight, step, torch.full((len(weight),), bits)) - weight).square()
    return (error if importance is None else error * importance).sum(dim=1)


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(6, 64, generator=torch.Generator().manual_seed(0))


def test_absmax_reaches_the_largest_weight(weight: torch.Tensor) -> None:
    steps = choose_steps(weight, ALL, rule="absmax")
    assert steps.shape == (6, 9)
    assert (steps[:, 0] == 0).all()
    assert torch.allclose(steps[:, 1], 2 * weight.abs().mean(dim=1))
    for bits in range(2, 9):
        assert torch.allclose(steps[:, bits] * (2 ** (bits - 1) - 1), weight.abs().amax(dim=1))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("weighted", [False, True])
def test_the_fitted_step_is_nearly_the_best_of_a_fine_search(
    weight: torch.Tensor, bits: int, weighted: bool
) -> None:
    importance = torch.rand(6, 64, generator=torch.Generator().manual_seed(1)) if weighted else None
    rule = "curvature" if weighted else "mse"
    step = choose_steps(weight, (bits,), rule=rule, curvature_un=importance)  # type: ignore[arg-type]
    found = error_of(weight, step, bits, importance)
    widest = absmax_steps(weight, torch.full((6,), bits))
    fine = torch.stack(
        [error_of(weight, widest * share, bits, importance) for share in torch.linspace(0.1, 1.6, 151)]
    )
    # Above 4 bits few shares are tried: there the error is small anyway.
    assert (found <= (1.25 if bits <= 4 else 1.6) * fine.amin(dim=0)).all()
    assert (found <= error_of(weight, widest, bits, importance) * (1 + 1e-6)).all()


def test_one_bit_has_the_weighted_mean_magnitude() -> None:
    weight = torch.tensor([[1.0, -3.0]])
    step = choose_steps(weight, (1,), rule="curvature", curvature_un=torch.tensor([[3.0, 1.0]]))
    assert float(step) == pytest.approx(2 * (3 * 1 + 1 * 3) / 4)


def test_curvature_of_equal_values_is_mse(weight: torch.Tensor) -> None:
    equal = choose_steps(weight, ALL, rule="curvature", curvature_un=torch.full((1, 64), 7.0))
    assert torch.allclose(equal, choose_steps(weight, ALL, rule="mse"))


def test_where_no_input_ever_came_the_plain_error_counts(weight: torch.Tensor) -> None:
    dead = choose_steps(weight, ALL, rule="curvature", curvature_un=torch.zeros(6, 64))
    assert torch.allclose(dead, choose_steps(weight, ALL, rule="mse"))


def test_a_weight_that_matters_is_not_clipped() -> None:
    weight = torch.cat([torch.full((1, 31), 0.3), torch.tensor([[1.0]])], dim=1)
    importance = torch.full((1, 32), 1e-6)
    importance[0, 31] = 1.0
    step = choose_steps(weight, (2,), rule="curvature", curvature_un=importance)
    assert float(step) == pytest.approx(1.0)
    assert float(choose_steps(weight, (2,), rule="mse")) < 1.0


@pytest.mark.parametrize("rule", ["absmax", "mse", "curvature"])
def test_zeros_and_single_weights_have_finite_steps(rule: str) -> None:
    for weight in (torch.zeros(2, 5), torch.tensor([[0.3], [-2.0]])):
        steps = choose_steps(weight, ALL, rule=rule, curvature_un=torch.ones_like(weight))  # type: ignore[arg-type]
        assert torch.isfinite(steps).all() and (steps >= 0).all()


def test_curvature_without_curvature_is_refused(weight: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="rule 'curvature' needs curvature_un"):
        choose_steps(weight, (4,), rule="curvature")
