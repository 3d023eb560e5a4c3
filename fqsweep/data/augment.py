"""Augmentation of whole batches on their device; every image draws its own changes.

All draws come from a CPU generator, so that they are the same on every device.
Axes: b images, c channels, h and w pixels. Pixel values run from 0 to 255.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F

cv2.setNumThreads(1)  # threads are ours to give: a trial has as many as it was promised

Augment = Literal["none", "flips", "standard", "autoaugment"]
MAX_ROTATION_DEGREES = 15.0
MAX_SHIFT_FRAC = 0.05
MIN_CROP_FRAC = 0.85
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


def flip(image_bchw: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
    """Mirror each image left to right with probability 1/2 and, independently, upside down; in place."""
    across_b, down_b = torch.rand((2, len(image_bchw)), generator=generator).lt(0.5)
    for axes, is_drawn_b in (([3], across_b & ~down_b), ([2], down_b & ~across_b), ([2, 3], across_b & down_b)):
        row_k = is_drawn_b.nonzero().squeeze(1).to(image_bchw.device, non_blocking=True)
        image_bchw.index_copy_(0, row_k, image_bchw.index_select(0, row_k).flip(axes))
    return image_bchw


@dataclass(frozen=True, kw_only=True)
class Moves:
    """What happens to each image of a batch, drawn on the CPU.

    Attributes:
        theta_b23: the affine map from an image's new to its old coordinates, both from -1 to 1; float32.
        light_b2: two factors: new value = first * old value + second * mean of the image; float32.
    """

    theta_b23: torch.Tensor
    light_b2: torch.Tensor


def draw_moves(batch: int, *, with_crop_and_light: bool, generator: torch.Generator) -> Moves:
    """Flips at random, rotation by up to 15 degrees, shift by up to 5 % of the side.

    Args:
        batch: how many images.
        with_crop_and_light: also crop to 85 to 100 % of the side, and change brightness and contrast (about the
            image's mean) by up to 10 % each; colours keep their hue.
        generator: of the CPU, on every device.
    """
    draw_6b = 2 * torch.rand((6, batch), generator=generator) - 1
    sign_2b = torch.rand((2, batch), generator=generator).lt(0.5) * 2.0 - 1
    angle_b, shift_2b = draw_6b[0] * math.radians(MAX_ROTATION_DEGREES), draw_6b[1:3] * 2 * MAX_SHIFT_FRAC
    side_b = 1 - (1 - MIN_CROP_FRAC) * (draw_6b[3] + 1) / 2 if with_crop_and_light else torch.ones(batch)
    cos_b, sin_b = side_b * angle_b.cos(), side_b * angle_b.sin()
    row_x = torch.stack((sign_2b[0] * cos_b, -sign_2b[0] * sin_b, shift_2b[0]), dim=1)
    row_y = torch.stack((sign_2b[1] * sin_b, sign_2b[1] * cos_b, shift_2b[1]), dim=1)
    bright_b, contrast_b = 1 + MAX_BRIGHTNESS_CHANGE * draw_6b[4], 1 + MAX_CONTRAST_CHANGE * draw_6b[5]
    light_b2 = torch.stack((bright_b * contrast_b, bright_b * (1 - contrast_b)), dim=1)
    return Moves(
        theta_b23=torch.stack((row_x, row_y), dim=1),
        light_b2=light_b2 if with_crop_and_light else torch.tensor([1.0, 0.0]).expand(batch, 2),
    )


def move(pixels_bchw: torch.Tensor, moves: Moves, values: Values) -> torch.Tensor:
    """Images moved, lit anew and normalised, in one resampling (bilinear).

    What enters an image is mirrored from inside, so that no black corners appear. On a CPU OpenCV resamples the
    bytes and looks their new values up, ten times as fast as torch's passes over floating-point images; moved pixels
    are rounded to whole values.

    Args:
        pixels_bchw: uint8, three channels.

    Returns:
        float32 (b, c, h, w), contiguous.
    """
    if pixels_bchw.device.type != "cpu":
        return move_by_torch(pixels_bchw, moves, values)
    batch, _, height, width = pixels_bchw.shape
    pixels_bhwc = pixels_bchw.permute(0, 2, 3, 1).contiguous().numpy()
    mean_b = np.array([sum(cv2.mean(pixels)) / 3 for pixels in pixels_bhwc], dtype=np.float32)
    table_bcv = _value_tables(mean_b, moves.light_b2.numpy(), values)
    map_b23 = _pixel_maps(moves.theta_b23, height, width).numpy()
    image_bchw = np.empty((batch, 3, height, width), dtype=np.float32)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP

    def work(rows: range) -> None:
        for row in rows:
            # With a fourth channel OpenCV resamples to the same bytes in less than half the time.
            four_hwc = cv2.cvtColor(pixels_bhwc[row], cv2.COLOR_RGB2RGBA)
            moved_hwc = cv2.warpAffine(
                four_hwc, map_b23[row], (width, height), flags=flags, borderMode=cv2.BORDER_REFLECT
            )
            for channel in range(3):
                plane_hw = cv2.extractChannel(moved_hwc, channel)
                cv2.LUT(plane_hw, table_bcv[row, channel], image_bchw[row, channel])

    num_threads = torch.get_num_threads()
    if num_threads == 1:
        work(range(batch))
    else:
        list(
            _threads(num_threads).map(work, [range(first, batch, num_threads) for first in range(num_threads)])
        )
    return torch.from_numpy(image_bchw)


@lru_cache
def _threads(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads)


def _value_tables(mean_b: np.ndarray, light_b2: np.ndarray, values: Values) -> np.ndarray:
    """What each of the 256 pixel values v becomes: lit anew, normalised; float32 (b, c, v).

    By NumPy, because torch's threads go on spinning for a while after such a sum and hold up those that resample.
    """
    scale_c1, shift_c1 = (value.numpy().reshape(1, 3, 1) for value in (values.scale_c, values.shift_c))
    gain_b, keep_b = light_b2.T.reshape(2, -1, 1, 1)
    lit_b1v = (gain_b * np.arange(256, dtype=np.float32) + mean_b.reshape(-1, 1, 1) * keep_b).clip(0, 255)
    return np.ascontiguousarray(lit_b1v * scale_c1 + shift_c1)


def _pixel_maps(theta_b23: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Maps from new to old places in pixels, float64 (b, 2, 3), of maps in coordinates from -1 to 1."""
    side = torch.tensor([width, height], dtype=torch.float64)
    linear_b22 = theta_b23[:, :, :2].double() * side[:, None] / side[None, :]
    first = 1 / side - 1  # where the first pixel's middle lies
    shift_b2 = (theta_b23[:, :, :2].double() @ first + theta_b23[:, :, 2] + 1) * side / 2 - 0.5
    return torch.cat((linear_b22, shift_b2[:, :, None]), dim=2)


def move_by_torch(pixels_bchw: torch.Tensor, moves: Moves, values: Values) -> torch.Tensor:
    """As ``move``, on any device."""
    theta_b23, light_b2 = (
        drawn.to(pixels_bchw.device, non_blocking=True) for drawn in (moves.theta_b23, moves.light_b2)
    )
    image_bchw = pixels_bchw.to(torch.float32, memory_format=torch.contiguous_format)
    grid = _affine_grid(theta_b23, *image_bchw.shape[2:])
    moved_bchw = F.grid_sample(
        image_bchw, grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
    scale_c, shift_c = values.scale_c, values.shift_c
    gain_b, keep_b = light_b2.T.reshape(2, -1, 1, 1, 1)
    offset_b = image_bchw.mean(dim=(1, 2, 3), keepdim=True) * keep_b
    lit_bchw = torch.addcmul(offset_b * scale_c + shift_c, moved_bchw, gain_b * scale_c, out=moved_bchw)
    return lit_bchw.clamp_(min=shift_c, max=255 * scale_c + shift_c)


def _affine_grid(theta_b23: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """What ``F.affine_grid(..., align_corners=False)`` gives, in an eighth of its time: one sum of complex numbers.

    Returns:
        float32 (b, height, width, 2), x and y.
    """
    x_w, y_h = ((2 * torch.arange(size, device=theta_b23.device) + 1) / size - 1 for size in (width, height))
    x_b, y_b, shift_b = torch.view_as_complex(theta_b23.mT.contiguous()).unbind(1)
    across_bw, down_bh = x_b[:, None] * x_w, y_b[:, None] * y_h + shift_b[:, None]
    return torch.view_as_real(across_bw[:, None, :] + down_bh[:, :, None])
