"""Layers of a network take the shapes of stored weights: how a file without its dropped channels is opened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fqsweep.quant.heads import set_head_shape
from fqsweep.quant.packing import HeadShape


def fit_layers(model: nn.Module, state: Mapping[str, torch.Tensor], *, heads: Mapping[str, HeadShape]) -> None:
    """Give every parameter and buffer the shape that it has in ``state``, in place; values are not set.

    Args:
        model: the untrained network as its architecture says.
        state: tensor name -> tensor; a bias may be there that the architecture does not have.
        heads: sizes of the attention layers that are smaller.
    """
    for name, module in model.named_modules():
        _resize_tensors(module, state, prefix=f"{name}." if name else "")
        _resize_numbers(module)
    for name, shape in heads.items():
        set_head_shape(model.get_submodule(name), HeadShape(*shape))


def _resize_tensors(module: nn.Module, state: Mapping[str, torch.Tensor], *, prefix: str) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        stored = state.get(prefix + name)
        if stored is not None and stored.shape != parameter.shape:
            setattr(module, name, nn.Parameter(torch.empty_like(stored, dtype=parameter.dtype)))
    for name, buffer in module.named_buffers(recurse=False):
        stored = state.get(prefix + name)
        if stored is not None and stored.shape != buffer.shape:
            setattr(module, name, torch.empty_like(stored, dtype=buffer.dtype))
    stored = state.get(f"{prefix}bias")
    if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is None and stored is not None:
        module.bias = nn.Parameter(torch.empty_like(stored))


def _resize_numbers(module: Any) -> None:
    """The numbers of channels that a layer keeps beside its weight."""
    if isinstance(module, nn.Conv2d):
        rows, columns = module.weight.shape[:2]
        # The only grouped convolutions that change size have one filter a channel.
        is_depthwise = 1 < module.groups == module.in_channels == module.out_channels
        module.groups = rows if is_depthwise else module.groups
        module.in_channels, module.out_channels = columns * module.groups, rows
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
        module.num_features = len(module.running_mean)
