"""Augmentation of whole batches on their device; every image draws its own changes.

All draws come from a CPU generator, so that they are the same on every device.
Axes: b images, c channels, h and w pixels. Pixel values run from 0 to 255.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as tv

Augment = Literal["none", "flips", "standard", "autoaugment"]
MAX_ROTATION_DEGREES = 15.0
MAX_SHIFT_FRAC = 0.05
# Half a step between neighbouring skin types at most: stronger changes would move images from one to another.
MAX_BRIGHTNESS_CHANGE = 0.1
MAX_CONTRAST_CHANGE = 0.1


def augment_floats(
    image_bchw: torch.Tensor, *, kind: Augment | str, generator: torch.Generator
) -> torch.Tensor:
    """Flip (all kinds); rotate, shift and light anew (``standard``); rotate and shift (``autoaugment``)."""
    if kind == "flips":
        return random_flips(image_bchw, generator=generator)
    moved = rotate_and_shift(image_bchw, generator=generator)
    return change_light(moved, generator=generator) if kind == "standard" else moved


def random_flips(image_bchw: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
    """Each image mirrored left to right with probability 1/2 and, independently, upside down."""
    across, down = torch.rand((2, len(image_bchw), 1, 1, 1), generator=generator).lt(0.5).to(image_bchw.device)
    image_bchw = torch.where(across, image_bchw.flip(3), image_bchw)
    return torch.where(down, image_bchw.flip(2), image_bchw)


def rotate_and_shift(image_bchw: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
    """Flip at random, rotate by up to 15 degrees and shift by up to 5 % of the side, in one resampling.

    What enters the image is mirrored from inside, so that no black corners appear.
    """
    draw_4b = torch.rand((4, len(image_bchw)), generator=generator)
    sign_2b = torch.rand((2, len(image_bchw)), generator=generator).lt(0.5) * 2.0 - 1
    angle_b = (2 * draw_4b[0] - 1) * math.radians(MAX_ROTATION_DEGREES)
    shift_2b = (2 * draw_4b[1:3] - 1) * 2 * MAX_SHIFT_FRAC
    cos_b, sin_b = angle_b.cos(), angle_b.sin()
    row_x = torch.stack((sign_2b[0] * cos_b, -sign_2b[0] * sin_b, shift_2b[0]), dim=1)
    row_y = torch.stack((sign_2b[1] * sin_b, sign_2b[1] * cos_b, shift_2b[1]), dim=1)
    theta_b23 = torch.stack((row_x, row_y), dim=1).to(image_bchw.device, image_bchw.dtype)
    grid = _affine_grid(theta_b23, *image_bchw.shape[2:])
    return F.grid_sample(image_bchw, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _affine_grid(theta_b23: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """What ``F.affine_grid(..., align_corners=False)`` gives, in a fifth of its time: sums, no matrix product."""
    device, dtype = theta_b23.device, theta_b23.dtype
    x_w, y_h = ((2 * torch.arange(size, device=device, dtype=dtype) + 1) / size - 1 for size in (width, height))
    across_bhw2 = theta_b23[:, None, None, :, 0] * x_w[None, None, :, None]
    down_bhw2 = theta_b23[:, None, None, :, 1] * y_h[None, :, None, None] + theta_b23[:, None, None, :, 2]
    return across_bhw2 + down_bhw2


def change_light(image_bchw: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
    """Brightness and contrast (about the image's mean) changed by up to 10 % each; colours keep their hue."""
    draw_2b = 2 * torch.rand((2, len(image_bchw), 1, 1, 1), generator=generator) - 1
    bright_b, contrast_b = (1 + draw_2b * draw_2b.new_tensor([MAX_BRIGHTNESS_CHANGE, MAX_CONTRAST_CHANGE]).view(
        2, 1, 1, 1, 1
    )).to(image_bchw.device)  # fmt: skip
    mean_b = image_bchw.mean(dim=(1, 2, 3), keepdim=True)
    lit_bchw = torch.addcmul(mean_b * (1 - contrast_b) * bright_b, image_bchw, contrast_b * bright_b)
    return lit_bchw.clamp_(0, 255)


# --- AutoAugment ------------------------------------------------------------------------------------

# Cubuk et al. 2019, table 9 (policy found on ImageNet): two operations each, as (name, probability, level 0 to 9).
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
# Operations by name, at a strength from -1 to 1 (from 0 where they know no direction).
OPERATIONS: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "rotate": lambda pixels, strength: tv.rotate(pixels, 30.0 * strength),
    "shear": lambda pixels, strength: tv.affine(
        pixels,
        angle=0.0,
        translate=[0, 0],
        scale=1.0,
        shear=[math.degrees(math.atan(0.3 * strength)), 0.0],
        center=[0, 0],
    ),
    "colour": lambda pixels, strength: tv.adjust_saturation(pixels, 1 + 0.9 * strength),
    "contrast": lambda pixels, strength: tv.adjust_contrast(pixels, 1 + 0.9 * strength),
    "sharpness": lambda pixels, strength: tv.adjust_sharpness(pixels, 1 + 0.9 * strength),
    "posterize": lambda pixels, strength: tv.posterize(pixels, 8 - round(4 * strength)),
    "solarize": lambda pixels, strength: tv.solarize(pixels, 255.0 * (1 - strength)),
    "autocontrast": lambda pixels, _strength: tv.autocontrast(pixels),
    "equalize": lambda pixels, _strength: tv.equalize(pixels),
    "invert": lambda pixels, _strength: tv.invert(pixels),
}
SIGNED = frozenset({"rotate", "shear", "colour", "contrast", "sharpness"})


def auto_augment(pixels_bchw: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
    """AutoAugment's ImageNet policy (Cubuk et al. 2019), drawn for each uint8 image.

    Images that drew the same operation at the same strength go through it together. Colours are changed as
    strongly as published, also those of skin: ``standard`` is the gentle choice.
    """
    batch = len(pixels_bchw)
    pair_b = torch.randint(len(IMAGENET_POLICY), (batch,), generator=generator).tolist()
    draw_2b = torch.rand((2, batch), generator=generator).tolist()
    is_negative_2b = torch.rand((2, batch), generator=generator).lt(0.5).tolist()
    changed_bchw = pixels_bchw.clone(memory_format=torch.contiguous_format)
    for turn in range(2):
        rows_of: dict[tuple[str, float], list[int]] = defaultdict(list)
        for row, pair in enumerate(pair_b):
            name, probability, level = IMAGENET_POLICY[pair][turn]
            if draw_2b[turn][row] < probability:
                sign = -1 if name in SIGNED and is_negative_2b[turn][row] else 1
                rows_of[name, sign * level / HIGHEST_LEVEL].append(row)
        for (name, strength), rows in rows_of.items():
            index = torch.tensor(rows, device=pixels_bchw.device)
            changed_bchw[index] = OPERATIONS[name](changed_bchw[index], strength)
    return changed_bchw
