"""Paint one skin image: skin, lesion, hair, light and noise, all as fields on a square grid.

Colours mix as optical densities (what a pigment absorbs adds up), so that the same lesion changes dark
skin by fewer grey levels than light skin, as it does in clinics. Fields are sums of separable bumps or of
random lattices blown up by interpolation: both are matrix products, which makes an image cost milliseconds,
and neither depends on the pixel grid, which makes it the same image at every size.

Axes: h and w pixels, p points, c colour channels. Coordinates run from -1 to 1 in both directions.
"""

# NumPy types its ufuncs as returning Any.
# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np

# sRGB of unlesioned skin, Fitzpatrick I to VI.
SKIN_RGB = np.array(
    [[240, 208, 192], [230, 190, 165], [210, 165, 134], [174, 124, 92], [130, 87, 62], [96, 63, 47]], np.float32
)
# Optical density per unit of pigment, in red, green, blue.
MELANIN = np.array([0.62, 0.95, 1.15], np.float32)
DEEP_MELANIN = np.array([1.15, 0.85, 0.52], np.float32)
BLOOD = np.array([0.10, 0.95, 0.80], np.float32)
SCALE_RGB = np.array([0.93, 0.91, 0.87], np.float32)
CYST_RGB = np.array([0.95, 0.88, 0.72], np.float32)
HAIR_RGB = np.array([0.10, 0.07, 0.06], np.float32)
MIN_RENDER_SIDE = 96
FAINTEST = 0.02


@dataclass(frozen=True, kw_only=True)
class Appearance:
    """How one lesion looks; every value runs from 0 (none) to 1 (as much as any lesion shows)."""

    size: float
    asymmetry: float
    irregularity: float
    softness: float
    melanin: float = 0.0
    blood: float = 0.0
    veil: float = 0.0
    variegation: float = 0.0
    network: float = 0.0
    globules: float = 0.0
    streaks: float = 0.0
    scale: float = 0.0
    vessels: float = 0.0
    cysts: float = 0.0
    lacunae: float = 0.0

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The features in order."""
        return tuple(field.name for field in fields(cls))


@dataclass(frozen=True, kw_only=True)
class Skin:
    """What surrounds and hides the lesion.

    Attributes:
        type_code: 0 to 5, Fitzpatrick I to VI.
        contrast: factor on everything the lesion adds, 0 to 1.
        noise: standard deviation of the sensor's noise, as a share of white.
    """

    type_code: int
    contrast: float
    noise: float


def paint(appearance: Appearance, skin: Skin, rng: np.random.Generator, *, size: int) -> np.ndarray:
    """One image, uint8 (size, size, 3): painted on a grid of at least 96 pixels, then averaged down."""
    factor = -(-MIN_RENDER_SIDE // size)
    canvas = _Canvas.of(size * factor)
    density_hwc = _skin_density(canvas, skin, rng)
    mask_hw = _lesion_mask(canvas, appearance, rng)
    density_hwc += skin.contrast * _lesion_density(canvas, appearance, mask_hw, rng)
    rgb_hwc = np.exp(-np.maximum(density_hwc, 0.0))
    shown_hw = skin.contrast * mask_hw
    _overlay(rgb_hwc, SCALE_RGB, _shown(appearance.scale, lambda: shown_hw * _scale(canvas, rng)))
    _overlay(rgb_hwc, CYST_RGB, _shown(appearance.cysts, lambda: shown_hw * _cysts(canvas, rng)))
    _overlay(rgb_hwc, HAIR_RGB, _hair(canvas, rng))
    rgb_hwc *= _light(canvas, rng)[..., None]
    rgb_hwc += _sensor_noise(canvas, skin, rng)
    return _to_uint8(rgb_hwc, factor=factor)


# --- the grid and its two kinds of fields -----------------------------------------------------------


@dataclass(frozen=True)
class _Canvas:
    side: int
    axis: np.ndarray

    @staticmethod
    @lru_cache(maxsize=8)
    def of(side: int) -> _Canvas:
        return _Canvas(side, ((np.arange(side) + 0.5) * (2 / side) - 1).astype(np.float32))

    def bumps(self, x_p: np.ndarray, y_p: np.ndarray, radius_p: np.ndarray | float) -> np.ndarray:
        """Sum of Gaussian bumps, (h, w), as one matrix product over points."""
        inverse_p1 = np.reshape(1.0 / np.asarray(radius_p, np.float32), (-1, 1))
        across_pw = np.exp(-np.square((self.axis - x_p.astype(np.float32)[:, None]) * inverse_p1))
        down_ph = np.exp(-np.square((self.axis - y_p.astype(np.float32)[:, None]) * inverse_p1))
        return down_ph.T @ across_pw

    def clouds(self, rng: np.random.Generator, *, cells: int, layers: int = 1) -> np.ndarray:
        """Smooth random fields of about unit variance, (layers, h, w), with ``cells`` lattice steps across."""
        lattice = 1.6 * rng.standard_normal((layers, cells + 3, cells + 3)).astype(np.float32)
        blow_up = _spline(self.side, cells)
        return blow_up @ lattice @ blow_up.T


@lru_cache(maxsize=64)
def _spline(side: int, cells: int) -> np.ndarray:
    """Cubic B-spline weights from ``cells + 3`` lattice points to ``side`` pixel centres."""
    position = (np.arange(side) + 0.5) * (cells / side) + 1.0
    distance = np.abs(position[:, None] - np.arange(cells + 3)[None, :])
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.clip(2 - distance, 0, None) ** 3 / 6
    return np.where(distance < 1, near, far).astype(np.float32)


def _smoothstep(value: np.ndarray) -> np.ndarray:
    clipped = np.clip(value, 0.0, 1.0)
    return clipped * clipped * (3 - 2 * clipped)


def _overlay(rgb_hwc: np.ndarray, colour: np.ndarray, cover_hw: np.ndarray | float) -> None:
    """Blend ``colour`` over the image in place; a plain number is nothing to blend."""
    if isinstance(cover_hw, np.ndarray):
        rgb_hwc += np.clip(cover_hw, 0.0, 1.0)[..., None] * (colour - rgb_hwc)


# --- skin -------------------------------------------------------------------------------------------


def _skin_density(canvas: _Canvas, skin: Skin, rng: np.random.Generator) -> np.ndarray:
    base = -np.log(SKIN_RGB[skin.type_code] / 255)
    tone = np.float32(rng.normal(0.0, 0.07)) * MELANIN + np.float32(rng.normal(0.03, 0.04)) * BLOOD
    mottle = 0.035 * canvas.clouds(rng, cells=6)[0] + 0.02 * canvas.clouds(rng, cells=22)[0]
    flush = 0.05 * canvas.clouds(rng, cells=3)[0]
    creases = 0.05 * np.abs(canvas.clouds(rng, cells=14)[0])
    return base + tone + (mottle - creases)[..., None] * MELANIN + flush[..., None] * BLOOD


# --- lesion -----------------------------------------------------------------------------------------


def _lesion_mask(canvas: _Canvas, look: Appearance, rng: np.random.Generator) -> np.ndarray:
    """1 inside the lesion, 0 outside: an ellipse whose distance is bent by coarse and fine clouds."""
    centre_x, centre_y = rng.uniform(-0.16, 0.16, 2)
    turn, stretch = rng.uniform(0, np.pi), 1 + (0.12 + 0.45 * look.asymmetry) * rng.random()
    radius = 0.30 + 0.38 * look.size
    x, y = canvas.axis[None, :] - centre_x, canvas.axis[:, None] - centre_y
    along = (np.cos(turn) * x + np.sin(turn) * y) / (radius * stretch)
    across = (np.cos(turn) * y - np.sin(turn) * x) / radius
    distance = np.sqrt(along**2 + across**2)
    distance += 0.24 * look.asymmetry * canvas.clouds(rng, cells=3)[0]
    distance += 0.17 * look.irregularity * canvas.clouds(rng, cells=10)[0]
    width = 0.10 + 0.55 * look.softness
    return _smoothstep((1 - distance) / width + 0.5)


def _lesion_density(
    canvas: _Canvas, look: Appearance, mask_hw: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """What the lesion absorbs, (h, w, c): brown, deep blue-grey and red pigment, each with its pattern."""
    patchy, deep_patch = canvas.clouds(rng, cells=4, layers=2)
    points = _points_inside(mask_hw, canvas, rng)
    brown = look.melanin * (0.75 + 0.5 * look.variegation * patchy)
    brown += _shown(look.network, lambda: (0.3 + 0.8 * look.melanin) * _network(canvas, rng))
    brown += _shown(look.globules, lambda: _globules(canvas, points, rng))
    brown = np.maximum(brown, -0.1) * mask_hw
    brown += _shown(look.streaks, lambda: 0.9 * _streaks(canvas, mask_hw, rng))
    lacunae = _shown(look.lacunae, lambda: mask_hw * _lacunae(canvas, points, rng))
    deep = 1.1 * look.veil * _smoothstep(0.5 + 0.9 * deep_patch) * mask_hw + 0.45 * lacunae
    red = look.blood * (0.75 + 0.25 * patchy) * mask_hw + lacunae
    red += _shown(look.vessels, lambda: mask_hw * _vessels(canvas, points, rng))
    pigment_hwp = np.stack((1.05 * brown, deep, red), axis=-1)
    return pigment_hwp @ np.stack((MELANIN, DEEP_MELANIN, BLOOD))


def _shown(weight: float, pattern: Callable[[], np.ndarray]) -> np.ndarray | float:
    """``weight * pattern()``, without the cost of painting what could not be seen."""
    return weight * pattern() if weight >= FAINTEST else 0.0


def _points_inside(mask_hw: np.ndarray, canvas: _Canvas, rng: np.random.Generator) -> np.ndarray:
    """64 points (p, 2) as x, y; those that fall outside the lesion are moved in towards its middle."""
    cell = rng.random((64, 2)) * 1.5 - 0.75
    for shrink in (0.75, 0.5):
        column, row = (np.clip((cell.T + 1) / 2, 0, 1 - 1e-9) * canvas.side).astype(int)
        cell = np.where((mask_hw[row, column] > 0.55)[:, None], cell, cell * shrink)
    return cell


def _network(canvas: _Canvas, rng: np.random.Generator) -> np.ndarray:
    """Dark lines around light holes: three plane waves at 120 degrees, bent a little."""
    turn, frequency = rng.uniform(0, np.pi), rng.uniform(26, 34)
    bend = 0.07 * canvas.clouds(rng, cells=5, layers=2)
    x, y = canvas.axis[None, :] + bend[0], canvas.axis[:, None] + bend[1]
    waves = np.zeros_like(x)
    for third in range(3):
        angle = turn + third * 2 * np.pi / 3
        waves += np.cos(float(frequency * np.cos(angle)) * x + float(frequency * np.sin(angle)) * y)
    return _smoothstep(0.4 - 0.4 * waves) - 0.4


def _globules(canvas: _Canvas, points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Round dark dots of about one size."""
    chosen = points[:26]
    radius = rng.uniform(0.035, 0.06, len(chosen))
    return np.minimum(canvas.bumps(chosen[:, 0], chosen[:, 1], radius), 1.3)


def _streaks(canvas: _Canvas, mask_hw: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Short dark lines that leave the lesion outwards."""
    weight = mask_hw.sum()
    centre_x, centre_y = (mask_hw.sum(0) @ canvas.axis) / weight, (mask_hw.sum(1) @ canvas.axis) / weight
    reach = np.sqrt(weight / np.pi) * 2 / canvas.side
    angle = np.arange(15) * (2 * np.pi / 15) + rng.uniform(0, 0.6, 15)
    end = rng.uniform(0.95, 1.25, 15)
    step_ps = reach * (0.8 + (end - 0.8)[:, None] * np.linspace(0, 1, 7))
    x = centre_x + np.cos(angle)[:, None] * step_ps
    y = centre_y + np.sin(angle)[:, None] * step_ps
    thin = 0.032 - 0.016 * np.linspace(0, 1, 7)
    return np.minimum(canvas.bumps(x.ravel(), y.ravel(), np.tile(thin, 15)), 1.0)


def _vessels(canvas: _Canvas, points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Thin red lines that wander through the lesion."""
    start = points[26:33]
    heading = rng.uniform(0, 2 * np.pi, len(start))
    turns = heading[:, None] + np.cumsum(rng.normal(0, 0.35, (len(start), 18)), axis=1)
    x = start[:, :1] + np.cumsum(0.034 * np.cos(turns), axis=1)
    y = start[:, 1:] + np.cumsum(0.034 * np.sin(turns), axis=1)
    return np.minimum(canvas.bumps(x.ravel(), y.ravel(), 0.024), 1.0)


def _lacunae(canvas: _Canvas, points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Large round lakes of blood, close together."""
    chosen = points[33:45]
    radius = rng.uniform(0.09, 0.17, len(chosen))
    return _smoothstep(1.2 * canvas.bumps(chosen[:, 0], chosen[:, 1], radius))


def _scale(canvas: _Canvas, rng: np.random.Generator) -> np.ndarray:
    """White flakes: the peaks of fine clouds."""
    fine, coarse = canvas.clouds(rng, cells=24)[0], canvas.clouds(rng, cells=8)[0]
    return 0.8 * _smoothstep(0.15 + 0.55 * fine + 0.45 * coarse)


def _cysts(canvas: _Canvas, rng: np.random.Generator) -> np.ndarray:
    """Small bright dots."""
    x, y = rng.uniform(-0.55, 0.55, (2, 22))
    return 0.85 * np.minimum(canvas.bumps(x, y, rng.uniform(0.03, 0.05, 22)), 1.0)


# --- what lies over the lesion ------------------------------------------------------------------------


def _hair(canvas: _Canvas, rng: np.random.Generator) -> np.ndarray:
    """Between none and five dark hairs (mostly one or none), each a gentle arc across the image."""
    count = int(5.0 * rng.random() ** 3)
    start, heading, curl = rng.uniform(-1, 1, (5, 2)), rng.uniform(0, 2 * np.pi, 5), rng.normal(0, 0.3, 5)
    if count == 0:
        return np.zeros((canvas.side, canvas.side))
    step = np.linspace(-0.9, 0.9, 64)
    angle = heading[:count, None] + curl[:count, None] * step
    x = start[:count, :1] + step * np.cos(angle)
    y = start[:count, 1:] + step * np.sin(angle)
    return 0.75 * np.minimum(canvas.bumps(x.ravel(), y.ravel(), 0.017), 1.0)


def _light(canvas: _Canvas, rng: np.random.Generator) -> np.ndarray:
    """Exposure, a gradient across the image, darker corners; one image in four has a dermatoscope's rim."""
    angle, slope, exposure = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.12), rng.uniform(0.9, 1.06)
    x, y = canvas.axis[None, :], canvas.axis[:, None]
    squared = x**2 + y**2
    light = (
        exposure * (1 + slope * (np.cos(angle) * x + np.sin(angle) * y)) * (1 - rng.uniform(0, 0.14) * squared)
    )
    rim, radius = rng.random() < 0.25, rng.uniform(1.05, 1.25)
    return light * _smoothstep((radius**2 - squared) / 0.12 + 0.5) if rim else light


def _sensor_noise(canvas: _Canvas, skin: Skin, rng: np.random.Generator) -> np.ndarray:
    grain = canvas.clouds(rng, cells=40)[0]
    colour = canvas.clouds(rng, cells=20, layers=3)
    return skin.noise * (0.8 * grain[..., None] + 0.6 * np.moveaxis(colour, 0, -1))


def _to_uint8(rgb_hwc: np.ndarray, *, factor: int) -> np.ndarray:
    side = rgb_hwc.shape[0] // factor
    if factor > 1:
        rgb_hwc = rgb_hwc.reshape(side, factor, side, factor, 3).mean(axis=(1, 3))
    return np.rint(np.clip(rgb_hwc, 0.0, 1.0) * 255).astype(np.uint8)
