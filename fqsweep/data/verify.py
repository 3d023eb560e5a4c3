"""Check an installed data set: what is there, what is missing or broken, and whether the split is honest."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fqsweep.config import DatasetConfig, FilesBase
from fqsweep.data import describe_samples
from fqsweep.data.duplicates import (
    DETAILS_SHAPE,
    details,
    join_pairs,
    joins_near_duplicates,
    near_duplicate_pairs,
)
from fqsweep.data.folder import MissingImages, check_header
from fqsweep.data.packs import OnProgress, usable_cores
from fqsweep.data.records import Samples, Splits
from fqsweep.data.report import describe_set
from fqsweep.data.splits import (
    MIN_PAIR_IMAGES,
    REMEDY,
    Leak,
    find_leaks,
    group_problems,
    split_samples,
    thin_pairs,
)
from fqsweep.data.subset import stratified_subset, take
from fqsweep.errors import InputError

SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What ``fqsweep data verify`` found.

    Attributes:
        config, samples, splits: the set as far as it is there and can be decoded.
        num_looked_at: images that were read, those of unknown group among them.
        missing: images of the table without a file; refused images only, not those that may be missing.
        broken: image id and why it cannot be decoded.
        leaks: lesions, patients or near-duplicates that lie on several sides of the split.
        small: groups and classes that are too small to be scored (``splits.group_problems``).
        thin: (class, group) pairs with few test images.
        fast: whether only headers were read, so that near-duplicates and broken contents were not looked for.
    """

    config: DatasetConfig
    samples: Samples
    splits: Splits
    num_looked_at: int
    missing: tuple[str, ...] = ()
    broken: tuple[tuple[str, str], ...] = ()
    leaks: list[Leak] = field(default_factory=list)
    small: list[str] = field(default_factory=list)
    thin: list[str] = field(default_factory=list)
    fast: bool = False

    @property
    def is_sound(self) -> bool:
        """Whether a sweep can use the set as it is; thin pairs are a warning."""
        return not (self.missing or self.broken or self.leaks or self.small)


def verify_dataset(
    config: DatasetConfig, *, data_dir: Path | None, fast: bool = False, on_progress: OnProgress | None = None
) -> Findings:
    """Look at every image of a data set on all cores, and at its split.

    Args:
        fast: read only headers.
        on_progress: called with (images done, images in all).

    Raises:
        InputError: the tables cannot be read, or no image is there at all.
    """
    samples, missing = _samples_there(config, data_dir)
    looked_at = _all_of_table(config, data_dir) if config.max_images is None else samples
    broken, detail_npd = _look_at_images(looked_at, config.image_size, fast, on_progress)
    position = {name: index for index, name in enumerate(looked_at.id_n.tolist())}
    index_n = np.array([position[name] for name in samples.id_n.tolist()])
    whole = np.flatnonzero(~np.isin(index_n, list(broken)))
    if len(whole) == 0:
        raise InputError(f"data set {config.name!r}: no image can be read, first: {broken[min(broken)]}")
    samples, detail_npd = take(samples, whole), detail_npd[index_n[whole]]
    if joins_near_duplicates(config) and not fast:
        samples = join_pairs(samples, near_duplicate_pairs(detail_npd))
    splits = split_samples(samples, config.splits, attributes=config.group_attributes)
    return Findings(
        config=config,
        samples=samples,
        splits=splits,
        num_looked_at=len(looked_at),
        missing=missing,
        broken=tuple((str(looked_at.id_n[index]), reason) for index, reason in sorted(broken.items())),
        leaks=find_leaks(samples, splits),
        small=group_problems(
            samples, splits, attributes=config.group_attributes, min_count=config.min_group_count
        ),
        thin=thin_pairs(samples, splits, attributes=config.group_attributes),
        fast=fast,
    )


def _samples_there(config: DatasetConfig, data_dir: Path | None) -> tuple[Samples, tuple[str, ...]]:
    """The samples that have files, cut to ``max_images``, and the names of those that should have one."""
    missing: tuple[str, ...] = ()
    try:
        samples = describe_samples(config, data_dir=data_dir)
    except MissingImages as error:
        missing = error.names
        samples = describe_samples(config.model_copy(update={"missing_images": "drop"}), data_dir=data_dir)
    return stratified_subset(
        samples, max_images=config.max_images, attributes=config.group_attributes, seed=config.splits.seed
    ), missing


def _all_of_table(config: DatasetConfig, data_dir: Path | None) -> Samples:
    """Every labelled image that has a file, also those of unknown group."""
    everything = {"unknown_groups": "keep", "missing_images": "drop"} if isinstance(config, FilesBase) else {}
    return describe_samples(config.model_copy(update=everything), data_dir=data_dir)


def _look_at_images(
    samples: Samples, size: int, fast: bool, on_progress: OnProgress | None
) -> tuple[dict[int, str], np.ndarray]:
    """Why images cannot be read, by index, and the others' details, float32 (n, p, d), which ``fast`` leaves at 0."""
    broken: dict[int, str] = {}
    detail_npd = np.zeros((len(samples), *DETAILS_SHAPE), dtype=np.float32)
    if samples.source.path_of(0) is None:  # generated images cannot be broken
        return broken, detail_npd

    def look(index: int) -> None:
        try:
            if fast:
                path = samples.source.path_of(index)
                assert path is not None
                check_header(path)
            else:
                detail_npd[index] = details(samples.source.read(index, size=size)[None])[0]
        except InputError as error:
            broken[index] = str(error)

    with ThreadPoolExecutor(usable_cores()) as pool:
        for done, _ in enumerate(pool.map(look, range(len(samples))), start=1):
            if on_progress and (done % 100 == 0 or done == len(samples)):
                on_progress(done, len(samples))
    return broken, detail_npd


# --- in words -------------------------------------------------------------------------------------


def describe_findings(found: Findings) -> str:
    """The findings for people: counts, then what is wrong, then what to know, then the verdict."""
    lines = [describe_set(found.config, found.samples, found.splits), ""]
    if isinstance(found.config, FilesBase):
        looked = "the headers of " if found.fast else ""
        lines.insert(1, f"{looked}{found.num_looked_at:,} images were read, {len(found.broken):,} are broken")
    lines += _section("missing images", found.missing)
    lines += _section("broken images", [f"{name}: {reason}" for name, reason in found.broken])
    lines += _section(
        "leaks between splits",
        [f"{' and '.join(leak.ids)} ({' and '.join(leak.splits)})" for leak in found.leaks],
    )
    lines += _section("groups or classes too small", found.small)
    lines += [f"  {REMEDY}"] if found.small else []
    title = f"warning: fewer than {MIN_PAIR_IMAGES} test images, so that balanced_acc_worst is noisy"
    lines += _section(title, found.thin)
    if found.fast:
        lines.append("only headers were read: broken contents and near-duplicates were not looked for")
    return "\n".join([*lines, f"{found.config.name} is {_verdict(found)}"])


def _verdict(found: Findings) -> str:
    """Whether the set is sound, and if not, what to do about each thing that is wrong."""
    remedies = [
        "complete the folder" if found.missing else "",
        "leave out what is broken" if found.broken else "",
        "correct the given split, or leave it out and have one made" if found.leaks else "",
        "join or leave out what is too small" if found.small else "",
    ]
    wrong = "; ".join(filter(None, remedies))
    return f"not sound: {wrong}" if wrong else "sound"


def _section(title: str, items: Sequence[str]) -> list[str]:
    """A headed list, the first of many; nothing where there are none."""
    if not items:
        return []
    more = [f"  and {len(items) - SHOWN:,} more"] if len(items) > SHOWN else []
    return [f"{title} ({len(items):,}):", *(f"  {item}" for item in items[:SHOWN]), *more]
