"""Where channels live between two layers and nowhere else, read from a network's traced graph.

A chain is a dense layer, operations that treat every channel by itself (norms in eval mode, activations,
depthwise convolutions) and the dense layers that alone read the result: `conv1 -> bn1 -> act -> conv2` of a
residual block, `fc1 -> act -> fc2` of a transformer, `expand -> depthwise -> project` of a mobile block. Channels
within a chain can leave without anything else noticing. Whatever is not recognised ends the search, so that
an unknown network has no chains and keeps all its channels.

Axes: c channels of the chain.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

_ATEN = torch.ops.aten
_CONV, _LINEAR, _NORM = _ATEN.conv2d.default, _ATEN.linear.default, _ATEN.batch_norm.default
_ELEMENTWISE_NAMES = (
    "relu",
    "relu_",
    "relu6",
    "relu6_",
    "gelu",
    "silu",
    "silu_",
    "hardswish",
    "hardswish_",
    "hardtanh",
    "hardtanh_",
    "leaky_relu",
    "leaky_relu_",
    "dropout",
    "clone",
    "contiguous",
)
_ELEMENTWISE = {getattr(_ATEN, name).default for name in _ELEMENTWISE_NAMES}


@dataclass(frozen=True, kw_only=True)
class Elementwise:
    """An operation that changes every value by itself."""

    apply: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Norm:
    """A batch norm in eval mode, by the name of its module."""

    name: str
    eps: float


@dataclass(frozen=True, kw_only=True)
class Depthwise:
    """A convolution with one filter a channel, by the name of its module."""

    name: str
    is_padded: bool


@dataclass(frozen=True, kw_only=True)
class Consumer:
    """A dense layer that reads the chain.

    Attributes:
        is_padded: the border of its input is filled with zeros, so that a constant channel is not uniform.
        norm: name of the batch norm that alone reads the layer, which can take up a constant; None if none does.
    """

    name: str
    is_padded: bool
    norm: str | None


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Channels that only ``consumers`` read: output of ``producer`` through ``steps``."""

    producer: str
    steps: tuple[Elementwise | Norm | Depthwise, ...]
    consumers: tuple[Consumer, ...]


def find_chains(model: nn.Module, *, image_size: int) -> list[Chain]:
    """The chains of a network, in the order of its operations.

    Args:
        model: in eval mode; it is traced with two images, and must not be used afterwards (timm's TinyViT
            keeps tensors of the trace).
        image_size: pixels.
    """
    with warnings.catch_warnings():
        # TinyViT notes tensors on itself while it is traced; the model is thrown away.
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (torch.zeros(2, 3, image_size, image_size),))
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    reader = _GraphReader(names)
    found = (reader.chain_from(node) for node in program.graph.nodes)
    return [chain for chain in found if chain is not None]


class _GraphReader:
    """Reads layers and chains from a traced graph; ``names`` maps placeholders to parameters and buffers."""

    def __init__(self, names: dict[str, str]) -> None:
        self.names = names

    def chain_from(self, node: fx.Node) -> Chain | None:
        """The chain that starts with this operation, None where it is no dense layer or its channels escape."""
        producer = self._dense_name(node)
        if producer is None:
            return None
        steps = []
        value = node
        for after in _sole_users(node):
            step = self._step(after, value, follows_conv=node.target is _CONV)
            if step is None:
                break
            steps.append(step)
            value = after
        consumers = [self._consumer(user, value) for user in value.users]
        if not consumers or any(consumer is None for consumer in consumers):
            return None
        same_axis = all(user.target is node.target for user in value.users)
        if not same_axis:
            return None
        return Chain(producer=producer, steps=tuple(steps), consumers=tuple(c for c in consumers if c))

    def _layer_name(self, node: fx.Node, position: int) -> str | None:
        """Name of the module that owns an operation's weight, None if the weight is shared or computed."""
        weight = _argument(node, position, "weight", None)
        if not isinstance(weight, fx.Node) or weight.name not in self.names or len(weight.users) != 1:
            return None
        return self.names[weight.name].removesuffix(".weight")

    def _dense_name(self, node: fx.Node) -> str | None:
        if node.target is _LINEAR or (node.target is _CONV and _argument(node, 6, "groups", 1) == 1):
            return self._layer_name(node, 1)
        return None

    def _norm_name(self, node: fx.Node) -> str | None:
        mean = _argument(node, 3, "running_mean", None)
        is_plain = node.target is _NORM and not _argument(node, 5, "training", True)
        if not is_plain or not isinstance(mean, fx.Node) or len(mean.users) != 1:
            return None
        return self.names[mean.name].removesuffix(".running_mean")

    def _step(
        self, node: fx.Node, value: fx.Node, *, follows_conv: bool
    ) -> Elementwise | Norm | Depthwise | None:
        if not node.args or node.args[0] is not value:
            return None
        if node.target in _ELEMENTWISE:
            target: Any = node.target
            more, options = node.args[1:], dict(node.kwargs)
            return Elementwise(apply=lambda value_c: target(value_c.clone(), *more, **options))
        norm = self._norm_name(node)
        if follows_conv and norm is not None:
            return Norm(name=norm, eps=float(_argument(node, 7, "eps", 1e-5)))
        if node.target is _CONV:
            channels = value.meta["val"].shape[1]
            name = self._layer_name(node, 1)
            if name and _argument(node, 6, "groups", 1) == channels == node.meta["val"].shape[1]:
                return Depthwise(name=name, is_padded=_is_padded(node))
        return None

    def _consumer(self, node: fx.Node, value: fx.Node) -> Consumer | None:
        name = self._dense_name(node)
        if name is None or node.args[0] is not value:
            return None
        (after,) = node.users if len(node.users) == 1 else (None,)
        norm = self._norm_name(after) if after is not None and node.target is _CONV else None
        return Consumer(name=name, is_padded=node.target is _CONV and _is_padded(node), norm=norm)


def _sole_users(node: fx.Node) -> Iterator[fx.Node]:
    """The operations that follow as long as each value has one reader."""
    while len(node.users) == 1:
        (node,) = node.users
        yield node


def _is_padded(node: fx.Node) -> bool:
    return any(_argument(node, 4, "padding", [0]))


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)
