"""Images in a folder: finding each one's file, and decoding it to a square of RGB."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from unicodedata import normalize

import numpy as np
from PIL import Image

from fqsweep.config import content_hash, in_data_dir
from fqsweep.data.hashes import hash_files
from fqsweep.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
# What Pillow raises of damaged files; of tags of a wrong type the last four.
_UNREADABLE = (
    *(OSError, SyntaxError, ValueError, IndexError, EOFError, Image.DecompressionBombError),
    *(struct.error, TypeError, AttributeError, KeyError),
)
ORIENTATION_TAG = 0x0112
_TURNED_BACK = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MOST_OF_12_BITS = 4095
Spellings = Callable[[str], Iterable[str]]


def _as_given(name: str) -> tuple[str]:
    return (name,)


@dataclass(frozen=True)
class FolderSource:
    """Decodes the file at each index."""

    paths: tuple[Path, ...]

    def read(self, index: int, *, size: int) -> np.ndarray:
        """Image ``index`` as uint8 (size, size, 3), RGB.

        Raises:
            InputError: the file is missing or cannot be decoded.
        """
        return decode_square(self.paths[index], size=size)

    def path_of(self, index: int) -> Path:
        """Where image ``index`` lies."""
        return self.paths[index]


class MissingImages(InputError):
    """Images that a table lists are not there: ``names`` holds all of them."""

    def __init__(self, message: str, names: Sequence[str]) -> None:
        super().__init__(message)
        self.names = tuple(names)


@dataclass(frozen=True)
class ImageFolder:
    """All image files below ``root``, listed once."""

    root: Path

    @cached_property
    def path_of(self) -> dict[str, Path]:
        """Path below ``root`` (with forward slashes) -> the file."""
        found = {}
        for folder, _, names in os.walk(self.root, followlinks=True):
            for name in names:
                path = Path(folder, name)
                if name.lower().endswith(SUFFIXES) and path.exists():  # a link that leads nowhere is no file
                    found[path.relative_to(self.root).as_posix()] = path
        return found

    @cached_property
    def _by_stem(self) -> dict[str, str]:
        by_rank = sorted(
            self.path_of, key=lambda name: (SUFFIXES.index(Path(name).suffix.lower()), name), reverse=True
        )
        return {_without_suffix(name): name for name in by_rank}

    @cached_property
    def _composed(self) -> dict[str, str]:
        """Names with accents as one character, as most programs write them -> names as some systems store them."""
        plain = {normalize("NFC", name): name for name in self.path_of if not name.isascii()}
        return {
            normalize("NFC", stem): name for stem, name in self._by_stem.items() if not stem.isascii()
        } | plain

    @cached_property
    def _by_last_name(self) -> dict[str, list[str]]:
        """Names without folders and suffixes, in lower case -> the files called so."""
        files: dict[str, list[str]] = {}
        for file in self.path_of:
            files.setdefault(_ending(file).rpartition("/")[2], []).append(file)
        return files

    def find(self, name: str) -> str | None:
        """The file called ``name``; None where there is none.

        The name may be absolute or written with backslashes, lack its suffix or have another image's, and lack the
        first folders where only one file is left that ends like it.
        """
        name = self._below_root(name)
        found = name if name in self.path_of else self._by_stem.get(name)
        if found := found or self._composed.get(normalize("NFC", name)):
            return found
        alike = self.ending_like(name)
        return alike[0] if len(alike) == 1 else None

    def ending_like(self, name: str) -> list[str]:
        """All files whose path ends like ``name``, whatever their suffix."""
        ending = _ending(self._below_root(name))
        called_so = self._by_last_name.get(ending.rpartition("/")[2], [])
        return sorted(file for file in called_so if f"/{_ending(file)}".endswith(f"/{ending}"))

    def _with_zeros(self, name: str) -> str | None:
        """The file that is called like a number, but for zeros before it."""
        if not name.isdigit():
            return None
        own = name.lstrip("0")
        return next(
            (f for f in self.path_of if (stem := Path(f).stem).isdigit() and stem.lstrip("0") == own), None
        )

    @cached_property
    def _absolute(self) -> str:
        return f"{self.root.absolute().as_posix()}/"

    def _below_root(self, name: str) -> str:
        return name.replace("\\", "/").removeprefix("./").removeprefix(self._absolute)

    def open(self, names: Sequence[str], *, spellings: Spellings = _as_given) -> tuple[FolderSource, str]:
        """A source for the images called ``names``, and a hash of their names and bytes.

        Args:
            names: one for each image.
            spellings: other names under which an image is known to be found, best first.

        Raises:
            MissingImages: some are not there; the message counts them and names the first three.
            InputError: two names are one file.
        """
        found = self.locate(names, spellings=spellings)
        missing = [name for name, file in zip(names, found, strict=True) if file is None]
        if missing:
            first = ", ".join(str(self.root / name) for name in missing[:3])
            alike = self.ending_like(missing[0])
            several = f"; called so are {', '.join(alike[:3])}: name one in the table" if alike else ""
            if padded := self._with_zeros(missing[0]):
                several = f"; {padded} is: the column lost the zeros before its numbers, store it as text"
            raise MissingImages(
                f"{len(missing)} of {len(names)} images that the table lists are not in {self.root}, "
                f"first: {first}{several}; complete the folder, remove their rows or set missing_images: drop",
                missing,
            )
        files = [file for file in found if file is not None]
        _refuse_twice(names, files)
        paths = tuple(self.path_of[file] for file in files)
        return FolderSource(paths), content_hash(
            [[name, digest] for name, digest in zip(names, hash_files(self.root, files), strict=True)]
        )

    def locate(self, names: Sequence[str], *, spellings: Spellings = _as_given) -> list[str | None]:
        """The file of each name, None where there is none."""
        return [next((file for other in spellings(name) if (file := self.find(other))), None) for name in names]


def _refuse_twice(names: Sequence[str], files: Sequence[str]) -> None:
    """One file under two names would be two images, which may lie on two sides of the split."""
    first: dict[str, str] = {}
    for name, file in zip(names, files, strict=True):
        other = first.setdefault(file, name)
        if other != name:
            raise InputError(
                f"images {other!r} and {name!r} of the table are one file, {file}: remove one of the rows"
            )


def _without_suffix(name: str) -> str:
    """A path without the suffix of an image."""
    return name[: -len(Path(name).suffix)] if name.lower().endswith(SUFFIXES) else name


def _ending(name: str) -> str:
    """What names that may mean one file have in common: the path without suffix and capitals."""
    return _without_suffix(name).lower()


@dataclass(frozen=True)
class TableImages:
    """The images of a table's rows: ``names`` str (n,), below the folder that ``find_root`` finds when asked."""

    names: np.ndarray
    find_root: Callable[[], Path]
    spellings: Spellings = _as_given

    @cached_property
    def _folder(self) -> ImageFolder:
        return ImageFolder(self.find_root())

    def present(self) -> np.ndarray:
        """Which rows have an image, bool (n,)."""
        found = self._folder.locate(self.names.tolist(), spellings=self.spellings)
        return np.array([file is not None for file in found], dtype=bool)

    def open(self, kept: np.ndarray) -> tuple[FolderSource, str]:
        """A source for these rows' images, and a hash of their names and bytes.

        Raises:
            MissingImages: some are not there.
        """
        return self._folder.open(self.names[kept].tolist(), spellings=self.spellings)


def require_folder(data_dir: Path, folder: str, *, what: str) -> Path:
    """``data_dir / folder``, which must be a folder.

    Raises:
        InputError: it is not; the message says what is expected there.
    """
    path = in_data_dir(data_dir, folder)
    if not path.is_dir():
        raise InputError(
            f"{path} must be the folder of {what}, but there is none; set --data-dir or the set's folder"
        )
    return path


def first_folder(root: Path, names: Sequence[str]) -> Path:
    """The first of ``names`` that is a folder with images in ``root``, going down into a twin of its name.

    Official archives unpack to ``X/X/*.jpg`` where one asks for a folder ``X``.

    Raises:
        InputError: none is there.
    """
    for name in names:
        folder = root / name
        while (folder / folder.name).is_dir():
            folder = folder / folder.name
        if folder.is_dir() and any(entry.name.lower().endswith(SUFFIXES) for entry in os.scandir(folder)):
            return folder
    shown = ", ".join("the folder itself" if name == "." else name for name in names)
    raise InputError(f"{root} has no folder with images; looked for: {shown}")


# --- decoding ---------------------------------------------------------------------------------------


def decode_square(path: Path, *, size: int) -> np.ndarray:
    """The central square of an image file, scaled to ``size``, as uint8 (size, size, 3), RGB.

    The EXIF orientation is applied, the checksums of a PNG are compared, transparency shows white, 16-bit values keep
    their upper 8 bits (of 12 bits, values up to 4095, the upper 8 of these), and floats up to 1 are shares of white.
    Scaling averages over the area that a pixel covers (a triangle filter of that support).

    Raises:
        InputError: the file is missing or cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            image.draft("RGB", (2 * size, 2 * size))
            image.load()
            if image.format == "PNG":
                _compare_checksums(path)
            return np.asarray(_central_square(to_rgb(_upright(image)), size=size))
    except FileNotFoundError as error:
        raise InputError(f"{path} is not there any more; restore it or remove its row from the CSV") from error
    except _UNREADABLE as error:
        raise InputError(
            f"{path} cannot be decoded ({error}); fetch it again or remove its row from the CSV"
        ) from error


def _compare_checksums(path: Path) -> None:
    """Pillow decodes damaged pixels of a PNG without a word; ``verify`` compares the checksums of its parts."""
    with Image.open(path) as image:
        image.verify()


def _upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF orientation wants it; tags that cannot be read say nothing.

    Args:
        image: loaded: Pillow turns some formats itself while it loads them, and takes the tag away.
    """
    try:
        turned = _TURNED_BACK.get(image.getexif().get(ORIENTATION_TAG, 1))
    except _UNREADABLE:
        return image
    return image if turned is None else image.transpose(turned)


def check_header(path: Path) -> None:
    """Read as much of an image file as tells its format and size.

    Raises:
        InputError: the file is missing or is no image.
    """
    try:
        with Image.open(path):
            pass
    except _UNREADABLE as error:
        raise InputError(f"{path} cannot be opened ({error}); fetch it again") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode that Pillow opens as 8-bit RGB; without a copy where it is that."""
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(value_hw: np.ndarray) -> np.ndarray:
    """Grey levels of 12 or 16 bits, and shares of 1, as 8-bit ones; values that fit into 8 bits already stay."""
    clean = np.nan_to_num(value_hw.astype(np.float64))
    most = clean.max(initial=0)
    if most > MOST_OF_12_BITS:
        clean = clean / 257
    elif most > 255:
        clean = clean * 255 / MOST_OF_12_BITS
    elif most <= 1 and value_hw.dtype.kind == "f":
        clean = clean * 255
    return np.clip(clean, 0, 255).round().astype(np.uint8)


def _central_square(image: Image.Image, *, size: int) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
