"""Units: the weights that share one bit-width, over all quantisable layers of a model.

Axes: u units of the whole model, b bit choices; within a layer weights are viewed as (units, weights per unit).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from fqsweep.config import Granularity
from fqsweep.errors import TrialError
from fqsweep.models import quantisable_layers

END_PATTERNS = {"first": 0, "last": -1}


@dataclass(frozen=True, kw_only=True)
class LayerUnits:
    """The units of one layer: ``start`` to ``stop`` of the model's units, ``num_weights`` weights each."""

    name: str
    start: int
    stop: int
    num_weights: int

    @property
    def num_units(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class UnitTable:
    """All units of a model, layer by layer in the model's order.

    Attributes:
        layers: those that have units.
        ends: the layers of the model that ``first`` and ``last`` mean, exempt ones among them.
    """

    layers: tuple[LayerUnits, ...]
    ends: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def num_units(self) -> int:
        return self.layers[-1].stop

    @property
    def num_weights_u(self) -> np.ndarray:
        """int64 (u,): weights per unit."""
        return np.concatenate(
            [np.full(layer.num_units, layer.num_weights, dtype=np.int64) for layer in self.layers]
        )

    def split(self, value_u: np.ndarray) -> dict[str, np.ndarray]:
        """An array over units as one array per layer name."""
        return {layer.name: value_u[layer.start : layer.stop] for layer in self.layers}

    def join(self, value_by_layer: Mapping[str, np.ndarray]) -> np.ndarray:
        """The inverse of ``split``."""
        return np.concatenate([np.asarray(value_by_layer[layer.name]) for layer in self.layers])


def list_units(model: nn.Module, *, granularity: Granularity, exempt: Sequence[str] = ()) -> UnitTable:
    """The units of every Conv2d and Linear: output channels, or whole tensors.

    Args:
        exempt: name patterns of layers that have none; ``first`` and ``last`` mean the ends of the model, ``last``
            all its classifiers where it has several.

    Raises:
        ValueError: the model has no such layer.
        TrialError: a pattern fits no layer, or all are exempt.
    """
    layers, start = [], 0
    every = quantisable_layers(model)
    ends = _ends_of(model, list(every))
    try:
        left_out = {
            name for pattern in exempt for name in ends.get(pattern) or matching_names(pattern, list(every))
        }
    except ValueError as error:
        raise TrialError(f"exempt: {error}") from error
    for name, module in every.items():
        if name in left_out:
            continue
        num_units = module.weight.shape[0] if granularity == "channel" else 1
        stop = start + num_units
        num_weights = module.weight.numel() // num_units
        layers.append(LayerUnits(name=name, start=start, stop=stop, num_weights=num_weights))
        start = stop
    if not layers and left_out:
        raise TrialError(f"exempt {list(exempt)}: no layer is left to quantise")
    if not layers:
        raise ValueError("the model has no Conv2d or Linear layer: there is nothing to quantise")
    return UnitTable(tuple(layers), ends)


def _ends_of(model: nn.Module, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The layers that ``first`` and ``last`` mean; a distilled network has several classifiers."""
    if not names:
        return {}
    notes = getattr(model, "pretrained_cfg", None)
    known = notes.get("classifier") or () if isinstance(notes, Mapping) else ()
    classifiers = (known,) if isinstance(known, str) else tuple(known)
    has_several = len(classifiers) > 1 and set(classifiers) <= set(names)
    return {"first": (names[0],), "last": classifiers if has_several else (names[-1],)}


def matching_names(pattern: str, names: Sequence[str]) -> list[str]:
    """The layer names that a pattern means; ``first`` and ``last`` mean the ends of the list.

    Raises:
        ValueError: there are none; the message names some that exist.

    Example:
        >>> matching_names("block1.*", ["stem", "block1.conv", "head"]), matching_names("last", ["stem", "head"])
        (['block1.conv'], ['head'])
    """
    if names and pattern in END_PATTERNS:
        return [names[END_PATTERNS[pattern]]]
    found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    if not found:
        raise ValueError(f"{pattern!r} fits no quantisable layer; the first are: {', '.join(names[:8])}")
    return found


def as_units(weight: torch.Tensor, num_units: int) -> torch.Tensor:
    """A weight tensor viewed as (units, weights per unit)."""
    return weight.reshape(num_units, -1)
