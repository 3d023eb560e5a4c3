"""Learned bits: the projection on the budget, and bits that move where the task needs them.

Axes: u units.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import nn

from fqsweep.errors import TrialError
from fqsweep.quant.baq import STEPS_GATHERED, LearnedBits, project_on_budget
from fqsweep.quant.convert import attach_quantisers
from fqsweep.quant.steps import choose_steps
from fqsweep.quant.units import UnitTable, list_units


def project(bits: Any, share: Any, low: Any, high: Any, budget: float) -> np.ndarray:
    tensors = [torch.tensor(np.asarray(value), dtype=torch.float32) for value in (bits, share, low, high)]
    return project_on_budget(*tensors, budget).double().numpy()


# --- projection ----------------------------------------------------------------------------------


def test_bits_within_limits_and_budget_stay() -> None:
    assert project([3, 4.5], [0.5, 0.5], [2, 2], [8, 8], 5).tolist() == [3, 4.5]


def test_bits_over_the_budget_are_lowered_by_one_common_shift() -> None:
    # 0.25 x 6 + 0.75 x 4 = 4.5: one bit too many for 3.5.
    assert project([6, 4], [0.25, 0.75], [0, 0], [8, 8], 3.5) == pytest.approx([5, 3], abs=1e-5)


def test_a_unit_at_its_limit_does_not_take_part_in_the_shift() -> None:
    # Unit 1 cannot fall below 2: unit 0 carries all of it.
    assert project([6, 2.2], [0.5, 0.5], [2, 2], [8, 8], 3) == pytest.approx([4, 2], abs=1e-5)


def test_a_budget_below_the_lowest_widths_gives_the_lowest_widths() -> None:
    assert project([6, 4], [0.5, 0.5], [2, 3], [8, 8], 1).tolist() == [2, 3]


def test_pinned_units_stay_pinned() -> None:
    assert project([9, 1, 4], [0.2, 0.2, 0.6], [8, 2, 0], [8, 2, 8], 3)[:2].tolist() == [8, 2]


@pytest.mark.parametrize("seed", range(12))
def test_the_projection_is_the_nearest_feasible_point(seed: int) -> None:
    """Against SLSQP on the weighted squared distance."""
    generator = np.random.default_rng(seed)
    size = int(generator.integers(2, 7))
    bits = generator.uniform(-1, 10, size)
    share = generator.dirichlet(np.ones(size))
    low, high = generator.integers(0, 3, size).astype(float), generator.integers(4, 9, size).astype(float)
    budget = generator.uniform(share @ low + 0.1, share @ high)
    found = project(bits, share, low, high, budget)
    slow = minimize(
        lambda x: share @ (x - bits) ** 2,
        np.clip(low, low, high),
        jac=lambda x: 2 * share * (x - bits),
        bounds=list(zip(low, high, strict=True)),
        constraints=[{"type": "ineq", "fun": lambda x: budget - share @ x, "jac": lambda _x: -share}],
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 500},
    )
    assert slow.success
    assert found == pytest.approx(slow.x, abs=2e-3)
    assert share @ (found - bits) ** 2 <= slow.fun + 1e-4


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10_000), budget=st.floats(0, 8))
def test_projected_bits_keep_limits_and_budget_and_projecting_again_changes_nothing(
    seed: int, budget: float
) -> None:
    generator = np.random.default_rng(seed)
    size = int(generator.integers(1, 30))
    bits, share = generator.uniform(-3, 12, size), generator.dirichlet(np.ones(size))
    low, high = np.zeros(size), np.full(size, 8.0)
    found = project(bits, share, low, high, budget)
    assert (found >= low).all() and (found <= high).all()
    assert share @ found <= budget + 1e-5
    assert project(found, share, low, high, budget) == pytest.approx(found, abs=1e-4)


# --- learning ------------------------------------------------------------------------------------


def learner(
    model: nn.Module,
    *,
    bits: Any,
    budget: float,
    how: str = "fracbits",
    low: Any = 0,
    high: Any = 8,
    rate: float = 0.1,
    counted: Any = None,
) -> tuple[LearnedBits, UnitTable]:
    units = list_units(model, granularity="channel")
    steps = {}
    for layer in units.layers:
        weight = model.get_submodule(layer.name).weight.detach()
        steps[layer.name] = choose_steps(weight.reshape(layer.num_units, -1), tuple(range(9)), rule="absmax")
    spread = np.ones(units.num_units, dtype=np.int64)
    attach_quantisers(model, units, steps, spread * bits, learn_bits=how)
    learned = LearnedBits(
        model,
        units,
        counted_u=units.num_weights_u if counted is None else np.array(counted),
        lowest_u=spread * low,
        highest_u=spread * high,
        budget_bits=budget,
        learning_rate=rate,
    )
    return learned, units


def push(learned: LearnedBits, gradient: torch.Tensor, *, moves: int) -> None:
    """The same gradient in every training step, for so many moves of the bits."""
    for _ in range(moves * STEPS_GATHERED):
        gathered = learned.parameters[0].grad
        learned.parameters[0].grad = gradient.clone() if gathered is None else gathered + gradient
        learned.step(rate_frac=1.0)


@pytest.mark.parametrize("how", ["fracbits", "lsq"])
def test_bits_rise_where_the_task_needs_them_and_fall_where_it_does_not(how: str) -> None:
    """Two kinds of rows in one layer: the output of the first half counts, that of the second does not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 8, bias=False))
    target = model[0].weight.detach().clone()
    learned, _ = learner(model, bits=4, budget=4.0, how=how)
    for _ in range(150):
        image = torch.randn(64, 30)
        error = (model(image) - image @ target.T)[:, :4].square().mean()
        error.backward()
        learned.step(rate_frac=1.0)
    found = learned.values()
    assert (found[:4] > 4.5).all() and (found[4:] < 3.5).all()
    assert found.mean() <= 4 + 1e-4


def test_a_step_never_leaves_the_budget_and_the_limits() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 4))
    learned, units = learner(model, bits=3, budget=3.2, low=1, high=6, rate=2.0)
    share = units.num_weights_u / units.num_weights_u.sum()
    for step in range(60):
        model(torch.randn(16, 10)).square().sum().backward()
        learned.step(rate_frac=1.0)
        found = learned.values()
        assert share @ found <= 3.2 + 1e-5
        assert (found >= 1).all() and (found <= 6).all()
        assert float(learned.mean_bits().detach()) == pytest.approx(share @ found, rel=1e-5)
        used = (step + 1) % STEPS_GATHERED == 0
        assert all((parameter.grad is None) == used for parameter in learned.parameters)


def test_no_unit_moves_further_than_a_quarter_bit_before_projection() -> None:
    model = nn.Sequential(nn.Linear(10, 6))
    learned, _ = learner(model, bits=4, budget=8.0, rate=100.0)
    before = learned.values()
    push(learned, torch.tensor([1.0, -1.0, 1e-3, 0.0, 50.0, -50.0]), moves=3)
    assert np.abs(learned.values() - before).max() == pytest.approx(0.25)
    assert learned.values()[3] == before[3]


def test_the_size_of_the_loss_does_not_change_the_steps() -> None:
    paths = []
    for factor in (1.0, 1e4):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 6))
        learned, _ = learner(model, bits=4, budget=4.0)
        for _ in range(10 * STEPS_GATHERED):
            (factor * model(torch.randn(8, 10)).square().sum()).backward()
            learned.step(rate_frac=1.0)
        paths.append(learned.values())
    assert np.abs(paths[0] - 4).max() > 0.01
    assert paths[0] == pytest.approx(paths[1], abs=1e-4)


def test_the_gradient_of_a_pinned_unit_does_not_slow_the_others_down() -> None:
    paths = []
    for pinned_gradient in (0.0, 1e6):
        model = nn.Sequential(nn.Linear(10, 3))
        learned, _ = learner(model, bits=[4, 4, 4], budget=8.0, low=[0, 0, 4], high=[8, 8, 4])
        push(learned, torch.tensor([1.0, -1.0, pinned_gradient]), moves=6)
        paths.append(learned.values())
    assert paths[0].tolist() == paths[1].tolist()
    assert paths[0][0] < 4 < paths[0][1] and paths[0][2] == 4


def test_a_unit_whose_gradient_is_noise_stays_while_one_with_a_steady_gradient_moves() -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 200))
    learned, _ = learner(model, bits=4, budget=8.0, rate=0.02)
    for _ in range(40):
        noise = torch.randn(200, generator=generator)
        noise[:100] = -0.5  # half of the noise's size, but always the same way
        push(learned, noise, moves=1)
    moved = learned.values() - 4
    assert moved[:100].min() > 0.5
    # Following the mean of noise as it is, these walk 0.34 bits (root mean square).
    assert np.sqrt(np.square(moved[100:]).mean()) < 0.1


def test_units_move_by_their_gradient_a_weight() -> None:
    """A unit of four times the weights needs four times the gradient for the same move."""
    model = nn.Sequential(nn.Linear(40, 1, bias=False), nn.Linear(10, 1, bias=False))
    learned, units = learner(model, bits=4, budget=8.0, rate=0.02)
    assert units.num_weights_u.tolist() == [40, 10]
    for _ in range(6 * STEPS_GATHERED):
        for parameter, gradient in zip(learned.parameters, (4.0, 1.0), strict=True):
            parameter.grad = torch.tensor([gradient]) + (0.0 if parameter.grad is None else parameter.grad)
        learned.step(rate_frac=1.0)
    wide, narrow = learned.values()
    assert wide < 3.95 and wide == pytest.approx(narrow, abs=1e-5)


def test_a_budget_counts_what_is_left_in_the_file_and_the_log_the_whole_network() -> None:
    model = nn.Sequential(nn.Linear(10, 4, bias=False))
    learned, _ = learner(model, bits=[2, 2, 6, 6], budget=3.0, counted=[9, 9, 3, 3])
    push(learned, torch.tensor([-1.0, -1.0, -1.0, -1.0]), moves=8)
    counted_u = np.array([9, 9, 3, 3])
    assert counted_u @ learned.values() / 24 == pytest.approx(3.0, abs=1e-4)
    assert learned.whole_mean_bits() == pytest.approx(learned.values().mean())
    assert learned.whole_mean_bits() > 3.2
    bits_u = learned.round_under_budget()
    assert counted_u @ bits_u <= 3.0 * 24
    fewer_u = learned.round_under_budget(less_bits=0.5)
    assert counted_u @ fewer_u <= 2.5 * 24 < counted_u @ bits_u


def test_the_first_gradient_alone_moves_nothing() -> None:
    learned, _ = learner(nn.Sequential(nn.Linear(10, 3)), bits=4, budget=8.0)
    push(learned, torch.tensor([1.0, -1.0, 3.0]), moves=1)
    assert learned.values() == pytest.approx([4, 4, 4], abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), budget=st.floats(1, 7))
def test_rounding_never_exceeds_the_budget_and_moves_a_unit_by_little(seed: int, budget: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(7, 9), nn.Linear(9, 5))
    learned, units = learner(model, bits=1, budget=budget)
    free = project_on_budget(
        8 * torch.rand(14, generator=generator), learned.share_u, learned.lowest_u, learned.highest_u, budget
    )
    _store(learned, free)
    bits = learned.round_under_budget()
    weights = units.num_weights_u
    assert int(weights @ bits) <= budget * int(weights.sum()) * (1 + 1e-12)
    assert np.abs(bits - learned.values()).max() <= 2.0
    assert np.abs(bits - learned.values()).mean() <= 0.6


def _store(learned: LearnedBits, bits_u: torch.Tensor) -> None:
    with torch.no_grad():
        learned._store(bits_u)


def test_rounding_keeps_whole_bits_and_pinned_units() -> None:
    model = nn.Sequential(nn.Linear(7, 4))
    learned, _ = learner(model, bits=[8, 2, 3, 4], budget=4.25, low=[8, 2, 0, 0], high=[8, 2, 8, 8])
    assert learned.round_under_budget().tolist() == [8, 2, 3, 4]


def test_bits_that_the_rate_has_pulled_below_the_budget_stay_below() -> None:
    model = nn.Sequential(nn.Linear(7, 4))
    learned, _ = learner(model, bits=[2, 2, 3, 3], budget=6.0)
    assert learned.round_under_budget().tolist() == [2, 2, 3, 3]


def test_bits_that_are_not_finite_fail_the_trial() -> None:
    model = nn.Sequential(nn.Linear(7, 4))
    learned, _ = learner(model, bits=3, budget=4.0)
    _store(learned, torch.tensor([3.0, torch.nan, 3.0, 3.0]))
    with pytest.raises(TrialError, match="learned bits are not finite; lower bit_learning_rate"):
        learned.round_under_budget()
