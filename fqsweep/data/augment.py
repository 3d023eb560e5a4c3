"""Augmentation of whole batches on their device; every image draws its own changes.

All draws come from a CPU generator, so that they are the same on every device.
Axes: b images, c channels, h and w pixels. Pixel values run from 0 to 255.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torchvision.transforms import v2

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
    grid = F.affine_grid(theta_b23, list(image_bchw.shape), align_corners=False)
    return F.grid_sample(image_bchw, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def change_light(image_bchw: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
    """Brightness and contrast (about the image's mean) changed by up to 10 % each; colours keep their hue."""
    draw_2b = 2 * torch.rand((2, len(image_bchw), 1, 1, 1), generator=generator) - 1
    bright_b, contrast_b = (1 + draw_2b * draw_2b.new_tensor([MAX_BRIGHTNESS_CHANGE, MAX_CONTRAST_CHANGE]).view(
        2, 1, 1, 1, 1
    )).to(image_bchw.device)  # fmt: skip
    mean_b = image_bchw.mean(dim=(1, 2, 3), keepdim=True)
    return torch.addcmul(mean_b * (1 - contrast_b) * bright_b, image_bchw, contrast_b * bright_b).clamp_(0, 255)


def auto_augment(pixels_bchw: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
    """AutoAugment's ImageNet policy (Cubuk et al. 2019), drawn for each uint8 image.

    torchvision draws from torch's global state, which is seeded for the batch and then put back.
    """
    policy = _imagenet_policy()
    seed = int(torch.randint(2**62, (1,), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return torch.stack([policy(pixels_chw) for pixels_chw in pixels_bchw])


@lru_cache(maxsize=1)
def _imagenet_policy() -> v2.AutoAugment:
    return v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET)
