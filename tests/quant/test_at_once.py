"""All layers at once give what each layer's own quantiser gives, forward and backward."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from at_once_check import compare
from torch import nn

from fqsweep.quant.at_once import EachLayer, can_quantise_at_once
from fqsweep.quant.blocks import Blocks
from fqsweep.quant.kernels import EAGER, choose_kernels

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


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_all_layers_at_once_are_the_same_as_layer_by_layer() -> None:
    check_on("cpu", TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_all_layers_at_once_are_the_same_as_layer_by_layer_on_a_gpu() -> None:
    check_on("cuda")


@pytest.mark.parametrize("learn", [None, "fracbits"])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_loop_over_the_layers_on_a_cpu_is_the_same_too(
    learn: str | None, granularity: str, channels_last: bool
) -> None:
    compare(CPU, arithmetic=EachLayer, learn=learn, granularity=granularity, channels_last=channels_last)


@pytest.mark.slow
@pytest.mark.parametrize("learn", [None, "fracbits"])
def test_the_loop_is_the_same_with_compiled_kernels(learn: str | None) -> None:
    kernels, remark = choose_kernels("compiled", CPU, num_weights=1, num_steps=1)
    if kernels is EAGER:
        pytest.skip(remark)
    compare(CPU, arithmetic=EachLayer, kernels=kernels, learn=learn, granularity="channel", channels_last=False)


def test_it_is_there_for_gradients_that_it_knows_and_on_gpus_where_triton_is() -> None:
    has_triton = importlib.util.find_spec("triton") is not None
    assert can_quantise_at_once(CUDA, bit_gradient=None) == has_triton
    assert can_quantise_at_once(CUDA, bit_gradient="fracbits") == has_triton
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
