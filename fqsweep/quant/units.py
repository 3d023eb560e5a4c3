"""Units: the weights that share one bit-width, over all quantisable layers of a model.

Axes: u units of the whole model, b bit choices; within a layer weights are viewed as (units, weights per unit).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fqsweep.config import Granularity
from fqsweep.models import quantisable_layers


@dataclass(frozen=True, kw_only=True)
class LayerUnits:
    """The units of one layer: ``start`` to ``stop`` of the model's units, ``num_weights`` weights each."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    num_weights: int

    @property
    def num_units(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class UnitTable:
    """All units of a model, layer by layer in the model's order."""

    layers: tuple[LayerUnits, ...]

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


def list_units(model: nn.Module, *, granularity: Granularity) -> UnitTable:
    """The units of every Conv2d and Linear: output channels, or whole tensors.

    Raises:
        ValueError: the model has no such layer.
    """
    layers, start = [], 0
    for name, module in quantisable_layers(model).items():
        shape = tuple(module.weight.shape)
        num_units = shape[0] if granularity == "channel" else 1
        stop = start + num_units
        num_weights = int(np.prod(shape)) // num_units
        layers.append(LayerUnits(name=name, shape=shape, start=start, stop=stop, num_weights=num_weights))
        start = stop
    if not layers:
        raise ValueError("the model has no Conv2d or Linear layer: there is nothing to quantise")
    return UnitTable(tuple(layers))


def as_units(weight: torch.Tensor, num_units: int) -> torch.Tensor:
    """A weight tensor viewed as (units, weights per unit)."""
    return weight.reshape(num_units, -1)
