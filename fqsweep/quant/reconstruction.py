"""Weights re-fitted to full precision's outputs before they are rounded: least squares, no training and no labels.

A layer behind rounded ones does not see the inputs that its weights were trained on, and channels that were dropped
say nothing any more. Much of it can be said again by what is left. So each layer in its turn, with the ones before it
done already, gets the weights that come nearest to its outputs in full precision: a ridge regression of what its
outputs are off on the inputs that it has now (He et al. 2017 for dropped channels; Arai and Ichikawa 2025, QEP,
arXiv 2504.09629, for rounded ones). Its steps are chosen anew for these weights, and the weights are rounded as ever:
nothing is added to the network. Mean and spread are left to ``quant.moments``, within whose pass this happens.

Axes: p places (positions of calibration images, a sample of them), g groups of a convolution, i inputs that a row of
weights multiplies, c output channels of a group.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fqsweep.config import ScaleRule
from fqsweep.models import quantisable_layers
from fqsweep.quant.convert import QuantisedWeight
from fqsweep.quant.moments import FLOAT32_EPS
from fqsweep.quant.steps import choose_steps
from fqsweep.quant.units import as_units

# Added to the variance of every input of a layer (to its mean square, where the mean is not matched), as a share of
# their mean over all groups: below, weights follow the sample, first those of a channel that is hardly ever active.
DAMPING = 0.03
# Of each image, on average; more changed nothing, and at 224 px all patches of a ResNet50 would take 11 GB.
MOST_PLACES_AN_IMAGE = 16
MOST_NUMBERS = 2**25  # of one layer, 128 MB: wide depthwise layers have short rows, and need fewer places


@contextmanager
def noting_patches(
    model: nn.Module, *, names: Collection[str], num_images: int
) -> Iterator[dict[str, torch.Tensor]]:
    """While open, a pass notes what the rows of weights of each layer multiply, at its sampled places.

    Layers that do more than convolve with their weight are left out, and those that the network uses more than once:
    one fit would serve one use.

    Args:
        model: in full precision and eval mode; it goes through its images once, all in one batch.
        names: of the layers that will be quantised.
        num_images: of the batch.

    Yields:
        Name of a layer -> float32 (g, p, i); complete once closed.
    """
    found: dict[str, torch.Tensor] = {}
    used_again: set[str] = set()

    def note(name: str) -> Any:
        def hook(layer: nn.Conv2d | nn.Linear, inputs: Any) -> None:
            if name in found:
                used_again.add(name)
            else:
                found[name] = _patches(layer, inputs[0].detach(), num_images=num_images)

        return hook

    with ExitStack() as hooks:
        for name, layer in quantisable_layers(model).items():
            if name in names and _only_multiplies(layer):
                hooks.enter_context(layer.register_forward_pre_hook(note(name)))
        yield found
    for name in used_again:
        del found[name]


class Reconstruction:
    """Re-fits a layer's weights; ``match_moments`` calls it for each layer before that is used.

    Args:
        wanted: what ``noting_patches`` found in full precision; taken out layer by layer as it is used.
        num_images: on how many images.
        rule: how steps are chosen (``quant.steps``); ``curvature`` takes variances where the mean is matched.
    """

    def __init__(self, wanted: dict[str, torch.Tensor], *, num_images: int, rule: ScaleRule) -> None:
        self.wanted = wanted
        self.num_images = num_images
        self.rule = rule

    def __call__(
        self,
        name: str,
        layer: nn.Conv2d | nn.Linear,
        quantiser: QuantisedWeight,
        value: torch.Tensor,
        mean_is_matched: bool,
    ) -> None:
        """Change a layer's weights and steps in place; one that is not among ``wanted`` stays as it is.

        Args:
            value: the layer's input in the rounded network, for the images of ``wanted``.
            mean_is_matched: whether the mean of its outputs will be corrected, so that the weights need not care.
        """
        if name not in self.wanted:
            return
        now_gpi = _patches(layer, value, num_images=self.num_images)
        off_gpi = self.wanted.pop(name).sub_(now_gpi)
        chain: Any = layer.parametrizations
        original: torch.Tensor = chain.weight.original
        weight_gci = original.reshape(len(now_gpi), -1, now_gpi.shape[2])
        off_gpc = off_gpi @ weight_gci.mT
        if mean_is_matched:
            now_gpi = _centre(now_gpi)
            # Orthogonal to what is left, but in float32 not to the last bits.
            off_gpc -= off_gpc.mean(dim=1, keepdim=True)
        moment_gi = _mean_square(now_gpi)
        change_gci = _ridge(now_gpi, off_gpc, moment_gi)
        keeps_u = quantiser.bits_u > 0
        weight_un = as_units(weight_gci + change_gci, len(keeps_u))
        original.copy_(
            torch.where(keeps_u[:, None], weight_un, as_units(original, len(keeps_u))).view_as(original)
        )
        moment_un = as_units(moment_gi[:, None].expand_as(weight_gci), len(keeps_u))
        for is_one_u, widths in quantiser.reachable_widths():
            step_ub = choose_steps(
                weight_un[is_one_u], widths, rule=self.rule, curvature_un=moment_un[is_one_u]
            )
            for column, bits in enumerate(widths):
                quantiser.step_ub[is_one_u, bits] = step_ub[:, column]


def _mean_square(value_gpi: torch.Tensor) -> torch.Tensor:
    """Over places, (g, i)."""
    return value_gpi.square().mean(dim=1)


def _centre(value_gpi: torch.Tensor) -> torch.Tensor:
    """Take its mean away, in place; a constant is 0, where float32 would leave a rest of it for weights to follow."""
    floor_gi = (4 * FLOAT32_EPS) ** 2 * _mean_square(value_gpi)
    value_gpi -= value_gpi.mean(dim=1, keepdim=True)
    varies_gi = _mean_square(value_gpi) > floor_gi
    return value_gpi.mul_(varies_gi[:, None])


def _ridge(input_gpi: torch.Tensor, output_gpc: torch.Tensor, moment_gi: torch.Tensor) -> torch.Tensor:
    """Weights (g, c, i) that take inputs nearest to outputs, with ``DAMPING``; solved on the shorter axis.

    Args:
        moment_gi: mean squares of the inputs.
    """
    num_places, num_inputs = input_gpi.shape[1:]
    damping = DAMPING * num_places * moment_gi.mean()
    # Where no input varies there is nothing to fit: any damping gives zeros.
    damping = torch.where(damping > 0, damping, 1.0)
    if num_inputs <= num_places:
        gram = input_gpi.mT @ input_gpi
        return _solve(gram, damping, input_gpi.mT @ output_gpc).mT
    gram = input_gpi @ input_gpi.mT
    return _solve(gram, damping, output_gpc).mT @ input_gpi


def _solve(gram: torch.Tensor, damping: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    damped = gram + damping * torch.eye(gram.shape[-1], device=gram.device)
    return torch.cholesky_solve(right, torch.linalg.cholesky(damped))


def _only_multiplies(layer: nn.Conv2d | nn.Linear) -> bool:
    if isinstance(layer, nn.Linear):
        return type(layer).forward is nn.Linear.forward
    plain = type(layer).forward is nn.Conv2d.forward
    return plain and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _patches(layer: nn.Conv2d | nn.Linear, value: torch.Tensor, *, num_images: int) -> torch.Tensor:
    """Rows of inputs at the sampled places, the same ones for the same shape; float32 (g, p, i)."""
    if isinstance(layer, nn.Linear):
        value_pi = value.reshape(-1, value.shape[-1])
        most = min(MOST_PLACES_AN_IMAGE * num_images, MOST_NUMBERS // value.shape[-1])
        return value_pi[_sample(len(value_pi), most, value.device)].float()[None]
    row = value.shape[1] * layer.kernel_size[0] * layer.kernel_size[1]
    most = max(1, min(MOST_PLACES_AN_IMAGE, MOST_NUMBERS // (row * len(value))))
    at_once = max(1, MOST_NUMBERS // value[0].numel())
    parts = [_patches_of_images(layer, image_bchw.float(), most=most) for image_bchw in value.split(at_once)]
    return torch.cat(parts).permute(1, 0, 3, 2).flatten(1, 2)


def _patches_of_images(layer: nn.Conv2d, image_bchw: torch.Tensor, *, most: int) -> torch.Tensor:
    """Patches at sampled places, the same ones of each image: (b, g, i, p), as ``unfold`` orders them."""
    assert not isinstance(layer.padding, str)
    (high, wide), (pad_y, pad_x) = layer.kernel_size, layer.padding
    padded_bchw = F.pad(image_bchw, (pad_x, pad_x, pad_y, pad_y)) if pad_y or pad_x else image_bchw
    num_y, num_x = (
        (padded_bchw.shape[axis + 2] - layer.dilation[axis] * (layer.kernel_size[axis] - 1) - 1)
        // layer.stride[axis]
        + 1
        for axis in range(2)
    )
    place = _sample(num_y * num_x, most, image_bchw.device)
    y_k = layer.dilation[0] * torch.arange(high, device=place.device)
    x_k = layer.dilation[1] * torch.arange(wide, device=place.device)
    y_kp = y_k[:, None] + layer.stride[0] * (place // num_x)
    x_kp = x_k[:, None] + layer.stride[1] * (place % num_x)
    patch_bcyxp = padded_bchw[:, :, y_kp[:, None], x_kp[None, :]]
    return patch_bcyxp.flatten(1, 3).unflatten(1, (layer.groups, -1))


def _sample(number: int, most: int, device: torch.device) -> torch.Tensor:
    """At most so many indices below ``number``, in order."""
    if number <= most:
        return torch.arange(number, device=device)
    chosen = torch.randperm(number, generator=torch.Generator().manual_seed(0))[:most]
    return chosen.sort().values.to(device)
