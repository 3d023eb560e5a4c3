"""Predictors: how much each group's mean loss is expected to rise when a unit is quantised, from calibration images.

Axes: g groups, u units, b bit choices, n images of a batch.

Each gives ``cost_gub[g, u, b]`` >= 0, the predicted rise of group g's mean loss when unit u goes to choice b:

- ``taylor``: 1/2 E_g[(g_i . dW_u(b))^2] over per-sample gradients g_i, the empirical Fisher along the
  rounding error. g_i . dW_u is the layer's output for the weights dW_u times the gradient at its output,
  so no per-sample weight gradient is built.
- ``taylor_matched``: the same of what remains of the rounding error once the layer's outputs have full precision's
  mean and spread again (``quant.moments``), so that no bits are spent on what comes back without any.
- ``fisher``: 1/2 sum E_g[g_i^2] dW^2, its diagonal; one image at a time.
- ``gradient``: sum |E_g[g]| times 4^-b; ``grape``: sum (E_g[g] w)^2 times 4^-b (Lin, Kim, Joo 2022).
- ``hawq``: 1/2 (trace of the Hessian / weights) ||dW||^2, by Hutchinson's probes (Dong et al. 2020).

All of them want the model in eval mode with weights that ask for no gradient, and leave it so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from fqsweep.models import output_change, quantisable_layers
from fqsweep.quant.moments import Corrections, expected_corrections
from fqsweep.quant.units import LayerUnits, UnitTable, as_units

HUTCHINSON_PROBES = 8
LabelledBatch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # images (n, 3, h, w), labels (n,), groups (n,)
Batches = Callable[[], Iterator[LabelledBatch]]  # gives the calibration images anew at each call
RoundingErrors = Callable[[str], Iterator[torch.Tensor]]  # of a layer by name: its dW at each choice


def taylor_costs(
    model: nn.Module,
    units: UnitTable,
    batches: Batches,
    changes: RoundingErrors,
    count_g: np.ndarray,
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
    corrections = (
        expected_corrections(model, units, (image for image, _, _ in batches()), held) if matched else {}
    )
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
                    layer, value, gradient, held[part.name], corrections.get(part.name), part.num_units
                )
                for choice, along_nu in enumerate(along_knu):
                    # Windowed attention stacks the windows of an image along the first axis.
                    of_image_nu = along_nu.unflatten(0, (len(group_ng), -1)).sum(dim=1).double()
                    rows = slice(part.start, part.stop)
                    cost_gub[:, rows, choice] += torch.einsum("ng,nu->gu", group_ng, of_image_nu.square())

            if output.requires_grad:  # not where ``output_change`` calls the layer again
                output.register_hook(on_gradient)

        return on_forward

    with ExitStack() as hooks:
        for part in units.layers:
            hooks.enter_context(layers[part.name].register_forward_hook(watch(part, layers[part.name])))
        for image, label, group in batches():
            group_ng = F.one_hot(group, len(count_g)).double()
            loss = F.cross_entropy(model(image.detach().requires_grad_()), label, reduction="sum")
            loss.backward()
    unmet = [part for part in units.layers if part.name not in met]
    if unmet:
        _add_costs_by_weight(cost_gub, model, unmet, batches, held)
    return cost_gub.cpu().numpy() / (2 * count_g[:, None, None])


def _add_costs_by_weight(
    cost_gub: torch.Tensor,
    model: nn.Module,
    parts: Sequence[LayerUnits],
    batches: Batches,
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
    correction: Corrections | None,
    num_units: int,
) -> Iterator[torch.Tensor]:
    """g_i . dy for what each change of the weight does to a layer's outputs y, (n, u) a choice.

    With a correction y + R becomes stretch (y + R) + shift, so that dy is
    stretch R + (stretch - 1) y + shift.
    """
    own_nc = one_nc = torch.zeros(())
    if correction is not None:
        own_nc = _over_places(layer, layer.forward(value) * gradient)
        one_nc = _over_places(layer, gradient)
    for choice, change in enumerate(changes):
        along_nc = _over_places(layer, output_change(layer, value, change) * gradient)
        if correction is not None:
            stretch_c, shift_c = correction.stretch_kc[choice], correction.shift_kc[choice]
            along_nc = stretch_c * along_nc + (stretch_c - 1) * own_nc + shift_c * one_nc
        yield along_nc if along_nc.shape[1] == num_units else along_nc.sum(dim=1, keepdim=True)


def _over_places(layer: nn.Conv2d | nn.Linear, value: torch.Tensor) -> torch.Tensor:
    """Sum over pixels or tokens, (n, c)."""
    if isinstance(layer, nn.Conv2d):
        return value.flatten(2).sum(dim=2)
    return value.flatten(1, -2).sum(dim=1) if value.ndim > 2 else value


def first_order_costs(
    model: nn.Module,
    units: UnitTable,
    batches: Batches,
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
    model: nn.Module, units: UnitTable, batches: Batches, group_index: int
) -> dict[str, torch.Tensor]:
    """Sum over the group's images of the loss gradient at every quantised weight."""
    weights = _watched_weights(model, units)
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for image, label, group in batches():
        chosen = group == group_index
        if chosen.any():
            loss = F.cross_entropy(model(image[chosen]), label[chosen], reduction="sum")
            for name, gradient in zip(weights, _gradients(loss, weights), strict=True):
                total[name] += gradient
    model.requires_grad_(False)
    return total


def _watched_weights(model: nn.Module, units: UnitTable) -> dict[str, torch.Tensor]:
    layers = quantisable_layers(model)
    return {layer.name: layers[layer.name].weight.requires_grad_() for layer in units.layers}


def _gradients(loss: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The loss gradient at every weight; zeros where the network does not use it."""
    return torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)


def fisher_costs(
    model: nn.Module, units: UnitTable, batches: Batches, changes: RoundingErrors, count_g: np.ndarray
) -> np.ndarray:
    """Costs from the diagonal of the empirical Fisher of each group, one backward pass an image."""
    weights = _watched_weights(model, units)
    fisher_g = [{name: torch.zeros_like(w) for name, w in weights.items()} for _ in count_g]
    for image, label, group in batches():
        for i in range(len(image)):
            loss = F.cross_entropy(model(image[i : i + 1]), label[i : i + 1])
            for name, gradient in zip(weights, _gradients(loss, weights), strict=True):
                fisher_g[int(group[i])][name] += gradient.square()
    model.requires_grad_(False)
    tables = []
    for fisher, count in zip(fisher_g, count_g.tolist(), strict=True):
        tables.append(_diagonal_cost(units, changes, {name: value / count for name, value in fisher.items()}))
    return np.stack(tables)


def _diagonal_cost(
    units: UnitTable, changes: RoundingErrors, diagonal: Mapping[str, torch.Tensor]
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


def hawq_costs(
    model: nn.Module,
    units: UnitTable,
    batches: Batches,
    changes: RoundingErrors,
    count_g: np.ndarray,
    *,
    seed: int,
) -> np.ndarray:
    """Costs from the mean diagonal of the Hessian per unit and group, negative estimates taken as 0."""
    weights = _watched_weights(model, units)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    trace_gu = torch.zeros(len(count_g), units.num_units)
    with sdpa_kernel(SDPBackend.MATH), _TwiceDifferentiable():  # fused attention has no second derivative
        for image, label, group in batches():
            for g, trace_u in enumerate(trace_gu):
                chosen = group == g
                if chosen.any():
                    loss = F.cross_entropy(model(image[chosen]), label[chosen], reduction="sum")
                    _add_traces(trace_u, loss, weights, units, generator)
    model.requires_grad_(False)
    tables = []
    for trace_u, count in zip(trace_gu, count_g.tolist(), strict=True):
        diagonal = {}
        for layer in units.layers:
            weight = weights[layer.name]
            mean_u = trace_u[layer.start : layer.stop] / (HUTCHINSON_PROBES * count * layer.num_weights)
            rows = mean_u.clamp(min=0.0).to(weight.device)
            diagonal[layer.name] = rows.view(-1, *[1] * (weight.ndim - 1))
        tables.append(_diagonal_cost(units, changes, diagonal))
    return np.stack(tables)


class _TwiceDifferentiable(TorchFunctionMode):
    """Computes hard sigmoids, which have no second derivative in torch, by operations that have one."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.hardsigmoid:
            return F.relu6(args[0] + 3) / 6
        return func(*args, **(kwargs or {}))


def _add_traces(
    trace_u: torch.Tensor,
    loss: torch.Tensor,
    weights: Mapping[str, torch.Tensor],
    units: UnitTable,
    generator: torch.Generator,
) -> None:
    """Add Hutchinson's estimates v . Hv of the Hessian's trace over each unit's weights, one a probe, in place."""
    watched = list(weights.values())
    found = torch.autograd.grad(loss, watched, create_graph=True, allow_unused=True)
    is_used = [gradient is not None for gradient in found]
    gradients = [gradient for gradient in found if gradient is not None]
    for probe_index in range(HUTCHINSON_PROBES):
        probes = [_rademacher(weight, generator) for weight in watched]
        products = torch.autograd.grad(
            gradients,
            watched,
            grad_outputs=[probe for probe, used in zip(probes, is_used, strict=True) if used],
            retain_graph=probe_index < HUTCHINSON_PROBES - 1,
            allow_unused=True,
        )
        for layer, probe, product in zip(units.layers, probes, products, strict=True):
            if product is not None:
                along = as_units(probe * product, layer.num_units).sum(dim=1)
                trace_u[layer.start : layer.stop] += along.detach().cpu()


def _rademacher(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    sign = torch.randint(0, 2, weight.shape, generator=generator).mul_(2).sub_(1)
    return sign.to(device=weight.device, dtype=weight.dtype)
