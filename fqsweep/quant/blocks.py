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
        self._addresses: tuple[list[int], torch.Tensor] | None = None

    def weight_addresses(self, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        """Addresses of the layers' weights, int64; copied to the device only where they have changed."""
        found = [weight.data_ptr() for weight in weights]
        if self._addresses is None or self._addresses[0] != found:
            self._addresses = (found, addresses_on(found, self.device))
        return self._addresses[1]


def _is_dense(weight: torch.Tensor) -> bool:
    return weight.is_contiguous() or (
        weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    )


def addresses_on(addresses: Sequence[int], device: torch.device) -> torch.Tensor:
    """Addresses as an int64 tensor on the device; the host does not wait for the copy."""
    table = torch.tensor(addresses, dtype=torch.int64)
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)
