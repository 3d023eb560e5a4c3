"""Predicted against measured loss: how well each importance predictor ranks what quantising does to each group.

    python -m benchmarks.importance [--out benchmarks/results/importance.md]

A ResNet18 is trained on synthderm; then no weight is trained any more. Two questions per predictor:

- ranking: 24 random allocations of the whole network (1 to 8 bits, each layer with a mean of its own) and every layer
  alone at 1, 2 and 3 bits are applied, each group's loss on validation images is measured, rounded alone and with
  outputs matched (`fqsweep.quant.moments`), and Spearman's rank correlation with the summed predicted costs is taken,
  per group, then averaged;
- use: bits are allocated from its costs at three budgets (hull and sort over the groups' mean), outputs are matched,
  and the worst group's loss rise and accuracy are measured on the same images. No test image is read.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn

from benchmarks.result_file import result_parser, write_result
from fqsweep.allocation import allocate_bits
from fqsweep.baseline import ensure_baseline
from fqsweep.cells import expand_cells
from fqsweep.config import Predictor, SearchSpace
from fqsweep.cost_table import Importance
from fqsweep.engine.work import LogFile
from fqsweep.files import SweepPaths
from fqsweep.finetuning import images_to_match
from fqsweep.importance import measure_importance
from fqsweep.quant.convert import attach_quantisers
from fqsweep.quant.moments import match_moments, output_moments
from fqsweep.quant.units import UnitTable, list_units
from fqsweep.setting import Setting, open_setting
from fqsweep.training import predict

PREDICTORS: tuple[Predictor, ...] = ("taylor_matched", "taylor", "fisher", "gradient", "grape", "hawq")
CHOICES = tuple(range(9))
BUDGETS_BITS = (0.5, 1.0, 2.0)
LAYER_BITS = (1, 2, 3)
NUM_RANDOM = 24


def open_trained(folder: Path, *, image_size: int, epochs: int) -> tuple[Setting, nn.Module]:
    """The data and the trained full-precision network."""
    space = SearchSpace.model_validate(
        {
            "name": "importance",
            "datasets": [
                {
                    "kind": "synthderm",
                    "group_attributes": ["skin_tone"],
                    "image_size": image_size,
                    "num_images": 3600,
                }
            ],
            "architectures": [{"name": "resnet18"}],
            "budgets_bits": [1],
            "seeds": [0],
            "methods": [{"method": "static"}],
            "recipe": {"epochs": epochs, "class_balance": "sampler", "calibration_images": 300},
        }
    )
    (cell,) = expand_cells(space)
    paths = SweepPaths(folder)
    setting = open_setting(cell, paths=paths, data_dir=None, device="cpu")
    return setting, ensure_baseline(setting, paths, LogFile(folder / "log"))


def group_outcome(setting: Setting, model: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """Mean loss and accuracy of each group on the validation images, float64 (g,) each."""
    probability, label, group, _ = predict(model, setting.plain_batches("validation").epoch(0))
    loss = -np.log(np.maximum(probability[np.arange(len(label)), label], 1e-12))
    right = probability.argmax(axis=1) == label
    groups = range(len(setting.group.names))
    return np.array([loss[group == g].mean() for g in groups]), np.array(
        [right[group == g].mean() for g in groups]
    )


def with_bits(
    model: nn.Module,
    units: UnitTable,
    step_ub: np.ndarray,
    bits_u: np.ndarray,
    *,
    match_on: torch.Tensor | None = None,
) -> nn.Module:
    """A copy with quantised weights; 32 bits leave a unit as it is.

    Args:
        match_on: images on which outputs are matched; None leaves them as rounding made them.
    """
    quantised = copy.deepcopy(model)
    steps = {name: torch.from_numpy(part) for name, part in units.split(step_ub).items()}
    attach_quantisers(quantised, units, steps, np.minimum(bits_u, 8))
    for name, layer_bits in units.split(bits_u).items():
        if (layer_bits == 32).all():
            torch.nn.utils.parametrize.remove_parametrizations(
                quantised.get_submodule(name), "weight", leave_parametrized=False
            )
    if match_on is not None:
        match_moments(quantised.eval(), output_moments(model, match_on), match_on)
    return quantised.eval()


def changes_to_try(units: UnitTable, rng: np.random.Generator) -> list[np.ndarray]:
    """Bits per unit: random allocations of the whole network, and each layer alone."""
    found = []
    for _ in range(NUM_RANDOM):
        # Some layers narrow, some wide: what costs most differs from one allocation to the next.
        mean_u = np.concatenate([np.full(layer.num_units, rng.uniform(1.5, 6.0)) for layer in units.layers])
        found.append(np.clip(rng.poisson(mean_u), 1, 8))
    for layer in units.layers:
        for bits in LAYER_BITS:
            bits_u = np.full(units.num_units, 32)
            bits_u[layer.start : layer.stop] = bits
            found.append(bits_u)
    return found


def predicted_rise(importance: Importance, bits_u: np.ndarray) -> np.ndarray:
    """Summed cost per group, float64 (g,); units at 32 bits cost nothing."""
    touched = np.flatnonzero(bits_u != 32)
    return importance.cost_gub[:, touched, np.searchsorted(CHOICES, bits_u[touched])].sum(axis=1)


def measure(setting: Setting, model: nn.Module) -> list[str]:
    """One row a predictor, as a Markdown table."""
    units = list_units(model, granularity="channel")
    num_groups = len(setting.group.names)
    tables = {
        predictor: measure_importance(
            model,
            units,
            setting.calibration_batches(),
            num_groups=num_groups,
            predictor=predictor,
            choices=CHOICES,
            scale="curvature",
        )
        for predictor in PREDICTORS
    }
    step_ub = tables["taylor"].step_ub
    loss_g, accuracy_g = group_outcome(setting, model)
    tried = changes_to_try(units, np.random.default_rng(0))
    matched = images_to_match(setting)
    rise_tg, matched_tg = (
        np.array(
            [
                group_outcome(setting, with_bits(model, units, step_ub, b, match_on=on))[0] - loss_g
                for b in tried
            ]
        )
        for on in (None, matched)
    )
    header = [f"worst group at {b:g} bit, matched: loss rise, accuracy" for b in BUDGETS_BITS]
    rows = [
        f"Full precision: worst group's loss {loss_g.max():.3f}, accuracy {accuracy_g.min():.3f}.",
        "",
        "| predictor | rank correlation, whole network | the same, matched | layers | matched | passes | time (s) | "
        + " | ".join(header)
        + " |",
        "|" + "---|" * (7 + len(BUDGETS_BITS)),
    ]
    for predictor, importance in tables.items():
        predicted_tg = np.array([predicted_rise(importance, bits_u) for bits_u in tried])
        agreement = [
            np.mean([spearmanr(predicted_tg[part, g], found_tg[part, g])[0] for g in range(num_groups)])
            for part in (slice(0, NUM_RANDOM), slice(NUM_RANDOM, None))
            for found_tg in (rise_tg, matched_tg)
        ]
        cells = [
            *(f"{correlation:.2f}" for correlation in agreement),
            f"{importance.passes:.0f}",
            f"{importance.seconds:.0f}",
            *(_use(setting, model, units, importance, matched, loss_g, budget) for budget in BUDGETS_BITS),
        ]
        rows.append(f"| {predictor} | " + " | ".join(cells) + " |")
        print(rows[-1], flush=True)
    return rows


def _use(
    setting: Setting,
    model: nn.Module,
    units: UnitTable,
    importance: Importance,
    matched: torch.Tensor,
    loss_g: np.ndarray,
    budget_bits: float,
) -> str:
    allocation = allocate_bits(
        importance.cost_gub, units.num_weights_u, budget_bits=budget_bits, choices=CHOICES
    )
    used = with_bits(model, units, importance.step_ub, allocation.bits_u, match_on=matched)
    found_g, accuracy_g = group_outcome(setting, used)
    return f"{(found_g - loss_g).max():+.3f}, {accuracy_g.min():.3f}"


def main() -> None:
    """Measure and write the dated result."""
    parser = result_parser(__doc__)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        setting, model = open_trained(Path(folder), image_size=options.image_size, epochs=options.epochs)
        rows = measure(setting, model)
    notes = [
        f"One thread of a 2-core machine; ResNet18 at {options.image_size} px, "
        f"{options.epochs} epochs on synthderm, 300 calibration images, no fine-tuning. Passes count forward passes "
        "over the calibration images.",
    ]
    write_result(options.out, title="Importance", notes=notes, lines=rows)


if __name__ == "__main__":
    main()
