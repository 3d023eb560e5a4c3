"""Which gradient of the widths tells what one bit more really does: ``fracbits`` against ``lsq``.

    python -m benchmarks.bit_gradient [--out benchmarks/results/bit_gradient.md]

A ResNet18 is trained on synthderm and quantised to one width; then nothing is trained. On the calibration images each
form gives the loss's gradient along every channel's width, in eval mode. For channels drawn at random (by layer, so
that all layers are among them), the width is then really raised by one bit, the loss on the same images is measured,
and Spearman's rank correlation with the gradient is taken: 1 is a perfect order, 0 none. Signs count too: the share
of channels where gradient and change agree, of those whose change is above the median in size.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import nn

from benchmarks.importance import CHOICES, open_trained
from benchmarks.result_file import result_parser, write_result
from fqsweep.importance import start_steps
from fqsweep.quant.convert import LearnedBitsWeight, attach_quantisers, quantisers_of
from fqsweep.quant.units import UnitTable, list_units
from fqsweep.setting import Setting

FORMS = ("fracbits", "lsq")
WIDTHS = (2, 4)
CHANNELS_A_LAYER = 4


def quantised(model: nn.Module, units: UnitTable, step_ub: np.ndarray, *, bits: int, form: str) -> nn.Module:
    """A copy with learned widths, all of them at ``bits``."""
    copied = copy.deepcopy(model).eval()
    steps = {name: torch.from_numpy(part) for name, part in units.split(step_ub).items()}
    attach_quantisers(copied, units, steps, np.full(units.num_units, bits), learn_bits=form)
    return copied


def mean_loss(setting: Setting, model: nn.Module) -> torch.Tensor:
    """Mean loss over the calibration images; gradients are gathered where they are wanted."""
    total, count = torch.zeros(()), 0
    for image, label, _group in setting.calibration_batches()():
        loss = F.cross_entropy(model(image), label, reduction="sum")
        if torch.is_grad_enabled():
            loss.backward()
        total, count = total + loss.detach().double(), count + len(label)
    return total / count


def gradient_u(setting: Setting, model: nn.Module, units: UnitTable) -> np.ndarray:
    """The gradient along each unit's width, float64 (u,)."""
    mean_loss(setting, model)
    found = {}
    for name, quantiser in quantisers_of(model).items():
        assert isinstance(quantiser, LearnedBitsWeight) and quantiser.free_bits_u.grad is not None
        found[name] = quantiser.free_bits_u.grad.double().numpy()
    return units.join(found)


@torch.no_grad()
def change_u(setting: Setting, model: nn.Module, units: UnitTable, chosen: np.ndarray) -> np.ndarray:
    """What the loss does when one unit alone gets a bit more, for the chosen units."""
    before = float(mean_loss(setting, model))
    changes = []
    for unit in chosen:
        layer = next(one for one in units.layers if one.start <= unit < one.stop)
        quantiser = quantisers_of(model)[layer.name]
        assert isinstance(quantiser, LearnedBitsWeight)
        quantiser.free_bits_u[unit - layer.start] += 1
        changes.append(float(mean_loss(setting, model)) - before)
        quantiser.free_bits_u[unit - layer.start] -= 1
    return np.array(changes)


def measure(setting: Setting, parent: nn.Module) -> list[str]:
    """One row a width, as a Markdown table."""
    units = list_units(parent, granularity="channel")
    step_ub = start_steps(parent, units, setting.calibration_batches(), choices=CHOICES, scale="absmax")
    rng = np.random.default_rng(0)
    chosen = np.concatenate(
        [layer.start + rng.choice(layer.num_units, CHANNELS_A_LAYER, replace=False) for layer in units.layers
         if layer.num_units >= CHANNELS_A_LAYER]
    )  # fmt: skip
    rows = [
        "| bits | channels | fracbits, rank | lsq, rank | fracbits, sign | lsq, sign |",
        "|---|---|---|---|---|---|",
    ]
    for bits in WIDTHS:
        # At a whole width ``fracbits`` is the plain grid, which both forms share.
        changes = change_u(
            setting, quantised(parent, units, step_ub, bits=bits, form="fracbits"), units, chosen
        )
        large = np.abs(changes) > np.median(np.abs(changes))
        rank, sign = {}, {}
        for form in FORMS:
            found = gradient_u(setting, quantised(parent, units, step_ub, bits=bits, form=form), units)[chosen]
            rank[form] = float(spearmanr(found, changes).statistic)
            sign[form] = float((np.sign(found) == np.sign(changes))[large].mean())
        cells = (bits, len(chosen), *(f"{rank[f]:.2f}" for f in FORMS), *(f"{sign[f]:.0%}" for f in FORMS))
        rows.append("| " + " | ".join(str(cell) for cell in cells) + " |")
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure and write the dated result."""
    parser = result_parser(__doc__)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        setting, parent = open_trained(Path(folder), image_size=options.image_size, epochs=options.epochs)
        rows = measure(setting, parent)
    notes = [
        f"One thread; ResNet18 at {options.image_size} px, {options.epochs} epochs on "
        "synthderm, 300 calibration images, abs-max steps.",
        "Rank: Spearman's correlation of gradient and measured change; sign: agreement among the larger changes.",
    ]
    write_result(options.out, title="Gradient of the widths", notes=notes, lines=rows)


if __name__ == "__main__":
    main()
