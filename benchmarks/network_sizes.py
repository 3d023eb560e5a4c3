"""What each network needs at 224 px: memory and time of its cost table, and its files, packed and as ONNX.

    python -m benchmarks.network_sizes [--batches 1] [--out FILE]

Each cost table is measured in a process of its own, one thread, with the default predictor and scale, in batches as a
sweep makes them (32 images). Networks have random weights. The files hold every channel; each ONNX file is checked
against torch before its size counts. Needs the extra `export`.
"""

from __future__ import annotations

import json
import resource

import torch

from benchmarks.dropped_channels import IMAGE_SIZE, NUM_CLASSES, quantised_network
from benchmarks.result_file import measure_apart, result_parser, write_result
from fqsweep.config import ArchitectureConfig, StaticMethod
from fqsweep.importance import measure_importance
from fqsweep.models import build_model
from fqsweep.quant.onnx_export import compare_with_torch, export_onnx
from fqsweep.quant.packed_model import load_model
from fqsweep.quant.units import list_units
from fqsweep.setting import CALIBRATION_BATCH

ARCHITECTURES = ("resnet18", "resnet50", "deit_tiny_patch16_224", "tiny_vit_5m_224")
BUDGETS_BITS = (1.0, 4.0)
NUM_GROUPS = 2


def measure_table(architecture: str, num_batches: int) -> dict[str, float]:
    """Peak resident memory of this process before and after (MiB), seconds, passes and units of a cost table."""
    torch.set_num_threads(1)
    settings = StaticMethod(method="static")
    model = build_model(ArchitectureConfig(name=architecture), num_classes=NUM_CLASSES, image_size=IMAGE_SIZE)
    units = list_units(model, granularity=settings.granularity)
    number_b = torch.arange(CALIBRATION_BATCH)
    image_bchw = torch.randn(CALIBRATION_BATCH, 3, IMAGE_SIZE, IMAGE_SIZE)
    batch = (image_bchw, number_b % NUM_CLASSES, number_b % NUM_GROUPS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    table = measure_importance(
        model,
        units,
        lambda: iter([batch] * num_batches),
        num_groups=NUM_GROUPS,
        predictor=settings.importance,
        choices=settings.choices,
        scale=settings.scale,
    )
    return {
        "before_mib": before / 1024,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "seconds": table.seconds,
        "passes": table.passes,
        "units": units.num_units,
    }


def file_sizes(architecture: str, budget_bits: float) -> str:
    """Bytes of the packed and of the ONNX file, after their logits were compared."""
    packed = quantised_network(architecture, budget_bits)
    onnx = export_onnx(packed)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    compare_with_torch(onnx, load_model(packed), [images])
    return f"{len(packed):,} | {len(onnx):,} | {len(onnx) / len(packed):.3f}"


def main() -> None:
    """Measure and write the dated result."""
    parser = result_parser(__doc__)
    parser.add_argument("--batches", type=int, default=1, help=f"of {CALIBRATION_BATCH} calibration images")
    parser.add_argument(
        "--table", choices=ARCHITECTURES, help="measure this network's cost table alone, as JSON"
    )
    options = parser.parse_args()
    if options.table:
        print(json.dumps(measure_table(options.table, options.batches)))
        return
    num_images = options.batches * CALIBRATION_BATCH
    rows = [
        f"| network | units | cost table of {num_images} images (s) | passes | peak memory (MiB) | before it |",
        "|---|---|---|---|---|---|",
    ]
    for architecture in ARCHITECTURES:
        found = measure_apart("benchmarks.network_sizes", "--table", architecture, "--batches", options.batches)
        rows.append(
            f"| {architecture} | {found['units']:,} | {found['seconds']:.0f} | {found['passes']:.0f} "
            f"| {found['peak_mib']:,.0f} | {found['before_mib']:,.0f} |"
        )
        print(rows[-1], flush=True)
    rows += ["", "| network | bits | packed (bytes) | ONNX | ONNX / packed |", "|---|---|---|---|---|"]
    with torch.no_grad():
        for architecture in ARCHITECTURES:
            for budget_bits in BUDGETS_BITS:
                rows.append(f"| {architecture} | {budget_bits:g} | {file_sizes(architecture, budget_bits)} |")
                print(rows[-1], flush=True)
    notes = [f"One thread, other work beside it; {IMAGE_SIZE} px, batches of {CALIBRATION_BATCH}."]
    write_result(options.out, title="What each network needs", notes=notes, lines=rows)


if __name__ == "__main__":
    main()
