"""Augmentation of whole batches on their device; every image draws its own changes.

All draws come from a CPU generator, so that they are the same on every device.
Axes: b images, c channels, h and w pixels. Pixel values run from 0 to 255.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

Augment = Literal["none", "flips", "standard", "autoaugment"]
MAX_ROTATION_DEGREES = 15.0
MAX_SHIFT_FRAC = 0.05
# Half a step between neighbouring skin types at most: stronger changes would move images from one to another.
MAX_BRIGHTNESS_CHANGE = 0.1
MAX_CONTRAST_CHANGE = 0.1


@dataclass(frozen=True, kw_only=True)
class Values:
    """How pixel values become the network's numbers: ``value * scale + shift`` of each channel, (1, c, 1, 1)."""

    scale_c: torch.Tensor
    shift_c: torch.Tensor


def normalise(pixels_bchw: torch.Tensor, values: Values) -> torch.Tensor:
    """Pixels uint8 as float32 numbers for the network, contiguous."""
    image_bchw = pixels_bchw.to(torch.float32, memory_format=torch.contiguous_format)
    return image_bchw.mul_(values.scale_c).add_(values.shift_c)


def random_flips(pixels_bchw: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
    """Each image mirrored left to right with probability 1/2 and, independently, upside down."""
    flipped_bchw = pixels_bchw.clone()
    is_flipped_2b = torch.rand((2, len(pixels_bchw)), generator=generator).lt(0.5)
    for axis, is_flipped_b in zip((3, 2), is_flipped_2b, strict=True):
        row_k = is_flipped_b.nonzero().squeeze(1).to(pixels_bchw.device, non_blocking=True)
        flipped_bchw.index_copy_(0, row_k, flipped_bchw.index_select(0, row_k).flip(axis))
    return flipped_bchw


def move(
    pixels_bchw: torch.Tensor, values: Values, *, with_light: bool, generator: torch.Generator
) -> torch.Tensor:
    """Flip at random, rotate by up to 15 degrees and shift by up to 5 % of the side, in one resampling.

    What enters the image is mirrored from inside, so that no black corners appear.

    Args:
        pixels_bchw: uint8.
        values: how pixels become numbers.
        with_light: also change brightness and contrast (about the image's mean) by up to 10 % each; colours keep
            their hue.
        generator: of the CPU, on every device.

    Returns:
        float32 (b, c, h, w), contiguous, normalised.
    """
    theta_b23 = draw_moves(len(pixels_bchw), generator=generator)
    image_bchw = pixels_bchw.to(torch.float32, memory_format=torch.contiguous_format)
    grid = _affine_grid(theta_b23.to(image_bchw.device, non_blocking=True), *image_bchw.shape[2:])
    moved_bchw = F.grid_sample(
        image_bchw, grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
    scale_c, shift_c = values.scale_c, values.shift_c
    if not with_light:
        return moved_bchw.mul_(scale_c).add_(shift_c)
    gain_2b = draw_light(len(pixels_bchw), generator=generator).to(image_bchw.device, non_blocking=True)
    gain_b, keep_b = gain_2b.view(2, -1, 1, 1, 1)
    offset_b = image_bchw.mean(dim=(1, 2, 3), keepdim=True) * keep_b
    lit_bchw = torch.addcmul(offset_b * scale_c + shift_c, moved_bchw, gain_b * scale_c, out=moved_bchw)
    return lit_bchw.clamp_(min=shift_c, max=255 * scale_c + shift_c)


def draw_moves(batch: int, *, generator: torch.Generator) -> torch.Tensor:
    """For each image the affine map float32 (b, 2, 3) from its new to its old coordinates, both from -1 to 1."""
    draw_3b = 2 * torch.rand((3, batch), generator=generator) - 1
    sign_2b = torch.rand((2, batch), generator=generator).lt(0.5) * 2.0 - 1
    angle_b, shift_2b = draw_3b[0] * math.radians(MAX_ROTATION_DEGREES), draw_3b[1:] * 2 * MAX_SHIFT_FRAC
    cos_b, sin_b = angle_b.cos(), angle_b.sin()
    row_x = torch.stack((sign_2b[0] * cos_b, -sign_2b[0] * sin_b, shift_2b[0]), dim=1)
    row_y = torch.stack((sign_2b[1] * sin_b, sign_2b[1] * cos_b, shift_2b[1]), dim=1)
    return torch.stack((row_x, row_y), dim=1)


def draw_light(batch: int, *, generator: torch.Generator) -> torch.Tensor:
    """Two factors for each image, (2, b): new value = first * old value + second * mean of the image."""
    bright_b, contrast_b = 2 * torch.rand((2, batch), generator=generator) - 1
    bright_b, contrast_b = 1 + MAX_BRIGHTNESS_CHANGE * bright_b, 1 + MAX_CONTRAST_CHANGE * contrast_b
    return torch.stack((bright_b * contrast_b, bright_b * (1 - contrast_b)))


def _affine_grid(theta_b23: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """What ``F.affine_grid(..., align_corners=False)`` gives, in an eighth of its time: one sum of complex numbers.

    Returns:
        float32 (b, height, width, 2), x and y.
    """
    x_w, y_h = ((2 * torch.arange(size, device=theta_b23.device) + 1) / size - 1 for size in (width, height))
    x_b, y_b, shift_b = torch.view_as_complex(theta_b23.mT.contiguous()).unbind(1)
    across_bw, down_bh = x_b[:, None] * x_w, y_b[:, None] * y_h + shift_b[:, None]
    return torch.view_as_real(across_bw[:, None, :] + down_bh[:, :, None])
