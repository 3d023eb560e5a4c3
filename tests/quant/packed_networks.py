"""Networks with random statistics and dropped channels as packed files, for the tests of what is done with those."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import torch
from torch import nn

from fqsweep.config import ArchitectureConfig
from fqsweep.models import build_model, quantisable_layers
from fqsweep.quant import pack_weights
from fqsweep.quant.grid import quantise_units
from fqsweep.quant.levels import absmax_steps

SIZE_BY_NAME = {"resnet18": 32, "resnet50": 32, "deit_tiny_patch16_224": 64, "tiny_vit_5m_224": 64}
NUM_CLASSES = 7
CLASSIFIERS = ("fc", "head", "head.fc")
ANY_WIDTH = (1, 2, 3, 4, 5, 6, 7, 8)


@cache
def packed_network(
    name: str,
    *,
    drop_frac: float,
    seed: int = 0,
    whole_layers: tuple[str, ...] = (),
    size: int | None = None,
    widths: tuple[int, ...] = ANY_WIDTH,
) -> bytes:
    """A network whose channels have random bits, a share of them 0; its norms fit its activations, roughly.

    Args:
        whole_layers: layers of which every channel is dropped. The classifier keeps all of its own.
    """
    image_size = size or SIZE_BY_NAME[name]
    model = random_network(name, image_size=image_size, seed=seed)
    generator = np.random.default_rng(seed)
    bits: dict[str, np.ndarray] = {}
    steps: dict[str, np.ndarray] = {}
    for layer, module in quantisable_layers(model).items():
        bits_u = generator.choice(widths, len(module.weight))
        bits_u[generator.random(len(bits_u)) < drop_frac] = 0
        if layer in CLASSIFIERS:
            bits_u = bits_u.clip(min=2)
        bits_u = bits_u * (layer not in whole_layers)
        weight_un = module.weight.detach().flatten(1)
        step_u1 = absmax_steps(weight_un, torch.from_numpy(bits_u))
        quantised = quantise_units(weight_un, step_u1, torch.from_numpy(bits_u))
        with torch.no_grad():
            module.weight.copy_(quantised.view(module.weight.shape))
        bits[f"{layer}.weight"], steps[f"{layer}.weight"] = bits_u, step_u1[:, 0].numpy()
    settle_norms(model, image_size=image_size)
    return pack_weights(model.state_dict(), bits, steps=steps, metadata=notes_of(name, image_size))


def notes_of(name: str, image_size: int) -> dict[str, str]:
    return {
        "architecture": name,
        "image_size": str(image_size),
        "classes": json.dumps([f"class {i}" for i in range(NUM_CLASSES)]),
        "normalisation": json.dumps({"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}),
    }


def random_network(name: str, *, image_size: int, seed: int) -> nn.Module:
    """Start values, but random norms and biases and large residual branches."""
    torch.manual_seed(seed)
    model = build_model(ArchitectureConfig(name=name), num_classes=NUM_CLASSES, image_size=image_size)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.normal_(module.weight, 1.0, 0.2)
            nn.init.normal_(module.bias, 0.0, 0.5)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.normal_(module.bias, 0.0, 0.5)
    return model


@torch.no_grad()
def settle_norms(model: nn.Module, *, image_size: int) -> None:
    """Statistics of batch norms from random images, then disturbed, so that dropped channels are no zeros."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(random_images(8, image_size, seed=1))
    for norm in norms:
        norm.running_mean += 0.3 * torch.randn_like(norm.running_mean)
        norm.running_var.clamp_(min=0.2).mul_(torch.rand_like(norm.running_var) + 0.5)
    model.eval()


def random_images(count: int, image_size: int, *, seed: int) -> torch.Tensor:
    return torch.randn(count, 3, image_size, image_size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Logits of a network that must not say the same of every image."""
    logits: torch.Tensor = model(images)
    assert float(logits.std(dim=0).max()) > 1e-3 * float(logits.abs().max())
    return logits
