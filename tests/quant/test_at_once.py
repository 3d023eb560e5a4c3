"""All layers at once give what each layer's own quantiser gives, forward and backward."""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from at_once_check import compare, compare_broken, network
from torch import nn

from fqsweep.quant import at_once_native
from fqsweep.quant.at_once import AtOnce, EachLayer, OneCall, can_launch, can_quantise_at_once
from fqsweep.quant.at_once_native import NativeBuildError, load_library
from fqsweep.quant.blocks import Blocks
from fqsweep.quant.convert import attach_quantisers, quantisers_of
from fqsweep.quant.kernels import NATIVE
from fqsweep.quant.steps import choose_steps
from fqsweep.quant.units import list_units

SCRIPT = Path(__file__).with_name("at_once_check.py")
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def check_on(device: str, **environment: str) -> None:
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), device],
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[2]), **environment},
        text=True,
        capture_output=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "the same as layer by layer" in ended.stdout


@pytest.fixture(scope="module")
def library() -> None:
    try:
        load_library()
    except NativeBuildError as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_all_layers_at_once_are_the_same_as_layer_by_layer() -> None:
    check_on("cpu", TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_all_layers_at_once_are_the_same_as_layer_by_layer_on_a_gpu() -> None:
    check_on("cuda")


@pytest.mark.parametrize("learn", [None, "fracbits"])
@pytest.mark.parametrize("arithmetic", [EachLayer, OneCall])
def test_what_is_not_a_number_stays_so(library: None, arithmetic: type, learn: str | None) -> None:
    compare_broken(CPU, arithmetic=arithmetic, learn=learn)


@pytest.mark.parametrize("learn", [None, "fracbits"])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_loop_over_the_layers_on_a_cpu_is_the_same_too(
    learn: str | None, granularity: str, channels_last: bool
) -> None:
    compare(CPU, arithmetic=EachLayer, learn=learn, granularity=granularity, channels_last=channels_last)


@pytest.mark.parametrize("learn", [None, "fracbits"])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_one_call_on_a_cpu_is_the_same_too(
    library: None, learn: str | None, granularity: str, channels_last: bool
) -> None:
    compare(CPU, arithmetic=OneCall, learn=learn, granularity=granularity, channels_last=channels_last)


def test_a_mix_at_a_temperature_is_the_same_in_one_call(library: None) -> None:
    compare(
        CPU, arithmetic=OneCall, learn="fracbits", granularity="channel", channels_last=False, temperature=0.3
    )


@pytest.fixture
def triton_driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[], object]], None]]:
    """Puts a driver in the place of Triton's own, by what its first question answers."""
    runtime = pytest.importorskip("triton.runtime")

    def put(answer: Callable[[], object]) -> None:
        can_launch.cache_clear()
        monkeypatch.setattr(runtime.driver, "_active", SimpleNamespace(get_current_target=answer))

    yield put
    can_launch.cache_clear()


def test_it_is_there_on_gpus_that_triton_reaches(triton_driver: Callable[[Callable[[], object]], None]) -> None:
    def no_compiler() -> None:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    triton_driver(lambda: "cuda")
    assert can_quantise_at_once(CUDA, bit_gradient=None) and can_quantise_at_once(CUDA, bit_gradient="fracbits")
    triton_driver(no_compiler)
    assert not can_quantise_at_once(CUDA, bit_gradient=None)


def test_it_is_there_for_gradients_that_it_knows() -> None:
    assert not can_quantise_at_once(CUDA, bit_gradient="lsq")
    assert can_quantise_at_once(CPU, bit_gradient=None) and can_quantise_at_once(CPU, bit_gradient="fracbits")
    assert not can_quantise_at_once(CPU, bit_gradient="lsq")


def test_blocks_say_where_each_unit_lies_in_plain_and_channels_last_layout() -> None:
    convolution = nn.Conv2d(3, 4, 2).weight
    last = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last).weight
    blocks = Blocks([convolution, last, nn.Linear(5, 7).weight], [4, 1, 7])
    assert blocks.layer_u.tolist() == [0] * 4 + [1] + [2] * 7
    assert blocks.start_u.tolist() == [0, 12, 24, 36, 0, *range(0, 35, 5)]
    assert blocks.num_u.tolist() == [12] * 4 + [48] + [5] * 7


def test_a_weight_whose_units_are_scattered_in_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="its units are not blocks of memory"):
        Blocks([nn.Linear(5, 7).weight.T], [5])


def test_weights_of_another_precision_are_refused_not_misread(library: None) -> None:
    with pytest.raises(ValueError, match="read as float32"):
        AtOnce(model_of(None).double())


# --- one call ------------------------------------------------------------------------------------


def model_of(learn: str | None, *, channels: int = 5, classes: int = 7) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, channels, 3), nn.ReLU(), nn.Flatten(), nn.Linear(channels * 36, classes))
    units = list_units(model, granularity="channel")
    steps = {
        layer.name: choose_steps(
            model.get_submodule(layer.name).weight.detach().flatten(1), tuple(range(9)), rule="absmax"
        )
        for layer in units.layers
    }
    attach_quantisers(model, units, steps, np.arange(units.num_units) % 8, learn_bits=learn, kernels=NATIVE)
    return model


@pytest.mark.parametrize("learn", [None, "fracbits"])
def test_the_number_of_threads_changes_no_bit(library: None, learn: str | None) -> None:
    model, before = model_of(learn, channels=67, classes=200), torch.get_num_threads()  # weights for 8 threads
    assert isinstance(AtOnce(model).arithmetic, OneCall)
    weights = [parameter for name, parameter in model.named_parameters() if name.endswith("original")]
    rows = [
        torch.rand(67 + 200, 1, generator=torch.Generator().manual_seed(seed))
        for seed in range(7 if learn else 3)
    ]
    found = []
    try:
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            arithmetic = AtOnce(model).arithmetic
            with torch.no_grad():
                if learn:
                    levels = [level.clone() for level in arithmetic.mix(weights, *rows)]
                    grads, grad_rows = arithmetic.mix_backward([x.cos() for x in levels], weights, *rows)
                else:
                    levels = [level.clone() for level in arithmetic.quantise(weights, *rows)]
                    given = [x.cos() for x in levels], weights, ()
                    grads, grad_rows = arithmetic.quantise_backward(*given, *rows)
                found.append([*levels, *grads, *grad_rows])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_an_earlier_graph_cannot_be_gone_through_with_later_levels(library: None) -> None:
    model = model_of(None)
    image = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    at_once = AtOnce(model)
    with at_once.ready():
        earlier = model(image).sum()
    with at_once.ready():
        model(image).sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        earlier.backward()


def test_what_is_not_a_number_or_huge_is_treated_as_layer_by_layer(library: None) -> None:
    model = network(CPU, learn=None, granularity="channel", channels_last=False)
    for quantiser in quantisers_of(model).values():
        quantiser.kernels = NATIVE
    weight = model[0].parametrizations.weight.original  # type: ignore[union-attr]
    with torch.no_grad():
        weight[:, 0, 0, 0] = float("nan")
        weight[:, 0, 0, 1] = float("inf")
        weight[:, 0, 0, 2] = -1e30
    ready = AtOnce(model).quantise()[0]
    torch.testing.assert_close(ready, model[0].weight, rtol=0, atol=0, equal_nan=True)  # type: ignore[arg-type]
    assert ready.isnan().any()


@pytest.fixture
def fresh_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of its own, and a library that is not loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load_library.cache_clear()
    yield tmp_path / "cache" / "fqsweep"
    load_library.cache_clear()


def test_it_is_built_once_a_machine(library: None, fresh_build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_library()
    (built,) = fresh_build.iterdir()
    made = built.stat().st_mtime_ns
    load_library.cache_clear()
    load_library()
    assert built.stat().st_mtime_ns == made
    monkeypatch.setattr(at_once_native, "_processor", lambda: "another one")
    load_library.cache_clear()
    load_library()
    assert len(list(fresh_build.iterdir())) == 2, "a home folder may serve machines of several kinds"


def test_a_cache_that_cannot_be_used_costs_a_second_and_nothing_else(
    library: None, fresh_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_library()
    (built,) = fresh_build.iterdir()
    built.unlink()  # the old one is loaded: to write into it would be to change the running program
    built.write_bytes(b"cut off")
    load_library.cache_clear()
    assert load_library().fqsweep_mix
    fresh_build.parent.joinpath("file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh_build.parent / "file"))
    load_library.cache_clear()
    assert load_library().fqsweep_mix


def test_without_a_home_it_is_built_for_this_process(
    library: None, fresh_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert load_library().fqsweep_mix
    assert not fresh_build.exists()


def test_without_any_place_to_write_to_the_reason_is_said(
    library: None, fresh_build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(at_once_native.tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(NativeBuildError, match="cannot be kept or loaded: .*absent"):
        load_library()


@pytest.mark.parametrize(
    ("script", "seconds", "reason"),
    [
        (
            "printf 'kein Platz f\\374r das' >&2; exit 3",
            60,
            "does not compile at_once_native.cpp: kein Platz f.r das",
        ),
        ("exec sleep 20", 1, "takes longer than 1 s"),
    ],
)
def test_a_compiler_that_fails_says_why(
    fresh_build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, seconds: int, reason: str
) -> None:
    compiler = tmp_path / "bin" / "g++"
    compiler.parent.mkdir()
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{compiler.parent}:/usr/bin:/bin")
    monkeypatch.setattr(at_once_native, "BUILD_SECONDS", seconds)
    with pytest.raises(NativeBuildError, match=reason):
        load_library()
    assert not fresh_build.exists() or not list(fresh_build.iterdir())


def test_another_memory_layout_is_noticed(library: None) -> None:
    model = model_of(None)
    at_once = AtOnce(model)
    model.to(memory_format=torch.channels_last)
    with pytest.raises(AssertionError, match="another memory layout"):
        at_once.quantise()


def test_a_copy_of_a_model_is_quantised_in_one_call_too(library: None) -> None:
    assert isinstance(AtOnce(copy.deepcopy(model_of(None))).arithmetic, OneCall)
