"""Training steps with fake quantisation next to plain FP32, torch's own fake quantisation and Brevitas.

    python -m benchmarks.quantiser_step [--device cuda] [--out benchmarks/results/quantiser_step.md]

All variants of a network take their steps in turn, on the same images and from the same weights, and the
median of each variant's step is divided by plain FP32's: CPU time of the process on a CPU, time between
device events on a GPU. A time counts only where the rivals agree: at 4 bits with abs-max scales all of them
must give the weights that we do. Brevitas takes part where it is installed.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from benchmarks.result_file import result_parser, write_result
from fqsweep.config import KernelChoice
from fqsweep.models import build_untrained, quantisable_layers
from fqsweep.quant import fake_quantize
from fqsweep.quant.at_once import AtOnce, can_quantise_at_once
from fqsweep.quant.baq import LearnedBits
from fqsweep.quant.convert import attach_quantisers
from fqsweep.quant.kernels import EAGER, Kernels, choose_kernels
from fqsweep.quant.steps import choose_steps
from fqsweep.quant.units import list_units
from fqsweep.setting import make_gpu_exact

BITS = 4
ROUNDS = 9
GPU_STEPS = 8
NUM_CLASSES = 8
Step = Callable[[], None]
Variant = tuple[nn.Module, LearnedBits | None, bool]


class TorchFakeQuantise(nn.Module):
    """torch's per-channel fake quantisation with learnable scales, one bit-width for all channels."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        limit = 2 ** (BITS - 1) - 1
        self.scale = nn.Parameter(weight.detach().flatten(1).abs().amax(dim=1) / limit)
        self.register_buffer("zero_point", torch.zeros(len(weight), dtype=torch.int32, device=weight.device))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        limit = 2 ** (BITS - 1) - 1
        return torch.fake_quantize_per_channel_affine(
            weight, self.scale.detach(), self.zero_point, 0, -limit, limit
        )


def with_torch(model: nn.Module) -> nn.Module:
    """torch.fake_quantize_per_channel_affine on every layer."""
    for layer in quantisable_layers(model).values():
        parametrize.register_parametrization(layer, "weight", TorchFakeQuantise(layer.weight), unsafe=True)
    return model


def with_brevitas(model: nn.Module) -> nn.Module:
    """Brevitas' layers with one learned bit-width a layer, as its documentation sets it up."""
    import brevitas.nn as qnn
    from brevitas.inject.enum import BitWidthImplType
    from brevitas.quant import Int8WeightPerChannelFloat

    class Learned(Int8WeightPerChannelFloat):
        bit_width_impl_type = BitWidthImplType.PARAMETER
        bit_width = BITS

    for name, layer in list(quantisable_layers(model).items()):
        bias = layer.bias is not None
        if isinstance(layer, nn.Conv2d):
            own: nn.Module = qnn.QuantConv2d(
                layer.in_channels, layer.out_channels, layer.kernel_size, stride=layer.stride,
                padding=layer.padding, groups=layer.groups, bias=bias, weight_quant=Learned,
            )  # fmt: skip
        else:
            own = qnn.QuantLinear(layer.in_features, layer.out_features, bias=bias, weight_quant=Learned)
        own.load_state_dict(layer.state_dict(), strict=False)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, own.to(layer.weight.device))
    return model


def with_ours(model: nn.Module, kernels: Kernels, *, learn: bool) -> tuple[nn.Module, LearnedBits | None]:
    """Our quantisers, every channel at the same width; learned bits on request."""
    units = list_units(model, granularity="channel")
    layers = quantisable_layers(model)
    steps = {
        layer.name: choose_steps(layers[layer.name].weight.detach().flatten(1), tuple(range(9)), rule="absmax")
        for layer in units.layers
    }
    bits_u = np.full(units.num_units, BITS)
    attach_quantisers(model, units, steps, bits_u, learn_bits="fracbits" if learn else None, kernels=kernels)
    if not learn:
        return model, None
    limits = {"lowest_u": np.zeros(units.num_units), "highest_u": np.full(units.num_units, 8)}
    return model, LearnedBits(
        model, units, counted_u=units.num_weights_u, **limits, budget_bits=BITS, learning_rate=0.02
    )


def check_agreement(name: str, model: nn.Module, plain: nn.Module) -> None:
    """The variant's weights are the ones that ``fake_quantize`` gives, up to rounding of the scales."""
    for layer_name, layer in quantisable_layers(plain).items():
        found = model.get_submodule(layer_name)
        weight = found.quant_weight().value if hasattr(found, "quant_weight") else found.weight
        wanted = fake_quantize(layer.weight, BITS)
        step = layer.weight.detach().abs().max() / (2 ** (BITS - 1) - 1)
        off = ((weight - wanted).abs() > 1e-3 * step).double().mean()
        # A weight half-way between two levels may go either way.
        assert float(off) < 1e-3, f"{name}: {float(off):.2%} of {layer_name}'s weights differ"


def step_of(variant: Variant, images: torch.Tensor, *, half: bool) -> Step:
    """One whole training step: forward, loss, backward, clipping, AdamW, and the bits' own step."""
    model, learned, is_at_once = variant
    quantised = AtOnce(model).ready if is_at_once else contextlib.nullcontext
    parameters = [p for name, p in model.named_parameters() if not name.endswith("free_bits_u")]
    optimiser = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    label = torch.arange(len(images), device=images.device) % NUM_CLASSES

    def step() -> None:
        autocast = torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=half)
        with autocast, parametrize.cached(), quantised():
            loss = F.cross_entropy(model(images).float(), label)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        if learned is not None:
            learned.step(rate_frac=1.0)

    return step


def seconds_of(step: Step, device: torch.device) -> float:
    """CPU time of the process on a CPU (other programs do not count), time on the device on a GPU."""
    if device.type == "cpu":
        start = time.process_time()
        step()
        return time.process_time() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(GPU_STEPS):
        step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / GPU_STEPS


def variants_of(plain: nn.Module, kernels: Kernels) -> dict[str, Variant]:
    """Each variant by name, from the same weights; checked for agreement."""
    device = next(plain.parameters()).device
    variants: dict[str, Variant] = {"FP32": (copy.deepcopy(plain), None, False)}
    on_cpu = device.type == "cpu"
    for name, learn in (("fixed", False), ("learned", True)):
        at_once = can_quantise_at_once(device, bit_gradient="fracbits" if learn else None)
        if at_once and not on_cpu:
            label = f"fqsweep, {name} bits per channel, all layers at once"
            variants[label] = (*with_ours(copy.deepcopy(plain), EAGER, learn=learn), True)
        elif kernels is not EAGER:
            compiled = with_ours(copy.deepcopy(plain), kernels, learn=learn)
            variants[f"fqsweep, {name} bits per channel"] = (*compiled, at_once)
        eager = with_ours(copy.deepcopy(plain), EAGER, learn=learn)
        variants[f"fqsweep, {name}, eager kernels"] = (*eager, at_once and on_cpu)
    variants["torch fake_quantize_per_channel_affine"] = (with_torch(copy.deepcopy(plain)), None, False)
    try:
        variants["Brevitas, learned bits per layer"] = (with_brevitas(copy.deepcopy(plain)), None, False)
    except ImportError as error:
        print(f"Brevitas takes no part: {error}")
    for name, (model, _, _) in list(variants.items())[1:]:
        check_agreement(name, model, plain)
    return variants


def measure(
    device: torch.device, networks: list[str], sizes: list[int], batch: int, half: bool
) -> Iterator[str]:
    """One row a network, size and variant."""
    one_launch = device.type != "cpu" and can_quantise_at_once(device, bit_gradient=None)
    wanted: KernelChoice = "eager" if one_launch else "compiled"
    kernels, remark = choose_kernels(wanted, device, num_weights=1, num_steps=1, at_once=not one_launch)
    if remark:
        print(remark)
    for network in networks:
        for size in sizes:
            torch.manual_seed(0)
            plain = build_untrained(network, num_classes=NUM_CLASSES, image_size=size).to(device)
            images = torch.randn(batch, 3, size, size, device=device)
            if half:
                plain, images = (
                    plain.to(memory_format=torch.channels_last),
                    images.to(memory_format=torch.channels_last),
                )
            variants = variants_of(plain, kernels)
            steps = {name: step_of(variant, images, half=half) for name, variant in variants.items()}
            seconds = _in_turn(steps, device)
            for name, taken in seconds.items():
                ratio = np.median(np.array(taken) / np.array(seconds["FP32"]))
                yield f"| {network} | {size} | {name} | {1e3 * np.median(taken):.1f} | {ratio:.2f} |"


def _in_turn(steps: dict[str, Step], device: torch.device) -> dict[str, list[float]]:
    """Every variant's times, one step each in turn, so that slow moments of the machine hit all alike."""
    for step in steps.values():
        step()
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            seconds[name].append(seconds_of(step, device))
    return seconds


def main() -> None:
    """Measure and write the dated result."""
    parser = result_parser(__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--networks", nargs="+", default=["resnet18", "deit_tiny_patch16_224"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 224])
    parser.add_argument("--batch", type=int)
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(1)
    batch = options.batch or (16 if device.type == "cpu" else 128)
    half = device.type != "cpu"
    if half:
        make_gpu_exact()  # as every trial on a GPU does
    machine = torch.cuda.get_device_name() if half else "one thread of a 2-core machine"
    notes = [
        f"torch {torch.__version__}, {machine}; batch {batch}, "
        f"{'bf16 autocast, channels_last' if half else 'float32'}, {ROUNDS} steps of "
        "each variant in turn: median step, and median of the ratios to FP32's step of the same turn.",
    ]
    rows = ["| network | image | variant | step (ms) | of FP32 |", "|---|---|---|---|---|"]
    for row in measure(device, options.networks, options.sizes, batch, half):
        print(row, flush=True)
        rows.append(row)
        # At once: what is measured stays, whatever becomes of the next network.
        write_result(options.out, title="Quantiser step", notes=notes, lines=rows)


if __name__ == "__main__":
    main()
