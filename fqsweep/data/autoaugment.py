"""AutoAugment's ImageNet policy (Cubuk et al. 2019), drawn for each image and applied to a whole batch.

Images that drew the same operation go through it together, each at its own strength; the draws travel to the
device once, and nothing waits for it.

Axes: b images of a batch, k images that drew one operation, c channels, h and w pixels, v pixel values 0 to 255.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable

import torch
import torch.nn.functional as F

# Table 9 (policy found on ImageNet): two operations each, as (name, probability, level 0 to 9).
IMAGENET_POLICY: tuple[tuple[tuple[str, float, int], tuple[str, float, int]], ...] = (
    (("posterize", 0.4, 8), ("rotate", 0.6, 9)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 0)),
    (("equalize", 0.8, 0), ("equalize", 0.6, 0)),
    (("posterize", 0.6, 7), ("posterize", 0.6, 6)),
    (("equalize", 0.4, 0), ("solarize", 0.2, 4)),
    (("equalize", 0.4, 0), ("rotate", 0.8, 8)),
    (("solarize", 0.6, 3), ("equalize", 0.6, 0)),
    (("posterize", 0.8, 5), ("equalize", 1.0, 0)),
    (("rotate", 0.2, 3), ("solarize", 0.6, 8)),
    (("equalize", 0.6, 0), ("posterize", 0.4, 6)),
    (("rotate", 0.8, 8), ("colour", 0.4, 0)),
    (("rotate", 0.4, 9), ("equalize", 0.6, 0)),
    (("equalize", 0.0, 0), ("equalize", 0.8, 0)),
    (("invert", 0.6, 0), ("equalize", 1.0, 0)),
    (("colour", 0.6, 4), ("contrast", 1.0, 8)),
    (("rotate", 0.8, 8), ("colour", 1.0, 2)),
    (("colour", 0.8, 8), ("solarize", 0.8, 7)),
    (("sharpness", 0.4, 7), ("invert", 0.6, 0)),
    (("shear", 0.6, 5), ("equalize", 1.0, 0)),
    (("colour", 0.4, 0), ("equalize", 0.6, 0)),
    (("equalize", 0.4, 0), ("solarize", 0.2, 4)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 0)),
    (("invert", 0.6, 0), ("equalize", 1.0, 0)),
    (("colour", 0.6, 4), ("contrast", 1.0, 8)),
    (("equalize", 0.8, 0), ("equalize", 0.6, 0)),
)
HIGHEST_LEVEL = 9
SIGNED = frozenset({"rotate", "shear", "colour", "contrast", "sharpness"})
MAX_ROTATION_DEGREES = 30.0
MAX_SHEAR = 0.3
MAX_BLEND = 0.9
MAX_BITS_DROPPED = 4


def auto_augment(pixels_bchw: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
    """The policy drawn for each uint8 image; colours are changed as strongly as published, also those of skin.

    Args:
        pixels_bchw: uint8, any device; left as they are.
        generator: of the CPU, on every device.
    """
    changed_bchw = pixels_bchw.clone(memory_format=torch.contiguous_format)
    for name, row_k, strength_k in _draw(len(pixels_bchw), generator=generator, device=pixels_bchw.device):
        taken = changed_bchw.index_select(0, row_k)
        changed_bchw.index_copy_(0, row_k, OPERATIONS[name](taken, strength_k.view(-1, 1, 1, 1)))
    return changed_bchw


def _draw(
    batch: int, *, generator: torch.Generator, device: torch.device
) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """What happens to which images, in order: operation, rows int64 (k,), strengths float32 (k,)."""
    pair_b = torch.randint(len(IMAGENET_POLICY), (batch,), generator=generator).tolist()
    draw_2b = torch.rand((2, batch), generator=generator).tolist()
    is_negative_2b = torch.rand((2, batch), generator=generator).lt(0.5).tolist()
    drawn: dict[tuple[int, str], list[tuple[int, float]]] = defaultdict(list)
    for turn in range(2):
        for row, pair in enumerate(pair_b):
            name, probability, level = IMAGENET_POLICY[pair][turn]
            if draw_2b[turn][row] < probability:
                sign = -1 if name in SIGNED and is_negative_2b[turn][row] else 1
                drawn[turn, name].append((row, sign * level / HIGHEST_LEVEL))
    entries = torch.tensor([entry for kind in drawn.values() for entry in kind]).view(-1, 2)
    entries = entries.to(device, non_blocking=True)
    sizes = [len(kind) for kind in drawn.values()]
    rows, strengths = entries[:, 0].long().split(sizes), entries[:, 1].split(sizes)
    names = [name for _turn, name in drawn]
    return list(zip(names, rows, strengths, strict=True))


# --- operations: uint8 (k, c, h, w) at strengths float32 (k, 1, 1, 1), as torchvision's of the same name ---


def _rotate(pixels: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    angle_k = strength.view(-1) * math.radians(MAX_ROTATION_DEGREES)
    cos_k, sin_k, zero_k = angle_k.cos(), angle_k.sin(), torch.zeros_like(angle_k)
    return _resample(pixels, (cos_k, -sin_k, zero_k), (sin_k, cos_k, zero_k))


def _shear(pixels: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """Rows slide sideways, the further the lower; the upper edge stays."""
    slope_k = strength.view(-1) * (MAX_SHEAR * pixels.shape[2] / pixels.shape[3])
    one_k, zero_k = torch.ones_like(slope_k), torch.zeros_like(slope_k)
    return _resample(pixels, (one_k, slope_k, slope_k), (zero_k, one_k, zero_k))


def _resample(
    pixels: torch.Tensor, row_x: tuple[torch.Tensor, ...], row_y: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """Nearest pixels, black outside."""
    theta_k23 = torch.stack((torch.stack(row_x, dim=1), torch.stack(row_y, dim=1)), dim=1)
    grid = F.affine_grid(theta_k23, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels.float(), grid, mode="nearest", padding_mode="zeros", align_corners=False).byte()


def _blend(image: torch.Tensor, other: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    return torch.lerp(other, image, 1 + MAX_BLEND * strength).clamp_(0, 255).byte()


def _grey(image: torch.Tensor) -> torch.Tensor:
    """Luma (ITU-R 601), rounded down as in 8 bits."""
    red, green, blue = image.split(1, dim=1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).floor_()


def _colour(pixels: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    image = pixels.float()
    return _blend(image, _grey(image), strength)


def _contrast(pixels: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    image = pixels.float()
    return _blend(image, _grey(image).mean(dim=(1, 2, 3), keepdim=True), strength)


def _sharpness(pixels: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """Away from, or towards, a 3 x 3 smoothing; the outermost pixels stay."""
    image = pixels.float()
    around = F.avg_pool2d(image, 3, stride=1) * 9
    inner = image[:, :, 1:-1, 1:-1]
    smooth = image.clone()
    smooth[:, :, 1:-1, 1:-1] = ((around + 4 * inner) / 13).round_()
    return _blend(image, smooth, strength)


def _posterize(pixels: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    kept = (MAX_BITS_DROPPED * strength).round().to(torch.int32)
    return pixels & (255 << kept).byte()


def _solarize(pixels: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    return torch.where(pixels >= 255 * (1 - strength), 255 - pixels, pixels)


def _autocontrast(pixels: torch.Tensor, _strength: torch.Tensor) -> torch.Tensor:
    """Each channel stretched to the whole range; a channel of one value stays."""
    low, high = pixels.amin(dim=(2, 3), keepdim=True).float(), pixels.amax(dim=(2, 3), keepdim=True).float()
    is_flat = low == high
    scale = torch.where(is_flat, 1.0, 255 / (high - low))
    return ((pixels - low.masked_fill(is_flat, 0)) * scale).clamp_(0, 255).byte()


def _equalize(pixels: torch.Tensor, _strength: torch.Tensor) -> torch.Tensor:
    """Each channel's histogram made level, in Pillow's integer arithmetic; a channel of one value stays."""
    flat = pixels.flatten(2).long()
    count_v = torch.zeros((*flat.shape[:2], 256), dtype=torch.int32, device=flat.device)
    count_v.scatter_add_(2, flat, torch.ones((), dtype=torch.int32, device=flat.device).expand(flat.shape))
    below_v = count_v.cumsum(dim=2)
    highest = pixels.amax(dim=(2, 3)).long()[..., None]
    step = (below_v[..., -1:] - count_v.gather(2, highest)) // 255
    table_v = (below_v - count_v + step // 2) // step.clamp(min=1)
    value_v = torch.arange(256, device=flat.device).expand_as(table_v)
    table_v = torch.where(step == 0, value_v, table_v.clamp_(max=255)).byte()
    return table_v.gather(2, flat).view(pixels.shape)


def _invert(pixels: torch.Tensor, _strength: torch.Tensor) -> torch.Tensor:
    return 255 - pixels


# By name, at a strength from -1 to 1 (from 0 where they know no direction).
OPERATIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "rotate": _rotate,
    "shear": _shear,
    "colour": _colour,
    "contrast": _contrast,
    "sharpness": _sharpness,
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "invert": _invert,
}
