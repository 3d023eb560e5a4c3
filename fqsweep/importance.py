"""What quantising each unit is predicted to cost each group: a table from calibration images, and its start steps.

Axes: g groups, u units.

The costs themselves are those of ``predictors``. All is measured in eval mode on the calibration split; the model's
state is as before afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fqsweep.config import Predictor, ScaleRule
from fqsweep.cost_table import Importance, count_passes
from fqsweep.errors import TrialError
from fqsweep.models import quantisable_layers
from fqsweep.predictors import (
    Batches,
    LabelledBatch,
    RoundingErrors,
    first_order_costs,
    fisher_costs,
    hawq_costs,
    taylor_costs,
)
from fqsweep.quant.grid import quantise_units
from fqsweep.quant.levels import MAX_BITS
from fqsweep.quant.steps import choose_steps
from fqsweep.quant.units import UnitTable, as_units

Progress = Callable[[str, float], None]


def measure_importance(
    model: nn.Module,
    units: UnitTable,
    batches: Batches,
    *,
    num_groups: int,
    predictor: Predictor,
    choices: Sequence[int],
    scale: ScaleRule,
    seed: int = 0,
    progress: Progress = lambda _stage, _frac: None,
) -> Importance:
    """Fill the cost table.

    Args:
        model: the full-precision parent; its state and mode are left as they are.
        batches: gives the calibration images anew at each call, see ``predictors``.
        num_groups: every group needs at least one image.
        predictor, choices, scale: see ``predictors`` and ``quant.steps``.
        seed: for the probes of ``hawq``.
        progress: told the stage and the share of its images that were gone through.

    Raises:
        TrialError: a group without calibration images, or costs that are not finite.
    """
    start = time.perf_counter()
    with _undisturbed(model):
        loss_g, count_g = _group_losses(model, batches, num_groups)
        if (count_g == 0).any():
            raise TrialError(f"groups {np.flatnonzero(count_g == 0).tolist()} have no calibration image")
        curvature = None
        if scale == "curvature":
            progress("input moments", 0.0)
            curvature = _input_moments(model, batches)
        steps = _all_steps(model, units, choices, scale, curvature)
        changes = _rounding_errors(model, units, choices, steps)
        progress(predictor, 0.0)
        turns = {"taylor_matched": 2, "gradient": num_groups, "grape": num_groups}.get(predictor, 1)
        batches = _telling(batches, predictor, progress, num_images=turns * int(count_g.sum()))
        if predictor in ("taylor", "taylor_matched"):
            matched = predictor == "taylor_matched"
            cost_gub = taylor_costs(model, units, batches, changes, count_g, matched=matched)
        elif predictor == "fisher":
            cost_gub = fisher_costs(model, units, batches, changes, count_g)
        elif predictor == "hawq":
            cost_gub = hawq_costs(model, units, batches, changes, count_g, seed=seed)
        else:
            cost_gub = first_order_costs(model, units, batches, choices, count_g, squared=predictor == "grape")
    if not np.isfinite(cost_gub).all():
        raise TrialError(
            f"importance {predictor}: some costs are not finite; the parent's loss is probably not finite"
        )
    return Importance(
        cost_gub=cost_gub,
        choices=tuple(choices),
        step_ub=np.concatenate([steps[layer.name].cpu().numpy() for layer in units.layers]),
        loss_g=loss_g,
        count_g=count_g,
        passes=float(count_passes(predictor, num_choices=len(choices), scale=scale)),
        seconds=time.perf_counter() - start,
    )


def _telling(batches: Batches, stage: str, progress: Progress, *, num_images: int) -> Batches:
    """The same batches, with progress told after each; ``num_images`` are expected over all turns."""
    seen = 0

    def again() -> Iterator[LabelledBatch]:
        nonlocal seen
        for batch in batches():
            yield batch
            seen += len(batch[0])
            progress(stage, min(1.0, seen / num_images))

    return again


def start_steps(
    model: nn.Module,
    units: UnitTable,
    batches: Batches,
    *,
    choices: Sequence[int],
    scale: ScaleRule,
) -> np.ndarray:
    """Start steps alone, float32 (u, 9), for methods that need no costs; reads images for ``curvature`` only."""
    with _undisturbed(model):
        curvature = _input_moments(model, batches) if scale == "curvature" else None
        steps = _all_steps(model, units, choices, scale, curvature)
    return np.concatenate([steps[layer.name].cpu().numpy() for layer in units.layers])


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients of weights; everything as before at the end."""
    modes = {module: module.training for module in model.modules()}
    wanted = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    for parameter in wanted:
        parameter.grad = None
    model.eval()
    model.requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, (flag, gradient) in wanted.items():
            parameter.requires_grad_(flag)
            parameter.grad = gradient


@torch.no_grad()
def _group_losses(model: nn.Module, batches: Batches, num_groups: int) -> tuple[np.ndarray, np.ndarray]:
    total_g, count_g = np.zeros(num_groups), np.zeros(num_groups, dtype=np.int64)
    for image, label, group in batches():
        loss_n = F.cross_entropy(model(image), label, reduction="none").double().cpu().numpy()
        group_n = group.cpu().numpy()
        total_g += np.bincount(group_n, weights=loss_n, minlength=num_groups)
        count_g += np.bincount(group_n, minlength=num_groups)
    return total_g / np.maximum(count_g, 1), count_g


@torch.no_grad()
def _input_moments(model: nn.Module, batches: Batches) -> dict[str, torch.Tensor]:
    """Mean square of what each weight multiplies, per layer, as (1 or output channels, weights of a channel).

    The mean is over images and positions, up to a factor that all weights share, to which the choice of steps is
    blind; at image borders of convolutions the padding is ignored.
    """
    total: dict[str, torch.Tensor] = {}
    with ExitStack() as hooks:
        for name, module in quantisable_layers(model).items():

            def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...], name: str = name) -> None:
                value = inputs[0].detach()
                axes = (0, 2, 3) if isinstance(_module, nn.Conv2d) else tuple(range(value.ndim - 1))
                square = value.float().square().mean(dim=axes) * len(value)
                total[name] = total.get(name, torch.zeros_like(square)) + square

            hooks.enter_context(module.register_forward_pre_hook(hook))
        for image, _label, _group in batches():
            model(image)
    return {
        name: _spread(total[name], module)
        for name, module in quantisable_layers(model).items()
        if name in total
    }


def _spread(moment_c: torch.Tensor, layer: nn.Conv2d | nn.Linear) -> torch.Tensor:
    """Input moments per channel in the shape of the layer's weight rows."""
    weight = layer.weight
    if not isinstance(layer, nn.Conv2d):
        return moment_c[None, :]
    kernel = weight.shape[2] * weight.shape[3]
    per_group = moment_c.reshape(layer.groups, weight.shape[1])
    rows = per_group.repeat_interleave(weight.shape[0] // layer.groups, dim=0)
    return rows.repeat_interleave(kernel, dim=1)


def _all_steps(
    model: nn.Module,
    units: UnitTable,
    choices: Sequence[int],
    rule: ScaleRule,
    curvature: Mapping[str, torch.Tensor] | None,
) -> dict[str, torch.Tensor]:
    """Layer name -> steps (u, 9), NaN at widths that are no choice."""
    layers = quantisable_layers(model)
    steps = {}
    for layer in units.layers:
        weight = layers[layer.name].weight.detach()
        weight_un = as_units(weight, layer.num_units)
        importance = None
        if curvature is not None:
            given = curvature.get(layer.name, torch.ones(1, device=weight.device))
            importance = given.expand(weight.shape[0], -1).expand(weight.shape[0], weight[0].numel())
            importance = importance.reshape(layer.num_units, -1)
        chosen = choose_steps(weight_un, tuple(choices), rule=rule, curvature_un=importance)
        full = torch.full((layer.num_units, MAX_BITS + 1), torch.nan, device=weight.device)
        full[:, list(choices)] = chosen
        steps[layer.name] = full
    return steps


def _rounding_errors(
    model: nn.Module, units: UnitTable, choices: Sequence[int], steps: Mapping[str, torch.Tensor]
) -> RoundingErrors:
    """A function of the layer name that gives dW for each choice, made anew each time (memory)."""
    layers = quantisable_layers(model)
    by_name = {layer.name: layer for layer in units.layers}

    def errors(name: str) -> Iterator[torch.Tensor]:
        weight = layers[name].weight.detach()
        weight_un = as_units(weight, by_name[name].num_units)
        for bits in choices:
            bits_u = torch.full((len(weight_un),), bits, dtype=torch.long, device=weight.device)
            step_u1 = steps[name][:, bits : bits + 1]
            yield (quantise_units(weight_un, step_u1, bits_u) - weight_un).view(weight.shape)

    return errors
