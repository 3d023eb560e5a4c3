"""Fetch published data sets into a data folder.

ISIC 2019 comes as two tables and one archive of 9 GB, Fitzpatrick17k as a table with the address of each image.
Neither publisher states checksums of the tables and the archive: lengths and the archive's own CRCs are compared,
and images with the MD5 that Fitzpatrick17k's table gives.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pandas as pd

from fqsweep.config import (
    FITZPATRICK17K_CSV,
    ISIC2019_TRUTH_CSV,
    DatasetConfig,
    Fitzpatrick17kConfig,
    Isic2019Config,
)
from fqsweep.data import fitzpatrick17k, isic2019
from fqsweep.data.download import Patience, download_file, open_session, require_room
from fqsweep.data.folder import ImageFolder, first_folder
from fqsweep.data.meter import Meter
from fqsweep.data.photos import FINAL_OUTCOMES, Failure, Manners, Photo, fetch_photos, read_report, write_report
from fqsweep.data.tabular import read_table
from fqsweep.data.unpack import unpack_zip
from fqsweep.disk import writing
from fqsweep.errors import InputError
from fqsweep.files import locked

ISIC2019_BASE = "https://isic-challenge-data.s3.amazonaws.com/2019"
FITZPATRICK17K_BASE = "https://raw.githubusercontent.com/mattgroh/fitzpatrick17k/main"
REPORT_NAME = "fetch_report.csv"
_MD5 = r"[0-9a-fA-F]{32}"
MeterOf = Callable[[str, str], Callable[[int, int], None]]


def _live_meter(title: str, unit: str) -> Callable[[int, int], None]:
    return Meter(title, unit=unit)


@dataclass(frozen=True, kw_only=True)
class FetchOptions:
    """How data are fetched.

    Attributes:
        mirror: address of a folder that holds the set's files as they are named here, in place of the publisher's.
        accept_changed: keep images whose MD5 is not the published one; asks again for those found changed.
        retry_gone: ask again for images that an earlier call found gone or changed.
        meter: makes the progress display for a title and a unit.
    """

    mirror: str | None = None
    accept_changed: bool = False
    retry_gone: bool = False
    patience: Patience = field(default_factory=Patience)
    manners: Manners = field(default_factory=Manners)
    meter: MeterOf = _live_meter

    def is_final(self, failure: Failure) -> bool:
        """Whether another try does not change what an earlier call found."""
        wanted = self.retry_gone or (self.accept_changed and failure.outcome == "changed")
        return failure.outcome in FINAL_OUTCOMES and not wanted


def fetch_dataset(config: DatasetConfig, data_dir: Path, options: FetchOptions) -> tuple[str, bool]:
    """Fetch what is missing of a published data set.

    Returns:
        what was done, in words, and whether the set is complete.

    Raises:
        InputError: the set has no publisher, the mirror is no address, or the disk has no room.
        DownloadError: a table or the archive cannot be had; the same command goes on where it stopped.
    """
    if not isinstance(config, Isic2019Config | Fitzpatrick17kConfig):
        raise InputError(
            f"data set {config.name!r} ({config.kind}) is not published anywhere: fetch works for isic2019 and "
            "fitzpatrick17k"
        )
    _check_mirror(options.mirror)
    root = data_dir / config.folder
    with writing(f"data folder {root}", instead="another --data-dir"):
        root.mkdir(parents=True, exist_ok=True)
    with locked(root / ".fetch"):
        return (
            _fetch_isic2019(root, options)
            if isinstance(config, Isic2019Config)
            else _fetch_fitzpatrick17k(root, options)
        )


def _check_mirror(mirror: str | None) -> None:
    if mirror is None:
        return
    try:
        parts = urlsplit(mirror)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise InputError(f"--mirror must be an address such as https://example.org/folder, but is {mirror!r}")


def _fetch_table(
    name: str, root: Path, base: str, options: FetchOptions, *, columns: Sequence[str]
) -> pd.DataFrame:
    """The table of that name, fetched if it is not there.

    Raises:
        InputError: what is there, or what came and is not kept, is no table with these columns.
    """
    target = root / name
    if not target.exists():
        with open_session() as session:
            download_file(
                session,
                f"{(options.mirror or base).rstrip('/')}/{name}",
                target,
                patience=options.patience,
                check_file=lambda part: _check_table(part, name, columns),
                on_progress=options.meter(name, "bytes"),
            )
    try:
        return read_table(target, columns=columns)
    except InputError as error:
        raise InputError(f"{error}; delete it to fetch it again") from error


def _check_table(part: Path, name: str, columns: Sequence[str]) -> None:
    """Proxies answer with a page or a word of their own and status 200: that must not stay as the table."""
    remedy = "look at the proxy or the --mirror"
    if part.read_bytes()[:200].lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise InputError(f"{name}: a web page came in place of the table; {remedy}")
    try:
        read_table(part, columns=columns)
    except InputError as error:
        raise InputError(f"{name}: what came is not the table ({error}); {remedy}") from error


# --- ISIC 2019 ------------------------------------------------------------------------------------


def _fetch_isic2019(root: Path, options: FetchOptions) -> tuple[str, bool]:
    truth, metadata = (
        _fetch_table(name, root, ISIC2019_BASE, options, columns=("image",))["image"]
        for name in (ISIC2019_TRUTH_CSV, isic2019.METADATA_CSV)
    )
    names = truth.tolist()
    folder, images = _isic2019_images(root, names)
    if folder is None:
        _fetch_archive(root, options)
        folder, images = _isic2019_images(root, names)
    where = root if folder is None else folder
    text = f"{root}: {len(names):,} rows, {images:,} of their images in {where.name}"
    # Neither has a published checksum, and a table may end early between two rows without anybody's noticing.
    if set(truth) != set(metadata):
        differ = (
            f"{ISIC2019_TRUTH_CSV} lists {truth.nunique():,} images and {isic2019.METADATA_CSV} "
            f"{metadata.nunique():,}, not the same ones: delete the one that is cut short and repeat this command"
        )
        return f"{text}; {differ}", False
    if images == len(names):
        return text, True
    return f"{text}; to fetch the archive once more, move {where} away and repeat this command", False


def _isic2019_images(root: Path, names: list[str]) -> tuple[Path | None, int]:
    """The folder that has images of these names, None where there is none, and how many it has."""
    with contextlib.suppress(InputError):
        folder = first_folder(root, isic2019.IMAGE_FOLDERS)
        found = sum(
            file is not None for file in ImageFolder(folder).locate(names, spellings=isic2019.spellings)
        )
        if found:
            return folder, found
    return None, 0


def _fetch_archive(root: Path, options: FetchOptions) -> Path:
    """Fetch and unpack the images; the archive is deleted when its images are there."""
    folder = root / isic2019.IMAGE_FOLDERS[0]
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is there, and none of the table's images is in it; move it away first")
    archive = root / f"{folder.name}.zip"

    def check_size(rest_bytes: int, total_bytes: int) -> None:
        require_room(root, rest_bytes + total_bytes, what=f"{archive.name} and its images")

    if not archive.exists():
        with open_session() as session:
            download_file(
                session,
                f"{(options.mirror or ISIC2019_BASE).rstrip('/')}/{archive.name}",
                archive,
                patience=options.patience,
                check_size=check_size,
                on_progress=options.meter(archive.name, "bytes"),
            )
    unpack_zip(archive, folder, on_progress=options.meter(f"unpacking {archive.name}", "files"))
    archive.unlink()
    return folder


# --- Fitzpatrick17k -------------------------------------------------------------------------------


def _fetch_fitzpatrick17k(root: Path, options: FetchOptions) -> tuple[str, bool]:
    columns = ("md5hash",) if options.mirror else ("md5hash", "url")
    table = _fetch_table(FITZPATRICK17K_CSV, root, FITZPATRICK17K_BASE, options, columns=columns)
    photos = _missing_photos(table, root, options)
    report = root / REPORT_NAME
    known = read_report(report)
    final = [
        known[photo.id]
        for photo in photos
        if photo.id in known and options.is_final(known[photo.id]) and known[photo.id].url == photo.url
    ]
    skipped = {failure.id for failure in final}
    failures = fetch_photos(
        [photo for photo in photos if photo.id not in skipped],
        patience=options.patience,
        manners=options.manners,
        accept_changed=options.accept_changed,
        on_progress=options.meter("images", "images"),
    )
    failures = sorted([*failures, *final], key=lambda failure: failure.id)
    write_report(report, failures)
    worthwhile = sum(not options.is_final(failure) for failure in failures)
    text = _describe_photos(root, len(photos) - len(failures), failures, report, worthwhile=worthwhile)
    return text, not failures


def _missing_photos(table: pd.DataFrame, root: Path, options: FetchOptions) -> list[Photo]:
    """Those that are not there, each once, however many rows it has."""
    _check_names(table["md5hash"], root / FITZPATRICK17K_CSV)
    table = table.drop_duplicates("md5hash")
    try:
        folder = first_folder(root, fitzpatrick17k.IMAGE_FOLDERS)
        here = set(table["md5hash"][fitzpatrick17k.images_of(table, root).present()])
    except InputError:
        folder, here = root / fitzpatrick17k.IMAGE_FOLDERS[0], set()
    urls = (
        [f"{options.mirror.rstrip('/')}/images/{name}.jpg" for name in table["md5hash"]]
        if options.mirror
        else table["url"]
    )
    return [
        Photo(name, url, folder / f"{name}.jpg", md5=name)
        for name, url in zip(table["md5hash"], urls, strict=True)
        if name not in here
    ]


def _check_names(names: pd.Series, path: Path) -> None:
    """Files are called after the table's hashes: nothing else may say where they are written."""
    wrong = names[~names.str.fullmatch(_MD5)]
    if len(wrong):
        raise InputError(
            f"{path}, line {wrong.index[0] + 2}: md5hash must have 32 hexadecimal digits, but is {wrong.iloc[0]!r}; "
            "delete the table to fetch it again, or remove the row"
        )


def _describe_photos(
    root: Path, fetched: int, failures: list[Failure], report: Path, *, worthwhile: int
) -> str:
    lines = [f"{root}: {fetched:,} images fetched, {len(failures):,} missing"]
    for outcome, count in sorted(Counter(failure.outcome for failure in failures).items()):
        lines.append(f"  {count:,} {outcome}")
    if failures:
        lines.append(f"  listed in {report}; the same command tries {worthwhile:,} of them again")
        lines.append("  a search space uses what is there with missing_images: drop")
    return "\n".join(lines)
