"""The quantiser's arithmetic: compiled equals eager, one compilation serves all shapes, and nothing waits."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fqsweep.quant.at_once import AtOnce
from fqsweep.quant.at_once_native import NativeBuildError, load_library
from fqsweep.quant.baq import LearnedBits
from fqsweep.quant.convert import attach_quantisers
from fqsweep.quant.kernels import (
    COMPILING_PAYS_FROM_WEIGHTS,
    EAGER,
    NATIVE,
    Kernels,
    _compiled,
    _or_eager,
    choose_kernels,
)
from fqsweep.quant.levels import absmax_steps, limits_of
from fqsweep.quant.steps import choose_steps
from fqsweep.quant.units import list_units
from fqsweep.training import GroupRegulariser

CPU = torch.device("cpu")
SHAPES = [(64, 147), (10, 9), (33, 1152), (7, 64), (512, 20)]


def inputs_of(num_units: int, num_weights: int) -> tuple[torch.Tensor, ...]:
    """Weights, a gradient, a share and grids of all widths 0 to 8, neighbours above them."""
    generator = torch.Generator().manual_seed(num_units)
    weight = torch.randn(num_units, num_weights, generator=generator)
    gradient = torch.randn(num_units, num_weights, generator=generator)
    share = torch.rand(num_units, 1, generator=generator)
    low = torch.arange(num_units) % 8
    grids = [g for bits in (low, low + 1) for g in (absmax_steps(weight, bits) * 0.7, *limits_of(bits))]
    return weight, gradient, share, *grids


def outcome(kernels: Kernels, weight, gradient, share, *grids) -> list[torch.Tensor]:
    quantised = kernels.quantise(weight, *grids[3:])
    return [
        quantised,
        *kernels.quantise_backward(gradient, weight, quantised, *grids[3:]),
        kernels.mix(weight, share, *grids),
        *kernels.mix_backward(gradient, weight, share, *grids),
    ]


@pytest.fixture(scope="module")
def compiled() -> Kernels:
    kernels, remark = choose_kernels("compiled", CPU, num_weights=1, num_steps=1, at_once=False)
    if kernels is EAGER:
        pytest.skip(remark)
    return kernels


@pytest.mark.slow
def test_compiled_kernels_agree_with_eager_ones_and_serve_every_shape_with_one_compilation(
    compiled: Kernels,
) -> None:
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in SHAPES:
            given = inputs_of(*shape)
            for eager, fused in zip(outcome(EAGER, *given), outcome(compiled, *given), strict=True):
                assert torch.allclose(eager, fused, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compiled_kernels_take_tensors_of_any_stride(compiled: Kernels) -> None:
    weight, gradient, share, *grids = inputs_of(16, 24)
    turned = gradient.T.contiguous().T
    assert not turned.is_contiguous()
    for eager, fused in zip(
        outcome(EAGER, weight, gradient, share, *grids),
        outcome(compiled, weight, turned, share, *grids),
        strict=True,
    ):
        assert torch.allclose(eager, fused, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("at_once", [False, True])
def test_without_a_compiler_the_eager_kernels_serve_and_say_so(
    monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    _compiled.cache_clear()
    load_library.cache_clear()
    try:
        kernels, remark = choose_kernels("compiled", CPU, num_weights=1, num_steps=1, at_once=at_once)
    finally:
        _compiled.cache_clear()
        load_library.cache_clear()
    assert kernels is EAGER
    assert "no C++ compiler found" in remark and "eager ones serve" in remark


def test_a_shape_that_does_not_compile_costs_speed_and_not_the_trial(caplog: pytest.LogCaptureFixture) -> None:
    tried: list[int] = []

    def compiled(weight: torch.Tensor, *grid: torch.Tensor) -> torch.Tensor:
        tried.append(len(weight))
        if len(weight) == 1:
            raise RuntimeError("no code for one unit")
        return EAGER.quantise(weight, *grid)

    safe = _or_eager(compiled, EAGER.quantise)
    generator = torch.Generator().manual_seed(0)
    for units in (4, 1, 1, 4):
        weight = torch.randn(units, 6, generator=generator)
        grid = (torch.full((units, 1), 0.3), torch.full((units, 1), 3.0), torch.zeros(units, 1))
        assert torch.equal(safe(weight, *grid), EAGER.quantise(weight, *grid))
    assert tried == [4, 1], "once it failed, it is not tried again"
    assert [record.getMessage() for record in caplog.records] == [
        "quantise does not compile; its eager kernel serves, slower"
    ]


def test_without_memory_nothing_is_tried_that_takes_more() -> None:
    def compiled(*_tensors: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        _or_eager(compiled, EAGER.quantise)(torch.ones(2, 2))


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_nothing_is_compiled_for_a_model_that_is_not_trained(device: str, at_once: bool) -> None:
    for wanted in ("auto", "compiled"):
        chosen = choose_kernels(wanted, torch.device(device), num_weights=10**9, num_steps=0, at_once=at_once)
        assert chosen == (EAGER, "")


def test_of_all_layers_at_once_on_a_cpu_any_training_is_native_and_eager_ones_can_be_asked_for() -> None:
    try:
        load_library()
    except NativeBuildError as error:
        pytest.skip(str(error))
    for wanted in ("auto", "compiled"):
        assert choose_kernels(wanted, CPU, num_weights=1, num_steps=1, at_once=True) == (NATIVE, "")
    assert choose_kernels("eager", CPU, num_weights=1, num_steps=1, at_once=True) == (EAGER, "")


def test_auto_compiles_layer_by_layer_on_a_cpu_only_for_long_training(monkeypatch: pytest.MonkeyPatch) -> None:
    num_steps = COMPILING_PAYS_FROM_WEIGHTS // 1001
    assert choose_kernels("auto", CPU, num_weights=1000, num_steps=num_steps, at_once=False) == (EAGER, "")
    compiled = Kernels("compiled", *[getattr(EAGER, name) for name in ("quantise", "quantise_backward")] * 2)
    monkeypatch.setattr("fqsweep.quant.kernels._compiled", lambda _device_type: (compiled, ""))
    # ResNet18 in the demo: two epochs of 23 steps.
    chosen = choose_kernels("auto", CPU, num_weights=11_172_160, num_steps=46, at_once=False)
    assert chosen == (compiled, "")


# --- nothing waits for the device ----------------------------------------------------------------


class CountReadings(TorchDispatchMode):
    """Counts operations whose result the host must wait for."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        chooses = name.startswith("index") and any(
            part.dtype == torch.bool
            for indices in args
            if isinstance(indices, list | tuple)
            for part in indices
            if isinstance(part, torch.Tensor)
        )
        counts = name == "repeat_interleave" and isinstance(args[0], torch.Tensor) and kwargs in (None, {})
        if name.startswith(self.WAITING) or chooses or counts:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


WAITS = {
    "_local_scalar_dense": lambda x: float(x[0]),
    "index": lambda x: x[x > 0],
    "index_put_": lambda x: x.index_put_((x > 0,), x[:1]),
    "repeat_interleave": lambda x: x.repeat_interleave(torch.tensor([1, 2])),
}


@pytest.mark.parametrize("name", WAITS)
def test_the_count_sees_a_reading(name: str) -> None:
    with CountReadings() as readings:
        WAITS[name](torch.ones(2))
    assert readings.seen[-1:] == [name]


def test_what_does_not_wait_is_not_counted() -> None:
    with CountReadings() as readings:
        x = torch.ones(4)
        x[torch.tensor([0, 2])] = torch.where(x > 0, x, 2.0)[:2]
    assert readings.seen == []


@pytest.mark.parametrize(
    ("learn", "at_once"),
    [(None, False), ("fracbits", False), ("lsq", False), (None, True), ("fracbits", True)],
)
def test_a_training_step_reads_nothing_back_from_the_device(learn: str | None, at_once: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4))
    units = list_units(model, granularity="channel")
    layers = {layer.name: model.get_submodule(layer.name).weight.detach() for layer in units.layers}
    steps = {
        name: choose_steps(weight.reshape(len(weight), -1), tuple(range(9)), rule="absmax")
        for name, weight in layers.items()
    }
    bits_u = np.arange(units.num_units) % 8
    attach_quantisers(model, units, steps, bits_u, learn_bits=learn)
    bounds = {"lowest_u": np.zeros(units.num_units), "highest_u": np.full(units.num_units, 8)}
    learned = (
        LearnedBits(model, units, counted_u=units.num_weights_u, **bounds, budget_bits=3.0, learning_rate=0.1)
        if learn
        else None
    )
    regulariser = GroupRegulariser("gap", 2)
    optimiser = torch.optim.AdamW(model.parameters(), fused=True)
    image, label, group = torch.randn(6, 3, 6, 6), torch.arange(6) % 4, torch.arange(6) % 2
    together = AtOnce(model) if at_once else None
    with CountReadings() as readings:
        with together.ready() if together is not None else nullcontext():
            loss_b = nn.functional.cross_entropy(model(image), label, reduction="none")
        (loss_b.mean() + regulariser(loss_b, group)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if learned is not None:
            learned.step(rate_frac=1.0)
    assert readings.seen == []
