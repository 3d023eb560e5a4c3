"""Quantisers on a model: what they compute, how bits and steps learn, and taking them off again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fqsweep.quant import fake_quantize, pack_weights, unpack_weights
from fqsweep.quant.convert import (
    LearnedBitsWeight,
    attach_quantisers,
    detach_quantisers,
    freeze_bits,
    quantisers_of,
)
from fqsweep.quant.steps import choose_steps
from fqsweep.quant.units import UnitTable, list_units

ALL = tuple(range(9))


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Flatten(),
        nn.Linear(16, 2),
    )


def steps_of(model: nn.Module, units: UnitTable, *, choices: tuple[int, ...] = ALL) -> dict[str, torch.Tensor]:
    """Abs-max steps, NaN at widths that are no choice, as importance gives them."""
    steps = {}
    for layer in units.layers:
        weight_un = model.get_submodule(layer.name).weight.detach().reshape(layer.num_units, -1)
        full = torch.full((layer.num_units, 9), torch.nan)
        full[:, list(choices)] = choose_steps(weight_un, choices, rule="absmax")
        steps[layer.name] = full
    return steps


def one_layer(
    weight: torch.Tensor,
    bits: list[int],
    how: str,
    *,
    choices: tuple[int, ...] = ALL,
    mix_temperature: float = 1.0,
) -> LearnedBitsWeight:
    full = torch.full((len(weight), 9), torch.nan)
    full[:, list(choices)] = choose_steps(weight, choices, rule="absmax")
    return LearnedBitsWeight(
        full, torch.tensor(bits), bit_gradient=how, smallest=choices[0], mix_temperature=mix_temperature
    )


def losses_around(loss: Callable[[], torch.Tensor], bits: nn.Parameter, unit: int, eps: float) -> float:
    """Central difference of the loss along one unit's bits."""
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            bits[unit] += sign * eps
            values.append(float(loss()))
            bits[unit] -= sign * eps
    return (values[0] - values[1]) / (2 * eps)


# --- whole widths --------------------------------------------------------------------------------


def test_a_quantised_model_computes_with_fake_quantised_weights() -> None:
    model, plain = small().eval(), small().eval()
    units = list_units(model, granularity="channel")
    bits = np.arange(units.num_units) % 9
    attach_quantisers(model, units, steps_of(model, units), bits)
    for name, layer_bits in units.split(bits).items():
        layer = plain.get_submodule(name)
        layer.weight.data = fake_quantize(layer.weight.data, torch.from_numpy(layer_bits))
    image = torch.randn(2, 3, 6, 6)
    assert torch.allclose(model(image), plain(image), atol=1e-6)


def test_taking_quantisers_off_leaves_a_plain_model_with_the_same_output() -> None:
    model = small().eval()
    units = list_units(model, granularity="channel")
    bits = np.arange(units.num_units) % 9
    attach_quantisers(model, units, steps_of(model, units), bits)
    for quantiser in quantisers_of(model).values():
        quantiser.log_gain_u.data.normal_(0, 0.3)
    image = torch.randn(2, 3, 6, 6)
    before = model(image)
    state = detach_quantisers(model)
    assert quantisers_of(model) == {}
    assert torch.equal(model(image), before)
    assert set(state.tensors) == set(small().state_dict())
    assert np.array_equal(units.join(state.bits), bits)


def test_what_was_taken_off_is_packed_bit_for_bit() -> None:
    model = small()
    units = list_units(model, granularity="channel")
    bits = np.arange(units.num_units) % 9
    attach_quantisers(model, units, steps_of(model, units), bits)
    for quantiser in quantisers_of(model).values():
        quantiser.log_gain_u.data.normal_(0, 0.3)
    state = detach_quantisers(model)
    found = unpack_weights(
        pack_weights(
            state.tensors,
            {f"{name}.weight": b for name, b in state.bits.items()},
            steps={f"{name}.weight": s for name, s in state.steps.items()},
        )
    )
    assert all(torch.equal(found[name], tensor) for name, tensor in state.tensors.items())


def test_whole_tensors_can_be_units() -> None:
    model = small()
    units = list_units(model, granularity="tensor")
    attach_quantisers(model, units, steps_of(model, units), np.array([2, 0, 8]))
    assert len(torch.unique(model[0].weight)) <= 3
    assert (model[3].weight == 0).all()


def test_a_step_of_training_moves_weights_and_steps_and_nothing_moves_where_a_unit_is_dropped() -> None:
    model = small()
    units = list_units(model, granularity="channel")
    bits = np.full(units.num_units, 3)
    bits[0] = 0
    attach_quantisers(model, units, steps_of(model, units), bits)
    model(torch.randn(4, 3, 6, 6)).square().sum().backward()
    quantiser = quantisers_of(model)["0"]
    gradient = model[0].parametrizations.weight.original.grad
    assert (gradient[0] == 0).all() and quantiser.log_gain_u.grad[0] == 0
    assert (gradient[1:] != 0).any() and (quantiser.log_gain_u.grad[1:] != 0).all()


def test_the_gains_gradient_is_the_true_one_where_weights_are_clipped() -> None:
    weight = torch.tensor([[3.0, -2.5, 4.0]])
    quantiser = one_layer(weight, [3], "fracbits")
    quantiser.step_ub[:, 3] = 0.5
    slope = torch.tensor([[1.0, 0.5, -0.25]])

    def loss() -> torch.Tensor:
        return (quantiser(weight) * slope).sum()

    loss().backward()
    assert quantiser.log_gain_u.grad is not None
    assert float(quantiser.log_gain_u.grad) == pytest.approx(
        losses_around(loss, quantiser.log_gain_u, 0, 1e-3), rel=1e-3
    )


# --- learned bits --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["fracbits", "lsq"])
@pytest.mark.parametrize("bits", range(9))
def test_at_whole_widths_the_learned_quantiser_is_the_plain_one(how: str, bits: int) -> None:
    weight = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    quantised = one_layer(weight, [bits] * 3, how)(weight)
    assert torch.allclose(quantised, fake_quantize(weight, bits), rtol=1e-6, atol=1e-6)


def test_between_widths_fracbits_mixes_the_two_grids() -> None:
    weight = torch.randn(2, 20, generator=torch.Generator().manual_seed(0))
    quantiser = one_layer(weight, [3, 3], "fracbits")
    quantiser.free_bits_u.data = torch.tensor([3.25, 3.75])
    low, high = fake_quantize(weight, 3), fake_quantize(weight, 4)
    assert torch.allclose(quantiser(weight)[0], 0.75 * low[0] + 0.25 * high[0], atol=1e-6)
    assert torch.allclose(quantiser(weight)[1], 0.25 * low[1] + 0.75 * high[1], atol=1e-6)


def test_at_a_lower_temperature_the_mix_leans_to_the_nearer_grid_and_keeps_its_slope() -> None:
    weight = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
    quantiser = one_layer(weight, [3] * 4, "fracbits", mix_temperature=0.5)
    quantiser.free_bits_u.data = torch.tensor([3.0, 3.25, 3.75, 4.0])
    low, high = fake_quantize(weight, 3), fake_quantize(weight, 4)
    # 1/4 and 3/4 squared: 1 to 9.
    share = torch.tensor([0.0, 0.1, 0.9, 1.0])[:, None]
    quantised = quantiser(weight)
    assert torch.allclose(quantised, (1 - share) * low + share * high, atol=1e-6)
    (slope_u,) = torch.autograd.grad(quantised.sum(), quantiser.free_bits_u)
    # At a whole width the pair is that width and the next.
    known = [(low, high), (low, high), (low, high), (high, fake_quantize(weight, 5))]
    wanted = [float((above - below)[unit].sum()) for unit, (below, above) in enumerate(known)]
    assert slope_u.tolist() == pytest.approx(wanted, abs=1e-5)


def test_between_widths_lsq_uses_the_nearest_grid() -> None:
    weight = torch.randn(2, 20, generator=torch.Generator().manual_seed(0))
    quantiser = one_layer(weight, [3, 3], "lsq")
    quantiser.free_bits_u.data = torch.tensor([3.25, 3.75])
    assert torch.equal(quantiser(weight)[0], fake_quantize(weight, 3)[0])
    assert torch.equal(quantiser(weight)[1], fake_quantize(weight, 4)[1])


@pytest.mark.parametrize("start", [0.5, 1.5, 2.3, 4.6, 7.5])
def test_fracbits_gradient_is_the_finite_difference_of_the_loss(start: float) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, slope = torch.randn(4, 15, generator=generator), torch.randn(4, 15, generator=generator)
    quantiser = one_layer(weight, [1] * 4, "fracbits")
    quantiser.free_bits_u.data.fill_(start)

    def loss() -> torch.Tensor:
        return (quantiser(weight) * slope).sum() + quantiser(weight).square().sum()

    loss().backward()
    assert quantiser.free_bits_u.grad is not None
    for unit in range(4):
        difference = losses_around(loss, quantiser.free_bits_u, unit, 0.02)
        assert float(quantiser.free_bits_u.grad[unit]) == pytest.approx(difference, rel=1e-2, abs=1e-3)


def test_lsq_gradient_is_the_published_formula() -> None:
    generator = torch.Generator().manual_seed(2)
    weight, slope = torch.randn(3, 30, generator=generator), torch.randn(3, 30, generator=generator)
    quantiser = one_layer(weight, [3] * 3, "lsq")
    bits = torch.tensor([2.2, 4.4, 6.9])
    quantiser.free_bits_u.data = bits
    quantised = quantiser(weight)
    (quantised * slope).sum().backward()
    levels = 2 ** (bits - 1)
    wanted = ((quantised.detach() - weight) * slope).sum(dim=1) * (-np.log(2) * levels / (levels - 1))
    assert quantiser.free_bits_u.grad is not None
    assert torch.allclose(quantiser.free_bits_u.grad, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["fracbits", "lsq"])
def test_the_bits_gradient_says_that_more_bits_help_a_loss_that_rounding_hurts(how: str) -> None:
    """Loss: squared distance from the unquantised weights. Going one bit up lowers it for every unit."""
    weight = torch.randn(40, 60, generator=torch.Generator().manual_seed(3))
    agree = 0
    for bits in (2, 3, 4, 5):
        quantiser = one_layer(weight, [bits] * 40, how)
        (quantiser(weight) - weight).square().sum().backward()
        assert quantiser.free_bits_u.grad is not None
        up = (fake_quantize(weight, bits + 1) - weight).square().sum(dim=1)
        here = (fake_quantize(weight, bits) - weight).square().sum(dim=1)
        agree += int((torch.sign(quantiser.free_bits_u.grad) == torch.sign(up - here)).sum())
    assert agree >= 0.95 * 160


@pytest.mark.parametrize("how", ["fracbits", "lsq"])
def test_every_width_of_a_model_has_a_gradient_from_the_task(how: str) -> None:
    model = small()
    units = list_units(model, granularity="channel")
    attach_quantisers(model, units, steps_of(model, units), np.full(units.num_units, 3), learn_bits=how)
    model(torch.randn(8, 3, 6, 6)).square().sum().backward()
    for quantiser in quantisers_of(model).values():
        assert isinstance(quantiser, LearnedBitsWeight)
        assert quantiser.free_bits_u.grad is not None
        assert (quantiser.free_bits_u.grad != 0).all()


@pytest.mark.parametrize("how", ["fracbits", "lsq"])
@pytest.mark.parametrize("pinned", [0, 1, 8])
def test_a_width_pinned_beside_the_choices_is_used_as_it_is(how: str, pinned: int) -> None:
    choices = tuple(sorted({3, 4, 5, pinned}))
    weight = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    quantiser = one_layer(weight, [4, pinned, 5], how, choices=choices)
    quantised = quantiser(weight)
    quantised.sum().backward()
    assert torch.allclose(quantised, fake_quantize(weight, torch.tensor([4, pinned, 5])), rtol=1e-6, atol=1e-6)
    assert quantiser.free_bits_u.grad is not None and torch.isfinite(quantiser.free_bits_u.grad).all()
    assert quantiser.log_gain_u.grad is not None and torch.isfinite(quantiser.log_gain_u.grad).all()


@pytest.mark.parametrize("how", ["fracbits", "lsq"])
def test_freezing_keeps_weights_and_gains_and_makes_the_widths_whole(how: str) -> None:
    model = small()
    units = list_units(model, granularity="channel")
    attach_quantisers(model, units, steps_of(model, units), np.full(units.num_units, 3), learn_bits=how)
    for quantiser in quantisers_of(model).values():
        quantiser.log_gain_u.data.fill_(0.1)
    gains = {name: quantiser.log_gain_u for name, quantiser in quantisers_of(model).items()}
    bits = np.arange(units.num_units) % 9
    freeze_bits(model, units, bits)
    for name, quantiser in quantisers_of(model).items():
        assert not isinstance(quantiser, LearnedBitsWeight)
        assert quantiser.log_gain_u is gains[name]
    assert np.array_equal(units.join(detach_quantisers(model).bits), bits)


def test_attaching_changes_neither_steps_nor_bits_that_were_given() -> None:
    model = small()
    units = list_units(model, granularity="channel")
    steps: Any = steps_of(model, units, choices=(2, 3, 8))
    before = {name: step.clone() for name, step in steps.items()}
    bits = np.full(units.num_units, 2)
    attach_quantisers(model, units, steps, bits, learn_bits="fracbits", smallest=2)
    assert all(torch.equal(steps[name].isnan(), step.isnan()) for name, step in before.items())
    assert (bits == 2).all()
