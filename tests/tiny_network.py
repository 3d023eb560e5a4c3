"""A network of a few weights that has every kind of layer, with images, and its cost tables."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fqsweep.cost_table import Importance
from fqsweep.importance import measure_importance
from fqsweep.models import quantisable_layers
from fqsweep.quant.grid import quantise_units
from fqsweep.quant.units import UnitTable, list_units

CHOICES = (0, 1, 2, 4, 8)
SIZE = 6
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class OwnLinear(nn.Linear):
    """A linear layer of another class, as some libraries have."""


class OwnConv(nn.Conv2d):
    """A convolution that standardises its weight, as some networks do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight * 1.5, self.bias)


class Tiny(nn.Module):
    """Convolution, norm, grouped convolution, tokens, windows, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, stride=2, groups=2)
        self.own = OwnConv(4, 4, 1)
        self.tokens = nn.Linear(4, 5)
        self.windows = nn.Linear(5, 5)
        self.drop = nn.Dropout(0.5)
        self.mix = OwnLinear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.conv(image)), inplace=True)
        x = self.own(F.silu(self.grouped(x)))
        x = torch.tanh(self.tokens(x.flatten(2).transpose(1, 2)))
        num_images, num_tokens, width = x.shape
        x = self.windows(x.reshape(num_images * 3, num_tokens // 3, width)).reshape(
            num_images, num_tokens, width
        )
        x = self.drop(F.gelu(self.mix(x)))
        return self.head(x.mean(dim=1))


def tiny_network() -> nn.Module:
    torch.manual_seed(0)
    tiny = Tiny()
    tiny.norm.running_mean.normal_()
    tiny.norm.running_var.uniform_(0.5, 2)
    return tiny.train()


def images(count: int = 9, *, batch: int = 4, seed: int = 0) -> list[Batch]:
    """Unequal groups: images 0, 3, 6 ... are of group 0, the others of group 1."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(count, 3, SIZE, SIZE, generator=generator)
    label = torch.randint(0, 3, (count,), generator=generator)
    group = (torch.arange(count) % 3 > 0).long()
    return [(image[i : i + batch], label[i : i + batch], group[i : i + batch]) for i in range(0, count, batch)]


def measure(
    model: nn.Module, predictor: str, batches: list[Batch], **options: Any
) -> tuple[Importance, UnitTable]:
    units = list_units(model, granularity=options.pop("granularity", "channel"))
    defaults: dict[str, Any] = {"num_groups": 2, "choices": CHOICES, "scale": "absmax"}
    found = measure_importance(
        model,
        units,
        lambda: iter(batches),
        predictor=predictor,
        **{**defaults, **options},  # type: ignore[arg-type]
    )
    return found, units


def rounding_errors(model: nn.Module, units: UnitTable, found: Importance) -> dict[str, torch.Tensor]:
    """dW per layer as (b, u, n), from the steps that the table rests on."""
    errors = {}
    for layer in units.layers:
        weight = quantisable_layers(model)[layer.name].weight.detach().reshape(layer.num_units, -1)
        step = torch.from_numpy(found.step_ub[layer.start : layer.stop])
        errors[layer.name] = torch.stack(
            [
                quantise_units(weight, step[:, b : b + 1], torch.full((len(weight),), b)) - weight
                for b in found.choices
            ]
        )
    return errors
