"""The quantiser: levels, steps and gradients, by hand and by finite differences.

Axes: u units, n weights of a unit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fqsweep.quant import fake_quantize
from fqsweep.quant.grid import quantise_units
from fqsweep.quant.levels import LIMIT_BY_BITS, absmax_steps, limits_of, round_to_levels


def nearest_level(weight: float, step: float, bits: int) -> float:
    """The nearest grid point by trying all of them; ties go to the even level as rounding does."""
    if bits == 0:
        return 0.0
    if bits == 1:
        return step / 2 if weight >= 0 else -step / 2
    top = 2 ** (bits - 1) - 1
    return min((k * step for k in range(-top, top + 1)), key=lambda level: abs(weight - level))


def test_two_to_eight_bits_have_odd_numbers_of_levels_and_one_bit_two() -> None:
    assert LIMIT_BY_BITS == (0, 0.5, 1, 3, 7, 15, 31, 63, 127)


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (0, [0.0, 0.0, 0.0, 0.0]),
        (1, [0.5, -0.5, 0.5, -0.5]),
        (2, [0.9, -0.9, 0.0, 0.0]),
        (3, [0.9, -0.6, 0.3, -0.3]),
    ],
)
def test_hand_computed_values(bits: int, expected: list[float]) -> None:
    weight = torch.tensor([[0.9, -0.6, 0.2, -0.3]])
    assert fake_quantize(weight, bits)[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("bits", range(9))
def test_every_weight_goes_to_its_nearest_level(bits: int) -> None:
    weight = torch.randn(5, 31, generator=torch.Generator().manual_seed(bits))
    step = absmax_steps(weight, torch.full((5,), bits))
    quantised = fake_quantize(weight, bits)
    for u in range(5):
        for n in range(31):
            wanted = nearest_level(float(weight[u, n]), float(step[u]), bits)
            assert float(quantised[u, n]) == pytest.approx(wanted, rel=1e-5, abs=1e-7)


def test_channels_keep_their_own_widths_and_scales() -> None:
    weight = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    bits = torch.tensor([0, 1, 3, 8])
    mixed = fake_quantize(weight, bits)
    for channel, width in enumerate(bits.tolist()):
        assert torch.equal(mixed[channel : channel + 1], fake_quantize(weight[channel : channel + 1], width))
    scaled = fake_quantize(weight * torch.tensor([1.0, 10.0, 1.0, 0.1])[:, None, None, None], bits)
    assert torch.allclose(scaled[1], 10 * mixed[1]) and torch.allclose(scaled[3], 0.1 * mixed[3], atol=1e-7)


@settings(max_examples=80, deadline=None)
@given(bits=st.integers(0, 8), seed=st.integers(0, 1000), size=st.integers(1, 20))
def test_quantising_twice_is_quantising_once(bits: int, seed: int, size: int) -> None:
    weight = torch.randn(3, size, generator=torch.Generator().manual_seed(seed))
    once = fake_quantize(weight, bits)
    twice = fake_quantize(once, bits)
    if bits == 1:
        # The mean of equal magnitudes may differ from them in the last place.
        assert torch.allclose(twice, once, rtol=1e-6, atol=0)
    else:
        assert torch.equal(twice, once)


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(2, 8), seed=st.integers(0, 1000))
def test_the_error_is_at_most_half_a_step(bits: int, seed: int) -> None:
    weight = torch.randn(4, 9, generator=torch.Generator().manual_seed(seed))
    half_u1 = absmax_steps(weight, torch.full((4,), bits)) / 2
    assert ((fake_quantize(weight, bits) - weight).abs() <= half_u1 * (1 + 1e-5)).all()


@settings(max_examples=40, deadline=None)
@given(bits=st.integers(0, 8), seed=st.integers(0, 1000))
def test_quantising_is_odd_in_the_weights(bits: int, seed: int) -> None:
    weight = torch.randn(4, 9, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(fake_quantize(-weight, bits), -fake_quantize(weight, bits))


@pytest.mark.parametrize("bits", range(9))
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (3, 1, 1, 1), (5,)])
def test_one_weight_a_channel_is_kept_exactly_where_it_has_bits(bits: int, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    quantised = fake_quantize(weight, bits)
    assert quantised.shape == weight.shape
    assert torch.allclose(quantised, weight if bits else torch.zeros(shape), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", range(9))
def test_a_channel_of_zeros_stays_zero_with_finite_gradients(bits: int) -> None:
    weight = torch.zeros(2, 4, requires_grad=True)
    quantised = fake_quantize(weight, bits)
    quantised.sum().backward()
    assert (quantised == 0).all()
    assert weight.grad is not None and torch.isfinite(weight.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_type_is_kept(dtype: torch.dtype) -> None:
    assert fake_quantize(torch.randn(2, 3).to(dtype), 4).dtype == dtype


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0,)])
def test_an_empty_tensor_stays_empty(shape: tuple[int, ...]) -> None:
    assert fake_quantize(torch.zeros(shape), 4).shape == shape


@pytest.mark.parametrize(
    ("weight", "bits", "message"),
    [
        (torch.zeros(2, 3), 9, r"bits must lie in 0..8, got 9 to 9"),
        (torch.zeros(2, 3), -1, r"bits must lie in 0..8"),
        (
            torch.zeros(2, 3),
            torch.tensor([1, 2, 3]),
            r"bits must be one number or 2 .one per channel., got shape",
        ),
        (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.long), "one per channel"),
        (torch.zeros(2, 3), 2.5, "bits must be whole numbers, got torch.float32"),
        (torch.zeros(2, 3), True, "bits must be whole numbers, got torch.bool"),
        (torch.zeros(2, 3, dtype=torch.long), 4, "weight must be a float tensor .* got torch.int64"),
        (torch.tensor(1.0), 4, "output-channel axis"),
    ],
)
def test_unusable_input_is_refused(weight: torch.Tensor, bits: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fake_quantize(weight, bits)


# --- gradients -----------------------------------------------------------------------------------


def quantise(weight: torch.Tensor, step: torch.Tensor, bits: list[int]) -> torch.Tensor:
    return quantise_units(weight, step, torch.tensor(bits))


def test_the_gradient_passes_inside_the_range_and_stops_outside() -> None:
    weight = torch.tensor([[0.4, -1.2, 3.0, 3.2, -5.0]], requires_grad=True)
    quantise(weight, torch.ones(1, 1), [3]).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[1, 1, 1, 0, 0]]


def test_at_one_bit_every_weight_has_a_gradient_and_at_zero_bits_none() -> None:
    weight = torch.tensor([[0.4, -50.0], [0.4, -50.0]], requires_grad=True)
    quantise(weight, torch.tensor([[1.0], [0.0]]), [1, 0]).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[1, 1], [0, 0]]


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_steps_gradient_is_the_straight_through_one_in_closed_form(bits: int) -> None:
    """Esser et al. 2020, eq. 3: round(w/s) - w/s inside the range, the outermost level outside."""
    generator = torch.Generator().manual_seed(bits)
    weight = 2 * torch.randn(3, 40, generator=generator)
    slope = torch.randn(3, 40, generator=generator)
    limit = LIMIT_BY_BITS[bits]
    step = torch.full((3, 1), 1.5 / max(limit, 1), requires_grad=True)
    (quantise(weight, step, [bits] * 3) * slope).sum().backward()
    ratio = weight / step.detach()
    level = round_to_levels(weight, step.detach(), *limits_of(torch.full((3,), bits)))
    inside = (ratio.abs() <= limit) if bits >= 2 else torch.zeros_like(ratio, dtype=torch.bool)
    wanted = (slope * torch.where(inside, level - ratio, level)).sum(dim=1, keepdim=True)
    assert step.grad is not None
    assert torch.allclose(step.grad, wanted, rtol=1e-4, atol=1e-4)


def test_the_steps_gradient_of_clipped_weights_is_the_true_derivative() -> None:
    weight = torch.tensor([[9.0, -8.0, 7.5]])
    slope = torch.tensor([[1.0, 2.0, -0.5]])
    step = torch.tensor([[0.5]], requires_grad=True)
    (quantise(weight, step, [3]) * slope).sum().backward()
    eps = 1e-3
    difference = [(quantise(weight, torch.tensor([[0.5 + sign * eps]]), [3]) * slope).sum() for sign in (1, -1)]
    assert step.grad is not None
    assert float(step.grad) == pytest.approx(float(difference[0] - difference[1]) / (2 * eps), rel=1e-3)


def test_inputs_are_not_changed() -> None:
    weight, step = torch.randn(2, 5), torch.full((2, 1), 0.1)
    before = weight.clone(), step.clone()
    quantise(weight, step, [3, 0])
    fake_quantize(weight, torch.tensor([1, 2]))
    assert torch.equal(weight, before[0]) and torch.equal(step, before[1])
