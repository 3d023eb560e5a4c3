"""What quantising each unit is predicted to cost each group: a table from calibration images.

Axes: g groups, u units, b bit choices, n images of a batch.

``cost_gub[g, u, b]`` >= 0 is the predicted rise of group g's mean loss when unit u goes to choice b:

- ``taylor``: 1/2 E_g[(g_i . dW_u(b))^2] over per-sample gradients g_i, the empirical Fisher along the
  rounding error. g_i . dW_u is the layer's output for the weights dW_u times the gradient at its output,
  so no per-sample weight gradient is built.
- ``taylor_matched``: the same of what remains of the rounding error once the layer's outputs have full precision's
  mean and spread again (``quant.moments``), so that no bits are spent on what comes back without any.
- ``fisher``: 1/2 sum E_g[g_i^2] dW^2, its diagonal; one image at a time.
- ``gradient``: sum |E_g[g]| times 4^-b; ``grape``: sum (E_g[g] w)^2 times 4^-b (Lin, Kim, Joo 2022).
- ``hawq``: 1/2 (trace of the Hessian / weights) ||dW||^2, by Hutchinson's probes (Dong et al. 2020).

All in eval mode on the calibration split; the model's state is as before afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fqsweep.config import Predictor, ScaleRule
from fqsweep.cost_table import Importance
from fqsweep.errors import TrialError
from fqsweep.models import output_change, quantisable_layers
from fqsweep.quant.grid import quantise_units
from fqsweep.quant.levels import MAX_BITS
from fqsweep.quant.moments import Lines, expected_lines
from fqsweep.quant.steps import choose_steps
from fqsweep.quant.units import LayerUnits, UnitTable, as_units

HUTCHINSON_PROBES = 8
Image = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Progress = Callable[[str, float], None]


def measure_importance(
    model: nn.Module,
    units: UnitTable,
    batches: Callable[[], Iterator[Image]],
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
        batches: gives the calibration images anew at each call: images (n, 3, h, w), labels (n,), groups (n,).
        num_groups: every group needs at least one image.
        predictor, choices, scale: see the module and ``quant.steps``.
        seed: for the probes of ``hawq``.

    Raises:
        TrialError: a group without calibration images, or costs that are not finite.
    """
    start = time.perf_counter()
    with _undisturbed(model):
        loss_g, count_g = _group_losses(model, batches, num_groups)
        if (count_g == 0).any():
            raise TrialError(f"groups {np.flatnonzero(count_g == 0).tolist()} have no calibration image")
        curvature, passes = None, 1.0
        if scale == "curvature":
            progress("input moments", 0.0)
            curvature, passes = _input_moments(model, batches), 2.0
        steps = _all_steps(model, units, choices, scale, curvature)
        changes = _rounding_errors(model, units, choices, steps)
        progress(predictor, 0.0)
        if predictor in ("taylor", "taylor_matched"):
            matched = predictor == "taylor_matched"
            cost_gub = _taylor(model, units, batches, changes, count_g, progress, matched=matched)
            passes += 5.0 + 2 * len(choices) if matched else 3.0 + len(choices)
        elif predictor == "fisher":
            cost_gub = _fisher(model, units, batches, changes, count_g)
            passes += 3.0
        elif predictor == "hawq":
            cost_gub = _hawq(model, units, batches, changes, count_g, seed)
            passes += 6.0 * HUTCHINSON_PROBES
        else:
            cost_gub = _first_order(model, units, batches, choices, count_g, squared=predictor == "grape")
            passes += 3.0
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
        passes=passes,
        seconds=time.perf_counter() - start,
    )


def start_steps(
    model: nn.Module,
    units: UnitTable,
    batches: Callable[[], Iterator[Image]],
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
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval()
    model.requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)
            parameter.grad = None


@torch.no_grad()
def _group_losses(
    model: nn.Module, batches: Callable[[], Iterator[Image]], num_groups: int
) -> tuple[np.ndarray, np.ndarray]:
    total_g, count_g = np.zeros(num_groups), np.zeros(num_groups, dtype=np.int64)
    for image, label, group in batches():
        loss_n = F.cross_entropy(model(image), label, reduction="none").double().cpu().numpy()
        group_n = group.cpu().numpy()
        total_g += np.bincount(group_n, weights=loss_n, minlength=num_groups)
        count_g += np.bincount(group_n, minlength=num_groups)
    return total_g / np.maximum(count_g, 1), count_g


@torch.no_grad()
def _input_moments(model: nn.Module, batches: Callable[[], Iterator[Image]]) -> dict[str, torch.Tensor]:
    """Mean square of what each weight multiplies, per layer, as (1 or units, weights per unit).

    Averages over images and positions; at image borders of convolutions the padding is ignored.
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
) -> Callable[[str], Iterator[torch.Tensor]]:
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


def _taylor(
    model: nn.Module,
    units: UnitTable,
    batches: Callable[[], Iterator[Image]],
    changes: Callable[[str], Iterator[torch.Tensor]],
    count_g: np.ndarray,
    progress: Progress,
    *,
    matched: bool,
) -> np.ndarray:
    """The costs from one backward pass, in which each layer meets the gradient at its output.

    A layer whose weight is used without calling the layer, or whose inputs do not depend on the image, meets none:
    its costs are taken from the weights' own gradients, image by image, without matching.
    """
    layers = quantisable_layers(model)
    device = next(model.parameters()).device
    held = {layer.name: list(changes(layer.name)) for layer in units.layers}
    lines = expected_lines(model, units, (image for image, _, _ in batches()), held) if matched else {}
    num_choices = len(held[units.layers[0].name])
    cost_gub = torch.zeros(len(count_g), units.num_units, num_choices, dtype=torch.float64, device=device)
    group_ng = torch.zeros(0)
    met: set[str] = set()

    def watch(part: LayerUnits, layer: nn.Conv2d | nn.Linear) -> Callable[..., None]:
        def on_forward(_layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            value = inputs[0].detach()

            @torch.no_grad()
            def on_gradient(gradient: torch.Tensor) -> None:
                met.add(part.name)
                along_knu = _along(
                    layer, value, gradient, held[part.name], lines.get(part.name), part.num_units
                )
                for choice, along_nu in enumerate(along_knu):
                    # Windowed attention stacks the windows of an image along the first axis.
                    of_image_nu = along_nu.unflatten(0, (len(group_ng), -1)).sum(dim=1).double()
                    rows = slice(part.start, part.stop)
                    cost_gub[:, rows, choice] += torch.einsum("ng,nu->gu", group_ng, of_image_nu.square())

            if output.requires_grad:  # not where ``output_change`` calls the layer again
                output.register_hook(on_gradient)

        return on_forward

    done, total = 0, int(count_g.sum())
    with ExitStack() as hooks:
        for part in units.layers:
            hooks.enter_context(layers[part.name].register_forward_hook(watch(part, layers[part.name])))
        for image, label, group in batches():
            group_ng = F.one_hot(group, len(count_g)).double()
            loss = F.cross_entropy(model(image.detach().requires_grad_()), label, reduction="sum")
            loss.backward()
            done += len(image)
            progress("taylor_matched" if matched else "taylor", done / total)
    unmet = [part for part in units.layers if part.name not in met]
    if unmet:
        _add_costs_by_weight(cost_gub, model, unmet, batches, held)
    return cost_gub.cpu().numpy() / (2 * count_g[:, None, None])


def _add_costs_by_weight(
    cost_gub: torch.Tensor,
    model: nn.Module,
    parts: Sequence[LayerUnits],
    batches: Callable[[], Iterator[Image]],
    held: Mapping[str, Sequence[torch.Tensor]],
) -> None:
    """Add (g_i . dW)^2 of each image to the costs of its group, one backward pass an image."""
    layers = quantisable_layers(model)
    weights = [layers[part.name].weight.requires_grad_() for part in parts]
    for image, label, group in batches():
        for i, g in enumerate(group.tolist()):
            seen = image[i : i + 1].detach().requires_grad_()  # the loss has a graph, whatever weights it has
            gradients = torch.autograd.grad(
                F.cross_entropy(model(seen), label[i : i + 1]), weights, allow_unused=True
            )
            for part, gradient in zip(parts, gradients, strict=True):
                for choice, change in enumerate(held[part.name]) if gradient is not None else ():
                    along_u = as_units(gradient * change, part.num_units).sum(dim=1).double()
                    cost_gub[g, part.start : part.stop, choice] += along_u.square()
    model.requires_grad_(False)


def _along(
    layer: nn.Conv2d | nn.Linear,
    value: torch.Tensor,
    gradient: torch.Tensor,
    changes: Sequence[torch.Tensor],
    line: Lines | None,
    num_units: int,
) -> Iterator[torch.Tensor]:
    """g_i . dy for what each change of the weight does to a layer's outputs y, (n, u) a choice.

    With a line of matching y + R becomes stretch (y + R) + shift, so that dy is
    stretch R + (stretch - 1) y + shift.
    """
    own_nc = one_nc = torch.zeros(())
    if line is not None:
        own_nc = _over_places(layer, layer.forward(value) * gradient)
        one_nc = _over_places(layer, gradient)
    for choice, change in enumerate(changes):
        along_nc = _over_places(layer, output_change(layer, value, change) * gradient)
        if line is not None:
            stretch_c, shift_c = line.stretch_kc[choice], line.shift_kc[choice]
            along_nc = stretch_c * along_nc + (stretch_c - 1) * own_nc + shift_c * one_nc
        yield along_nc if along_nc.shape[1] == num_units else along_nc.sum(dim=1, keepdim=True)


def _over_places(layer: nn.Conv2d | nn.Linear, value: torch.Tensor) -> torch.Tensor:
    """Sum over pixels or tokens, (n, c)."""
    if isinstance(layer, nn.Conv2d):
        return value.flatten(2).sum(dim=2)
    return value.flatten(1, -2).sum(dim=1) if value.ndim > 2 else value


def _first_order(
    model: nn.Module,
    units: UnitTable,
    batches: Callable[[], Iterator[Image]],
    choices: Sequence[int],
    count_g: np.ndarray,
    *,
    squared: bool,
) -> np.ndarray:
    """Importance from each group's mean gradient, one backward pass per group and batch, times 4^-b."""
    layers = quantisable_layers(model)
    cost_gub = np.zeros((len(count_g), units.num_units, len(choices)))
    decay_b = 4.0 ** -np.array(choices, dtype=np.float64)
    for g in range(len(count_g)):
        total = _group_gradient(model, units, batches, g)
        for layer in units.layers:
            gradient = as_units(total[layer.name] / int(count_g[g]), layer.num_units)
            weight = as_units(layers[layer.name].weight.detach(), layer.num_units)
            value = (gradient * weight).square() if squared else gradient.abs()
            cost_gub[g, layer.start : layer.stop] = value.sum(dim=1).double().cpu().numpy()[:, None] * decay_b
    return cost_gub


def _group_gradient(
    model: nn.Module, units: UnitTable, batches: Callable[[], Iterator[Image]], group_index: int
) -> dict[str, torch.Tensor]:
    """Sum over the group's images of the loss gradient at every quantised weight."""
    weights = _watched_weights(model, units)
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for image, label, group in batches():
        chosen = group == group_index
        if chosen.any():
            loss = F.cross_entropy(model(image[chosen]), label[chosen], reduction="sum")
            for name, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
                total[name] += gradient
    model.requires_grad_(False)
    return total


def _watched_weights(model: nn.Module, units: UnitTable) -> dict[str, torch.Tensor]:
    layers = quantisable_layers(model)
    return {layer.name: layers[layer.name].weight.requires_grad_() for layer in units.layers}


def _fisher(
    model: nn.Module,
    units: UnitTable,
    batches: Callable[[], Iterator[Image]],
    changes: Callable[[str], Iterator[torch.Tensor]],
    count_g: np.ndarray,
) -> np.ndarray:
    weights = _watched_weights(model, units)
    fisher = [{name: torch.zeros_like(w) for name, w in weights.items()} for _ in count_g]
    for image, label, group in batches():
        for i in range(len(image)):
            loss = F.cross_entropy(model(image[i : i + 1]), label[i : i + 1])
            gradients = torch.autograd.grad(loss, list(weights.values()))
            for name, gradient in zip(weights, gradients, strict=True):
                fisher[int(group[i])][name] += gradient.square()
    model.requires_grad_(False)
    tables = []
    for g, count in enumerate(count_g):
        diagonal = {name: value / int(count) for name, value in fisher[g].items()}
        tables.append(_diagonal_cost(units, changes, diagonal))
    return np.stack(tables)


def _diagonal_cost(
    units: UnitTable, changes: Callable[[str], Iterator[torch.Tensor]], diagonal: Mapping[str, torch.Tensor]
) -> np.ndarray:
    """1/2 sum_w h_w dW^2 per unit and choice, float64 (u, b); ``diagonal`` broadcasts over weights."""
    rows = []
    for layer in units.layers:
        columns = [
            as_units(diagonal[layer.name] * change.square(), layer.num_units).sum(dim=1)
            for change in changes(layer.name)
        ]
        rows.append(torch.stack(columns, dim=1).double().cpu().numpy() / 2)
    return np.concatenate(rows)


def _hawq(
    model: nn.Module,
    units: UnitTable,
    batches: Callable[[], Iterator[Image]],
    changes: Callable[[str], Iterator[torch.Tensor]],
    count_g: np.ndarray,
    seed: int,
) -> np.ndarray:
    """Mean diagonal of the Hessian per unit and group, negative estimates taken as 0."""
    weights = _watched_weights(model, units)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    trace = [{layer.name: torch.zeros(layer.num_units) for layer in units.layers} for _ in count_g]
    # Fused attention has no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        for image, label, group in batches():
            for g in range(len(count_g)):
                chosen = group == g
                if not chosen.any():
                    continue
                loss = F.cross_entropy(model(image[chosen]), label[chosen], reduction="sum")
                gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
                for probe_index in range(HUTCHINSON_PROBES):
                    probes = [_rademacher(w, generator) for w in weights.values()]
                    products = torch.autograd.grad(
                        gradients,
                        list(weights.values()),
                        grad_outputs=probes,
                        retain_graph=probe_index < HUTCHINSON_PROBES - 1,
                        allow_unused=True,
                    )
                    for layer, probe, product in zip(units.layers, probes, products, strict=True):
                        if product is not None:
                            along = as_units(probe * product, layer.num_units).sum(dim=1)
                            trace[g][layer.name] += along.detach().cpu()
    model.requires_grad_(False)
    tables = []
    for g, count in enumerate(count_g):
        diagonal = {}
        for layer in units.layers:
            mean_u = trace[g][layer.name] / (HUTCHINSON_PROBES * int(count) * layer.num_weights)
            rows = mean_u.clamp(min=0.0).to(weights[layer.name].device)
            shape = (-1, *[1] * (weights[layer.name].ndim - 1))
            diagonal[layer.name] = rows.view(shape)
        tables.append(_diagonal_cost(units, changes, diagonal))
    return np.stack(tables)


def _rademacher(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    sign = torch.randint(0, 2, weight.shape, generator=generator).mul_(2).sub_(1)
    return sign.to(device=weight.device, dtype=weight.dtype)
