"""Where in a device's memory each unit's weights lie, for kernels that serve all layers at once.

Axes: u units of the whole model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Blocks:
    """Where each unit's weights lie: which layer, how far from its beginning, how many.

    Attributes:
        layer_u: int64 (u,); start_u: int64 (u,), elements from the layer's beginning; num_u: int64 (u,).
    """

    def __init__(self, weights: Sequence[torch.Tensor], num_units: Sequence[int]) -> None:
        device = weights[0].device
        layer, start, num = [], [], []
        for index, (weight, units) in enumerate(zip(weights, num_units, strict=True)):
            size = weight.numel() // units
            if not _is_dense(weight) or (units > 1 and weight.stride(0) != size):
                raise ValueError(
                    f"weight {index} of shape {tuple(weight.shape)}: its units are not blocks of memory"
                )
            layer.append(torch.full((units,), index))
            start.append(torch.arange(units) * size)
            num.append(torch.full((units,), size))
        self.layer_u, self.start_u, self.num_u = (torch.cat(part).to(device) for part in (layer, start, num))
        self.num_units = len(self.layer_u)
        self.device = device
        self._weights: tuple[list[int], torch.Tensor] | None = None

    def addresses(self, layers: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
        """Addresses of tensors on the device, int64, a table a list; the host does not wait for the copy.

        Args:
            layers: lists of a tensor a layer, the first of the weights; those are copied only where they have moved.
        """
        weights, *others = [[tensor.data_ptr() for tensor in tensors] for tensors in layers]
        if self._weights is None or self._weights[0] != weights:
            self._weights = (weights, self._table(weights))
        return [self._weights[1], *map(self._table, others)]

    def _table(self, addresses: list[int]) -> torch.Tensor:
        table = torch.tensor(addresses, dtype=torch.int64)
        return table if self.device.type == "cpu" else table.pin_memory().to(self.device, non_blocking=True)


def _is_dense(weight: torch.Tensor) -> bool:
    return weight.is_contiguous() or (
        weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    )
