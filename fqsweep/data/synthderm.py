"""Synthderm: procedural skin images with six diagnoses on six skin types, for use without any download.

The classes differ in shape, border, colour and texture, with an overlap that ``difficulty`` sets; darker
types are rarer (``imbalance``) and show lesions with less contrast, so that a classifier serves them worse
for the two reasons that are reported for real data. It is no clinical data and says nothing about patients.

Axes: n images, f features of a lesion, k classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from fqsweep.config import SynthdermConfig, content_hash, plain_attributes
from fqsweep.data.assembly import Rows, assemble
from fqsweep.data.records import ImageSource, Samples
from fqsweep.data.synthderm_paint import Appearance, Skin, paint

GENERATOR_VERSION = 1
SKIN_TYPES = ("I", "II", "III", "IV", "V", "VI")
SKIN_TONES = ("I-III", "IV-VI")
TYPICAL: dict[str, Appearance] = {
    "naevus": Appearance(
        size=0.35,
        asymmetry=0.1,
        irregularity=0.1,
        softness=0.35,
        melanin=0.6,
        blood=0.1,
        variegation=0.15,
        network=0.75,
        globules=0.35,
    ),
    "melanoma": Appearance(
        size=0.65,
        asymmetry=0.85,
        irregularity=0.8,
        softness=0.3,
        melanin=0.75,
        blood=0.2,
        veil=0.6,
        variegation=0.8,
        network=0.5,
        globules=0.3,
        streaks=0.6,
        scale=0.05,
        vessels=0.1,
    ),
    "basal cell carcinoma": Appearance(
        size=0.45,
        asymmetry=0.4,
        irregularity=0.4,
        softness=0.7,
        melanin=0.05,
        blood=0.35,
        veil=0.3,
        variegation=0.4,
        globules=0.1,
        scale=0.15,
        vessels=0.9,
        cysts=0.1,
    ),
    "seborrhoeic keratosis": Appearance(
        size=0.55,
        asymmetry=0.35,
        irregularity=0.35,
        softness=0.0,
        melanin=0.6,
        blood=0.05,
        veil=0.05,
        variegation=0.4,
        network=0.05,
        globules=0.4,
        scale=0.2,
        cysts=0.9,
    ),
    "psoriasis": Appearance(
        size=0.85,
        asymmetry=0.5,
        irregularity=0.55,
        softness=0.25,
        melanin=0.05,
        blood=0.7,
        variegation=0.3,
        scale=0.85,
        vessels=0.2,
        cysts=0.1,
    ),
    "vascular lesion": Appearance(
        size=0.35,
        asymmetry=0.25,
        irregularity=0.2,
        softness=0.15,
        melanin=0.05,
        blood=0.45,
        veil=0.1,
        variegation=0.3,
        scale=0.1,
        vessels=0.2,
        cysts=0.05,
        lacunae=0.9,
    ),
}
CLASS_NAMES = tuple(TYPICAL)
_TYPICAL_KF = np.array([[getattr(look, name) for name in Appearance.names()] for look in TYPICAL.values()])
# How much of the lesion's pigment shows on each type, and how noisy its images are.
_CONTRAST = (1.0, 0.96, 0.9, 0.76, 0.6, 0.48)
_NOISE = 0.022


@dataclass(frozen=True)
class SynthdermSource:
    """Paints images on demand; their pixels depend on the generator's settings and their number alone.

    Attributes:
        number_n: number of each image within the generator's endless sequence.
        label_n, type_n: class and skin type of each.
    """

    config: SynthdermConfig
    number_n: np.ndarray
    label_n: np.ndarray
    type_n: np.ndarray

    def read(self, index: int, *, size: int) -> np.ndarray:
        """Image ``index`` as uint8 (size, size, 3), RGB."""
        label, skin_type, number = (int(code_n[index]) for code_n in (self.label_n, self.type_n, self.number_n))
        return paint_image(self.config, number, label=label, skin_type=skin_type, size=size)

    def path_of(self, _index: int) -> None:
        """None: these images are in no file."""


@dataclass(frozen=True)
class PaintedImages:
    """All images of a set, none of which can be missing; ``label_n`` and ``type_n`` as in their source."""

    config: SynthdermConfig
    label_n: np.ndarray
    type_n: np.ndarray

    def present(self) -> np.ndarray:
        """All true, bool (n,)."""
        return np.ones(len(self.label_n), dtype=bool)

    def open(self, kept: np.ndarray) -> tuple[ImageSource, str]:
        """The painter of these images, and a hash of the generator's settings."""
        settings = {
            "version": GENERATOR_VERSION,
            "difficulty": self.config.difficulty,
            "seed": self.config.generator_seed,
            "imbalance": self.config.imbalance,
        }
        source = SynthdermSource(self.config, kept, self.label_n[kept], self.type_n[kept])
        return source, content_hash(settings)


def describe(config: SynthdermConfig) -> Samples:
    """All images of the set that ``config`` describes; nothing is painted yet.

    Raises:
        InputError: the label map names an unknown class.
    """
    label_n, type_n = _draw_codes(config)
    names = {"skin_type": np.array(SKIN_TYPES)[type_n], "skin_tone": np.array(SKIN_TONES)[type_n // 3]}
    rows = Rows(
        origin="synthderm",
        id_n=np.array([f"synthderm_{number:06d}" for number in range(config.num_images)]),
        label_n=np.array(CLASS_NAMES)[label_n],
        cluster_n=np.full(config.num_images, ""),
        class_names=CLASS_NAMES,
        group_n={attribute: names[attribute] for attribute in plain_attributes(config.group_attributes)},
        group_names={"skin_type": SKIN_TYPES, "skin_tone": SKIN_TONES},
        images=PaintedImages(config, label_n, type_n),
    )
    return assemble(rows, config)


def paint_image(config: SynthdermConfig, number: int, *, label: int, skin_type: int, size: int) -> np.ndarray:
    """Image ``number`` of the sequence, as uint8 (size, size, 3), with this class and skin type."""
    rng = np.random.Generator(np.random.PCG64([config.generator_seed, number]))
    appearance = draw_appearance(label, rng, difficulty=config.difficulty)
    skin = Skin(type_code=skin_type, contrast=_CONTRAST[skin_type] * rng.uniform(0.75, 1.05), noise=_NOISE)
    return paint(appearance, skin, rng, size=size)


def draw_appearance(label: int, rng: np.random.Generator, *, difficulty: float) -> Appearance:
    """A lesion of class ``label``: the typical one, moved towards another class and shaken.

    The move covers up to ``0.75 difficulty`` of the way (mostly much less), so that some lesions lie nearer
    to the other class than to their own, as atypical ones do.
    """
    other = (label + 1 + int(rng.random() * (len(CLASS_NAMES) - 1))) % len(CLASS_NAMES)
    share = 0.75 * difficulty * rng.random() ** 1.5
    mixed_f = (1 - share) * _TYPICAL_KF[label] + share * _TYPICAL_KF[other]
    shaken_f = mixed_f + (0.06 + 0.2 * difficulty) * rng.standard_normal(len(mixed_f)) * (0.25 + mixed_f)
    values_f = np.clip(shaken_f, 0.0, 1.0)
    return Appearance(**dict(zip(Appearance.names(), values_f.tolist(), strict=True)))


def type_shares(imbalance: float) -> np.ndarray:
    """Share of each skin type, falling geometrically from I to VI by ``imbalance`` in all."""
    weight = imbalance ** (-np.arange(len(SKIN_TYPES)) / (len(SKIN_TYPES) - 1))
    return np.asarray(weight / weight.sum())


def _draw_codes(config: SynthdermConfig) -> tuple[np.ndarray, np.ndarray]:
    """Class and skin type of every image, int64 (n,); more images leave the first ones as they were."""
    draw_n2 = np.random.Generator(np.random.PCG64([config.generator_seed, 2**32 - 1])).random(
        (config.num_images, 2)
    )
    label_n = (draw_n2[:, 0] * len(CLASS_NAMES)).astype(np.int64)
    type_n = np.searchsorted(np.cumsum(type_shares(config.imbalance))[:-1], draw_n2[:, 1], side="right")
    return label_n, type_n.astype(np.int64)


def contact_sheet(config: SynthdermConfig, *, size: int) -> Image.Image:
    """One image per skin type (rows, I at the top) and class (columns), each ``size`` pixels wide."""
    columns, rows = len(CLASS_NAMES), len(SKIN_TYPES)
    cells = [
        paint_image(config, number, label=number % columns, skin_type=number // columns, size=size)
        for number in range(rows * columns)
    ]
    grid = np.stack(cells).reshape(rows, columns, size, size, 3)
    return Image.fromarray(grid.transpose(0, 2, 1, 3, 4).reshape(rows * size, columns * size, 3))
