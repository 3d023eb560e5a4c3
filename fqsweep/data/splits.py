"""Divide samples into train, calibration, validation and test, and check that groups are large enough.

A set's own lists are kept as they are; what they lack (a calibration split, say) is taken out of their
training list in the shares that the fractions give.

Axes: n images, j kinds of margin, m margins (sets of images whose shares are kept), s splits.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fqsweep.config import SplitFractions
from fqsweep.data.records import Samples, Splits
from fqsweep.errors import InputError

SPLIT_NAMES = ("train", "calibration", "validation", "test")
SPLIT_SPELLINGS = {
    **{name: name for name in SPLIT_NAMES},
    **dict.fromkeys(("training",), "train"),
    **dict.fromkeys(("calib",), "calibration"),
    **dict.fromkeys(("val", "valid", "dev"), "validation"),
    **dict.fromkeys(("testing", "holdout"), "test"),
}
# Groups weigh more in the choice of a split than strata, classes and the whole: they are what is compared.
_GROUP_WEIGHT = 2.0
# With fewer test images of a class in a group, that group's recall of the class is mostly chance.
MIN_PAIR_IMAGES = 10
MOST_NAMED = 20
REMEDY = (
    "Merge groups or classes (age_edges, group_edges, group_maps, label_map), keep more classes (label_map, "
    "drop_classes), give the split a larger fraction, use more images (max_images, num_images), or lower "
    "min_group_count"
)


def split_samples(samples: Samples, fractions: SplitFractions, *, attributes: Sequence[str]) -> Splits:
    """Divide the samples so that every split has every class and group in its share.

    Clusters are dealt out one by one, the largest first, then those of rare strata, in an order that a hash of
    their ids and ``fractions.seed`` fixes. Each goes to the split that is furthest behind its share of what
    has been dealt so far, summed over the margins the cluster's images belong to: class crossed with groups,
    class, group of each attribute, and all images: the choice that lowers the squared distance from the shares
    most. Because shares refer to what has been dealt so far, even small strata are spread over the splits.
    The result depends on ids, labels, groups and clusters, not on the order of rows. O(n log n).

    Args:
        samples: what to divide; images of one cluster stay on one side, unless the set's own lists say otherwise.
        fractions: shares and seed.
        attributes: group attributes to stratify by.

    Returns:
        Disjoint ascending indices which cover all samples.
    """
    if samples.official_n is None:
        split_n = np.full(len(samples), "train")
        names: tuple[str, ...] = SPLIT_NAMES
    else:
        split_n = samples.official_n
        names = ("train", *(name for name in SPLIT_NAMES if name not in set(split_n.tolist())))
    inside = np.flatnonzero(split_n == "train")
    share_s = np.array([getattr(fractions, name) for name in names])
    dealt_i = _deal(samples, inside, share_s / share_s.sum(), attributes=attributes, seed=fractions.seed)
    split_n = split_n.astype("<U11")
    split_n[inside] = np.array(names)[dealt_i]
    return Splits(**{name: np.flatnonzero(split_n == name) for name in SPLIT_NAMES})


def _deal(
    samples: Samples, inside: np.ndarray, share_s: np.ndarray, *, attributes: Sequence[str], seed: int
) -> np.ndarray:
    """Which split each of the samples ``inside`` goes to, int64 (len(inside),) into ``share_s``."""
    margin_nj, weight_m = _margins(samples, attributes)
    dealt_ms = np.zeros((len(weight_m), len(share_s)))
    split_n = np.full(len(samples), -1, dtype=np.int64)
    for members in _clusters_in_order(samples, inside, margin_nj[:, 0], seed=seed):
        margins, count = np.unique(margin_nj[members], return_counts=True)
        due_ms = np.outer(dealt_ms[margins].sum(axis=1) + count, share_s)
        chosen = int(np.argmax((weight_m[margins] * count) @ (due_ms - dealt_ms[margins])))
        dealt_ms[margins, chosen] += count
        split_n[members] = chosen
    dealt_i: np.ndarray = split_n[inside]
    return dealt_i


def check_groups(samples: Samples, splits: Splits, *, attributes: Sequence[str], min_count: int) -> None:
    """Refuse splits whose figures would mean nothing, or cannot be computed.

    Raises:
        InputError: ``group_problems`` finds something; one message lists it.
    """
    problems = group_problems(samples, splits, attributes=attributes, min_count=min_count)
    if problems:
        more = len(problems) - MOST_NAMED
        rest = f"; and {more:,} more" if more > 0 else ""
        raise InputError(f"{'; '.join(problems[:MOST_NAMED])}{rest}. {REMEDY}")


def group_problems(samples: Samples, splits: Splits, *, attributes: Sequence[str], min_count: int) -> list[str]:
    """Why groups cannot be compared on these splits, in words; empty where they can.

    An attribute has one group alone, a group has fewer than ``min_count`` images in validation or test, or none in
    training or calibration, a class has none in training, or there is one class alone. A class may be missing in a
    group, but the area under the ROC curve needs images of two classes: in validation and test, and there in one
    group of each attribute at least.
    """
    least = {"train": 1, "calibration": 1, "validation": min_count, "test": min_count}
    problems = []
    for attribute in attributes:
        groups = samples.groups[attribute]
        if len(groups.names) < 2:
            problems.append(
                f"{attribute} has one group alone, {', '.join(groups.names)}: nothing can be compared"
            )
        for split, index in splits.items():
            count_g = np.bincount(groups.code_n[index], minlength=len(groups.names))
            problems += [
                f"{attribute} {name!r} has {count} of {least[split]} images in {split}"
                for name, count in zip(groups.names, count_g, strict=True)
                if count < least[split]
            ]
    count_k = np.bincount(samples.label_n[splits.train], minlength=len(samples.class_names))
    problems += [
        f"class {name!r} has no image in train"
        for name, count in zip(samples.class_names, count_k, strict=True)
        if count == 0
    ]
    return problems + _lone_classes(samples, splits, attributes)


def _lone_classes(samples: Samples, splits: Splits, attributes: Sequence[str]) -> list[str]:
    """Where images of two classes are needed and those of one are there, in words."""
    if len(samples.class_names) == 1:
        return [f"all images are of one class, {samples.class_names[0]!r}: nothing can be told apart"]
    problems = []
    for split in ("validation", "test"):
        index = getattr(splits, split)
        label_n = samples.label_n[index]
        classes = np.unique(label_n)
        if len(classes) == 1:
            problems.append(f"all images in {split} are of one class, {samples.class_names[classes[0]]!r}")
        elif len(classes) > 1:
            problems += [
                f"no group of {attribute} has images of two classes in {split}"
                for attribute in attributes
                if _one_class_each(samples.groups[attribute].code_n[index], label_n)
            ]
    return problems


def _one_class_each(group_n: np.ndarray, label_n: np.ndarray) -> bool:
    """Whether all images of a group are of one class, in every group."""
    pairs = set(zip(group_n.tolist(), label_n.tolist(), strict=True))
    return len(pairs) == len({group for group, _ in pairs})


def thin_pairs(samples: Samples, splits: Splits, *, attributes: Sequence[str]) -> list[str]:
    """(class, group) pairs with fewer than ``MIN_PAIR_IMAGES`` test images, in words: figures on them are noisy.

    ``test/balanced_acc_worst`` is a mean of recalls over the classes of one group: a class of three images
    moves it in steps of a third.
    """
    found = []
    for attribute in attributes:
        groups = samples.groups[attribute]
        shape = (len(samples.class_names), len(groups.names))
        count_kg = np.zeros(shape, np.int64)
        np.add.at(count_kg, (samples.label_n[splits.test], groups.code_n[splits.test]), 1)
        found += [
            f"{attribute} {groups.names[g]!r}, class {samples.class_names[k]!r}: {count_kg[k, g]} test images"
            for g in range(shape[1])
            for k in range(shape[0])
            if count_kg[k, g] < MIN_PAIR_IMAGES
        ]
    return found


@dataclass(frozen=True)
class Leak:
    """A cluster with images on several sides: ``ids`` of the first image on each, and the splits' names."""

    ids: tuple[str, ...]
    splits: tuple[str, ...]


def find_leaks(samples: Samples, splits: Splits) -> list[Leak]:
    """Clusters (lesions, patients, near-duplicates) of which several splits have images."""
    split_n = np.full(len(samples), -1)
    for code, (_, index) in enumerate(splits.items()):
        split_n[index] = code
    order = np.lexsort((samples.id_n, split_n, samples.cluster_n))
    order = order[split_n[order] >= 0]
    borders = np.flatnonzero(np.diff(samples.cluster_n[order])) + 1
    leaks = []
    for members in np.split(order, borders):
        codes, first = np.unique(split_n[members], return_index=True)
        if len(codes) > 1:
            ids = tuple(samples.id_n[members[first]].tolist())
            leaks.append(Leak(ids, tuple(SPLIT_NAMES[code] for code in codes)))
    return leaks


def describe_leaks(leaks: Sequence[Leak]) -> str:
    """How many there are, and the first, in words."""
    first = " and ".join(f"{name} ({split})" for name, split in zip(leaks[0].ids, leaks[0].splits, strict=True))
    kinds = "lesions, patients or near-duplicates"
    return f"{len(leaks)} {kinds} have images on several sides of the split, first: {first}"


def splits_as_csv(samples: Samples, splits: Splits) -> bytes:
    """The split as a table that people can read: one row an image with its id, split, class and groups."""
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["id", "split", "class", *samples.groups])
    split_n = np.full(len(samples), "", dtype="<U11")
    for name, index in splits.items():
        split_n[index] = name
    label_n = np.array(samples.class_names)[samples.label_n]
    group_gn = [np.array(groups.names)[groups.code_n] for groups in samples.groups.values()]
    writer.writerows(zip(samples.id_n, split_n, label_n, *group_gn, strict=True))
    return stream.getvalue().encode()


def stable_order(id_n: np.ndarray, *, seed: int) -> np.ndarray:
    """Float64 (n,) in [0, 1): a random-looking rank that depends on id and seed alone, not on the position."""
    digests = (hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest() for name in id_n.tolist())
    return np.array([int.from_bytes(digest, "big") / 2**64 for digest in digests])


def strata(samples: Samples, attributes: Sequence[str]) -> np.ndarray:
    """Int64 (n,): images with equal codes share class and group in every attribute."""
    columns = [samples.label_n, *(samples.groups[name].code_n for name in attributes)]
    _, code_n = np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True)
    return code_n.reshape(-1).astype(np.int64)


def _margins(samples: Samples, attributes: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Margins that each image belongs to, int64 (n, j), numbered through, and their weights, float64 (m,).

    The columns are the image's stratum, its class, its group in each attribute, and the whole set.
    """
    groups = [samples.groups[name].code_n for name in attributes]
    columns = [strata(samples, attributes), samples.label_n, *groups, np.zeros(len(samples), np.int64)]
    weights = [1.0, 1.0, *[_GROUP_WEIGHT] * len(groups), 1.0]
    sizes = [int(column.max(initial=-1)) + 1 for column in columns]
    starts = np.cumsum([0, *sizes[:-1]])
    return np.stack(columns, axis=1) + starts, np.repeat(weights, sizes)


def _clusters_in_order(
    samples: Samples, inside: np.ndarray, stratum_n: np.ndarray, *, seed: int
) -> list[np.ndarray]:
    """Index arrays of the clusters among ``inside``: larger first, then those of rarer strata, then by hash."""
    rank_n = stable_order(samples.id_n, seed=seed)
    rarity_n = np.bincount(stratum_n)[stratum_n]
    by_cluster = inside[np.argsort(samples.cluster_n[inside], kind="stable")]
    borders = np.flatnonzero(np.diff(samples.cluster_n[by_cluster])) + 1
    clusters = [members for members in np.split(by_cluster, borders) if len(members)]
    return sorted(clusters, key=lambda members: (-len(members), rarity_n[members].min(), rank_n[members].min()))
