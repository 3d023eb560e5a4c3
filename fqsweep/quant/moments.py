"""Outputs of quantised layers brought back to full precision's mean and spread: no training and no labels.

Rounding moves the mean of an output channel and changes its spread, and each layer hands that on to the next. With
few bits that is most of the damage: what the channel says is still there, on another scale. Each layer is corrected
in its turn, with the ones before it corrected already, so that on calibration images every channel has the mean and
the standard deviation that it has in full precision (bias correction of Nagel et al. 2019, with the spread; batch
norm statistics re-estimated, Sun et al. 2019). The same images on both sides keep their sampling out of it.

Nothing is added to the network: what corrects a channel goes into the statistics of the batch norm behind it, else
into its quantiser's step and the layer's bias. A layer with neither is left as it is.

``expected_corrections`` says beforehand what that will do to each layer, so that importance prices what will be left.

Axes: b images, c output channels of a layer, k bit choices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fqsweep.models import output_change, quantisable_layers
from fqsweep.quant.convert import QuantisedWeight, quantisers_of
from fqsweep.quant.units import UnitTable

# A channel that rounding made nearly constant says nothing: to stretch it further would only make noise louder.
MAX_STRETCH = 4.0
FLOAT32_EPS = torch.finfo(torch.float32).eps

# What is done to a quantised layer before it is used and matched (``quant.reconstruction``): its name, the layer, its
# quantiser, its input, and whether the mean of its outputs will be matched.
BeforeLayer = Callable[[str, nn.Conv2d | nn.Linear, QuantisedWeight, torch.Tensor, bool], None]


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Mean and variance of each output channel of a layer, over images and places; float32 (c,)."""

    mean_c: torch.Tensor
    variance_c: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Corrections:
    """What matching makes of a layer's outputs y at each bit choice, stretch * y + shift; float32 (k, c) each."""

    stretch_kc: torch.Tensor
    shift_kc: torch.Tensor


@contextmanager
def noting_moments(model: nn.Module) -> Iterator[dict[str, Moments]]:
    """While open, a pass notes the moments of every quantisable layer's outputs, by the layer's name.

    Args:
        model: in full precision and eval mode; it goes through its images once, all in one batch.
    """
    found: dict[str, Moments] = {}

    def note(name: str) -> Any:
        def hook(layer: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            found.setdefault(name, _moments(layer, output.detach()))

        return hook

    with ExitStack() as hooks:
        for name, layer in quantisable_layers(model).items():
            hooks.enter_context(layer.register_forward_hook(note(name)))
        yield found


@torch.no_grad()
def output_moments(model: nn.Module, image_bchw: torch.Tensor) -> dict[str, Moments]:
    """What ``noting_moments`` notes on these normalised images."""
    with noting_moments(model) as found:
        model(image_bchw)
    return found


@torch.no_grad()
def match_moments(
    model: nn.Module,
    target: Mapping[str, Moments],
    image_bchw: torch.Tensor,
    *,
    before: BeforeLayer | None = None,
) -> None:
    """Correct every quantised layer of a model, in place, in the order in which the network uses them.

    Args:
        model: with quantisers attached, in eval mode.
        target: what ``noting_moments`` found before they were attached.
        image_bchw: the images that it found them on.
        before: called for each layer with its input, once all layers before it are corrected.
    """
    norms = _norms_behind(model, image_bchw[:1])
    layers = quantisable_layers(model)
    done: set[str] = set()

    def hook_before(name: str, quantiser: QuantisedWeight) -> Any:
        def prepare(layer: nn.Conv2d | nn.Linear, inputs: Any) -> None:
            if before is not None and name not in done:
                before(name, layer, quantiser, inputs[0], name in norms or layer.bias is not None)

        return prepare

    def hook(name: str, quantiser: QuantisedWeight) -> Any:
        def correct(layer: nn.Conv2d | nn.Linear, _inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
            if name in done or name not in target:
                return None
            done.add(name)
            if name in norms:
                _into_norm(norms[name], *_correction(_moments(layer, output), target[name], stretches=True))
                return None
            return _into_layer(layer, quantiser, output, target[name])

        return correct

    with ExitStack() as hooks:
        for name, quantiser in quantisers_of(model).items():
            hooks.enter_context(layers[name].register_forward_pre_hook(hook_before(name, quantiser)))
            hooks.enter_context(layers[name].register_forward_hook(hook(name, quantiser)))
        model(image_bchw)


@torch.no_grad()
def expected_corrections(
    model: nn.Module,
    units: UnitTable,
    batches: Iterable[torch.Tensor],
    changes: Mapping[str, Sequence[torch.Tensor]],
) -> dict[str, Corrections]:
    """How ``match_moments`` would correct each layer if it alone were rounded, to each bit choice, by its name.

    A layer that cannot be corrected keeps its outputs (stretch 1, shift 0); one that the network does not use is
    left out.

    Args:
        model: in full precision and eval mode, which it stays in.
        batches: normalised images (b, c, h, w), each batch once.
        changes: layer name -> rounding errors of its weight, one a bit choice.
    """
    layers = quantisable_layers(model)
    seen = {part.name: _Seen() for part in units.layers}
    waiting: set[str] = set()

    def note(name: str) -> Any:
        def hook(layer: nn.Conv2d | nn.Linear, inputs: Any, output: torch.Tensor) -> None:
            if name not in waiting:  # matching goes by a layer's first use; ``output_change`` may call it again
                return
            waiting.remove(name)
            answers = (output + output_change(layer, inputs[0], change) for change in changes[name])
            seen[name].add([_moments(layer, answer) for answer in (output, *answers)], len(output))

        return hook

    norms: dict[str, _BatchNorm] | None = None
    for image_bchw in batches:
        norms = _norms_behind(model, image_bchw[:1]) if norms is None else norms
        waiting |= set(seen)
        with ExitStack() as hooks:
            for name in seen:
                hooks.enter_context(layers[name].register_forward_hook(note(name)))
            model(image_bchw)
    corrections = {}
    for part in units.layers:
        if not seen[part.name].images:
            continue
        wanted, now = seen[part.name].moments()
        layer, in_norm = layers[part.name], part.name in (norms or {})
        stretches = in_norm or can_stretch(layer, num_steps=part.num_units)
        stretch_kc, shift_kc = _correction(now, wanted, stretches=stretches)
        if not in_norm and layer.bias is None:
            stretch_kc, shift_kc = torch.ones_like(stretch_kc), torch.zeros_like(shift_kc)
        corrections[part.name] = Corrections(stretch_kc=stretch_kc, shift_kc=shift_kc)
    return corrections


def can_stretch(layer: nn.Conv2d | nn.Linear, *, num_steps: int) -> bool:
    """Whether longer steps stretch each output channel by itself.

    Not with one step for the whole tensor, nor in a layer that does more than convolve with its weight: one that
    standardises it undoes what is done to its scale.
    """
    return num_steps == layer.weight.shape[0] and type(layer).forward in (nn.Conv2d.forward, nn.Linear.forward)


class _Seen:
    """Moments over several batches: of a layer's outputs as they are, and at each bit choice."""

    def __init__(self) -> None:
        self.images = 0
        self.mean_sum: torch.Tensor | float = 0.0
        self.square_sum: torch.Tensor | float = 0.0

    def add(self, moments: Sequence[Moments], images: int) -> None:
        mean, variance = (
            torch.stack([getattr(each, part) for each in moments]).double() for part in ("mean_c", "variance_c")
        )
        self.mean_sum = self.mean_sum + mean * images
        self.square_sum = self.square_sum + (variance + mean.square()) * images
        self.images += images

    def moments(self) -> tuple[Moments, Moments]:
        """As they are (1, c), and at each bit choice (k, c)."""
        mean = torch.as_tensor(self.mean_sum / self.images)
        square = torch.as_tensor(self.square_sum / self.images)
        variance = square - mean.square()
        # A dropped channel is constant, but for what float32 loses where its change is added to its output.
        variance = torch.where(variance > (4 * FLOAT32_EPS) ** 2 * square[:1], variance, 0.0)
        mean, variance = mean.float(), variance.float()
        return (
            Moments(mean_c=mean[:1], variance_c=variance[:1]),
            Moments(mean_c=mean[1:], variance_c=variance[1:]),
        )


def _moments(layer: nn.Module, output: torch.Tensor) -> Moments:
    channel = 1 if isinstance(layer, nn.Conv2d) else output.ndim - 1
    others = [axis for axis in range(output.ndim) if axis != channel]
    variance_c, mean_c = torch.var_mean(output.float(), dim=others, correction=0)
    return Moments(mean_c=mean_c, variance_c=variance_c)


def _correction(now: Moments, wanted: Moments, *, stretches: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Stretch and shift, in the shape of ``now``, that take the one's moments to the other's.

    A constant channel is only shifted, and without ``stretches`` every channel is.
    """
    if not stretches:
        return torch.ones_like(now.mean_c), wanted.mean_c - now.mean_c
    moves_c = now.variance_c > 0
    stretch_c = (wanted.variance_c / torch.where(moves_c, now.variance_c, 1.0)).sqrt()
    stretch_c = torch.where(moves_c, stretch_c.clamp(1 / MAX_STRETCH, MAX_STRETCH), 1.0)
    return stretch_c, wanted.mean_c - stretch_c * now.mean_c


def _norms_behind(model: nn.Module, image_bchw: torch.Tensor) -> dict[str, _BatchNorm]:
    """Quantisable layer -> the batch norm, with running statistics, that takes its very output."""
    last: list[tuple[str, torch.Tensor]] = []
    found: dict[str, _BatchNorm] = {}

    def note(name: str) -> Any:
        return lambda _layer, _inputs, output: last.append((name, output))

    def look(norm: nn.Module, inputs: Any) -> None:
        assert isinstance(norm, _BatchNorm)
        if norm.running_mean is not None:
            found.update({name: norm for name, output in last if output is inputs[0]})

    with ExitStack() as hooks:
        for name, layer in quantisable_layers(model).items():
            hooks.enter_context(layer.register_forward_hook(note(name)))
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                hooks.enter_context(module.register_forward_pre_hook(look))
        model(image_bchw)
    return found


def _into_norm(norm: _BatchNorm, stretch_c: torch.Tensor, shift_c: torch.Tensor) -> None:
    """Let a batch norm do to x what it did to stretch * x + shift."""
    assert norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.copy_((norm.running_mean - shift_c) / stretch_c)
    norm.running_var.copy_(((norm.running_var + norm.eps) / stretch_c.square() - norm.eps).clamp_(min=0))


def _into_layer(
    layer: nn.Conv2d | nn.Linear, quantiser: QuantisedWeight, output: torch.Tensor, wanted: Moments
) -> torch.Tensor | None:
    """Stretch a layer's steps and shift its bias; returns its output as it now is, None where it has no bias.

    The weights behind the steps are stretched too, so that their codes stay.
    """
    if not isinstance(layer.bias, torch.Tensor):
        return None
    now = _moments(layer, output)
    stretches = can_stretch(layer, num_steps=len(quantiser.log_gain_u))
    stretch_c, shift_c = _correction(now, wanted, stretches=stretches)
    if stretches:
        quantiser.log_gain_u.add_(stretch_c.log())
        chain: Any = layer.parametrizations
        chain.weight.original.mul_(stretch_c.view(-1, *[1] * (chain.weight.original.ndim - 1)))
    layer.bias.copy_(layer.bias * stretch_c + shift_c)
    shape = (1, -1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,)
    return output * stretch_c.view(shape) + shift_c.view(shape)
