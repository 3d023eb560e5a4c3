"""Networks without their dropped channels: speed and size beside the whole network.

    python -m benchmarks.dropped_channels [--out benchmarks/results/dropped_channels.md]

Networks have random weights and norms; bits are allocated under each budget to costs that are drawn like measured
ones (as in benchmarks/allocation.py). Whole and smaller network take turns on one thread; a ratio is the median over
turns of whole time / smaller time, and counts only after their logits were compared. Needs the extra `export`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import nn

from benchmarks.allocation import draw_costs
from benchmarks.result_file import result_parser, write_result
from fqsweep.allocation import allocate_bits
from fqsweep.config import ArchitectureConfig
from fqsweep.models import build_model
from fqsweep.quant import pack_weights
from fqsweep.quant.grid import absmax_steps, quantise_units
from fqsweep.quant.onnx_export import compare_with_torch, export_onnx, open_onnx
from fqsweep.quant.packed_model import load_model, mean_bits, shrink
from fqsweep.quant.packing import unpack_weights
from fqsweep.quant.units import list_units

ARCHITECTURES = ("resnet18", "deit_tiny_patch16_224")
BUDGETS_BITS = (0.25, 0.5, 1.0, 2.0)
IMAGE_SIZE, NUM_CLASSES = 224, 8
TURNS_BY_BATCH = {1: 15, 32: 3}


def quantised_network(architecture: str, budget_bits: float) -> bytes:
    """A packed network with random weights and norms, its bits allocated under the budget."""
    torch.manual_seed(0)
    config = ArchitectureConfig(name=architecture)
    model = build_model(config, num_classes=NUM_CLASSES, image_size=IMAGE_SIZE)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0.0, 0.3)
            nn.init.normal_(module.bias, 0.0, 0.3)
    units = list_units(model, granularity="channel")
    cost_gub, _ = draw_costs(units.num_units, 2, seed=0)
    found = allocate_bits(cost_gub, units.num_weights_u, budget_bits=budget_bits, choices=range(9))
    state = dict(model.state_dict())
    bits, steps = {}, {}
    for name, bits_u in units.split(found.bits_u).items():
        weight = state[f"{name}.weight"]
        weight_un = weight.flatten(1)
        step_u1 = absmax_steps(weight_un, torch.from_numpy(bits_u))
        state[f"{name}.weight"] = quantise_units(weight_un, step_u1, torch.from_numpy(bits_u)).view(
            weight.shape
        )
        bits[f"{name}.weight"], steps[f"{name}.weight"] = bits_u, step_u1[:, 0].numpy()
    notes = {
        "architecture": architecture,
        "image_size": str(IMAGE_SIZE),
        "classes": json.dumps([f"class {i}" for i in range(NUM_CLASSES)]),
        "normalisation": json.dumps({"mean": [0.5] * 3, "std": [0.25] * 3}),
    }
    return pack_weights(state, bits, steps=steps, metadata=notes)


def speed_ratio(whole: Callable[[], object], small: Callable[[], object], *, turns: int) -> tuple[float, float]:
    """Median over turns of whole time / small time, and the median whole time in milliseconds."""
    times = []
    for function in (whole, small):
        function()
    for _ in range(turns):
        turn = []
        for function in (whole, small):
            start = time.perf_counter()
            function()
            turn.append(time.perf_counter() - start)
        times.append(turn)
    time_tf = np.array(times)
    return float(np.median(time_tf[:, 0] / time_tf[:, 1])), float(np.median(time_tf[:, 0]) * 1e3)


def measure_one(architecture: str, budget_bits: float) -> str:
    """One row: sizes, then speed ratios of torch and onnxruntime at each batch size."""
    whole = quantised_network(architecture, budget_bits)
    small = shrink(whole)
    onnx_whole, onnx_small = export_onnx(whole), export_onnx(small)
    models = [load_model(blob) for blob in (whole, small)]
    images = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))
    for content in (onnx_whole, onnx_small):
        compare_with_torch(content, models[0], [images])
    sessions = [open_onnx(content) for content in (onnx_whole, onnx_small)]
    cells = []
    for batch, turns in TURNS_BY_BATCH.items():
        image = torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE)
        by_torch = [partial(model, image) for model in models]
        by_onnx = [partial(session.run, None, {"image": image.numpy()}) for session in sessions]
        for pair in (by_torch, by_onnx):
            ratio, whole_ms = speed_ratio(*pair, turns=turns)
            cells.append(f"{ratio:.2f} ({whole_ms:.0f} ms)")
    state, small_state = unpack_weights(whole), unpack_weights(small)
    left = sum(small_state[n].numel() for n in small_state.bits) / sum(state[n].numel() for n in state.bits)
    dropped = np.mean(np.concatenate(list(state.bits.values())) == 0)
    return (
        f"| {architecture} | {mean_bits(state):.2f} | {dropped:.0%} | {left:.0%} | {len(whole):,} | {len(small):,} "
        f"| {len(onnx_small):,} | {' | '.join(cells)} |"
    )


def main() -> None:
    """Measure and write the dated result."""
    parser = result_parser(__doc__)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    rows = [
        "| network | bits | channels of 0 bits | weights left | packed (bytes) | packed, removed | ONNX, removed "
        "| torch, batch 1 | onnxruntime, batch 1 | torch, batch 32 | onnxruntime, batch 32 |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for architecture in ARCHITECTURES:
        for budget_bits in BUDGETS_BITS:
            rows.append(measure_one(architecture, budget_bits))
            print(rows[-1], flush=True)
    notes = [
        f"One thread, other work beside it; {IMAGE_SIZE} px. Random weights, bits allocated to drawn costs.",
        "Speed: how many times as fast as the whole network in the same engine (the whole network's time). Medians "
        f"of {TURNS_BY_BATCH[1]} turns at batch 1 and {TURNS_BY_BATCH[32]} at batch 32.",
    ]
    write_result(options.out, title="Dropped channels removed", notes=notes, lines=rows)


if __name__ == "__main__":
    main()
