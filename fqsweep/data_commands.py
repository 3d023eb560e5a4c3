"""`fqsweep data`: what lies where, and a data set fetched, verified or packed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from fqsweep.config import DatasetConfig, Fitzpatrick17kConfig, Isic2019Config, SynthdermConfig
from fqsweep.data import open_dataset, plan_dataset
from fqsweep.data.download import DownloadError
from fqsweep.data.fetch import FetchOptions, fetch_dataset
from fqsweep.data.meter import Meter
from fqsweep.data.report import describe_kinds, describe_risks, describe_set, describe_warnings
from fqsweep.data.verify import describe_findings, verify_dataset
from fqsweep.disk import writing
from fqsweep.errors import EXIT_BAD_INPUT, EXIT_FAILED_CELLS, EXIT_OK, InputError
from fqsweep.files import SPLITS_ENDING, SweepPaths
from fqsweep.space import find_space, load_space

WHOLE_SETS: dict[str, DatasetConfig] = {
    "isic2019": Isic2019Config(kind="isic2019", group_attributes=("sex", "age")),
    "fitzpatrick17k": Fitzpatrick17kConfig(kind="fitzpatrick17k", group_attributes=("skin_type", "skin_tone")),
    "synthderm": SynthdermConfig(kind="synthderm", group_attributes=("skin_type", "skin_tone")),
}


def list_sets(options: argparse.Namespace) -> int:
    """The kinds of data sets, and what of them lies in the data folder."""
    print(describe_kinds(options.data_dir))
    return EXIT_OK


def fetch(options: argparse.Namespace) -> int:
    """Download what is not there yet."""
    if options.data_dir is None:
        raise InputError("data fetch needs a folder to fetch into: pass --data-dir")
    how = FetchOptions(
        mirror=options.mirror, accept_changed=options.accept_changed, retry_gone=options.retry_gone
    )

    def fetch_one(dataset: DatasetConfig, _title: str) -> int:
        try:
            text, complete = fetch_dataset(dataset, options.data_dir, how)
        except DownloadError as error:
            print(f"fqsweep: {error}", file=sys.stderr)
            return EXIT_FAILED_CELLS
        print(text)
        return EXIT_OK if complete else EXIT_FAILED_CELLS

    return _each(options, fetch_one)


def verify(options: argparse.Namespace) -> int:
    """Look for missing and broken files, thin groups and leaks."""

    def verify_one(dataset: DatasetConfig, _title: str) -> int:
        meter = Meter(dataset.name, unit="images")
        found = verify_dataset(dataset, data_dir=options.data_dir, fast=options.fast, on_progress=meter)
        print(describe_findings(found))
        return EXIT_OK if found.is_sound else EXIT_FAILED_CELLS

    return _each(options, verify_one)


def pack(options: argparse.Namespace) -> int:
    """Decode a data set for a sweep before it starts."""

    def pack_one(dataset: DatasetConfig, title: str) -> int:
        packs = SweepPaths(options.out or Path("out") / title).packs
        with writing(f"output folder {packs.parent}", instead="another --out"):
            packs.mkdir(parents=True, exist_ok=True)
        meter = Meter(f"packing {dataset.name}", unit="images")
        packed = open_dataset(dataset, data_dir=options.data_dir, pack_dir=packs, on_progress=meter)
        print(describe_set(dataset, packed.samples, packed.splits))
        for line in describe_risks(dataset, packed.samples, packed.splits):
            print(line)
        print(f"packed: {packed.image_nhwc.shape} in {packs}, split: {packed.digest}{SPLITS_ENDING}")
        return EXIT_OK

    return _each(options, pack_one)


def print_data_warnings(dataset: DatasetConfig, data_dir: Path | None) -> bool:
    """What to know of a data set before its figures are believed, where it is at hand; whether it can be used."""
    if data_dir is None and not isinstance(dataset, SynthdermConfig):
        return True
    try:
        samples, splits = plan_dataset(dataset, data_dir=data_dir)
    except InputError as error:
        print(f"data set {dataset.name} cannot be used yet: {error}", file=sys.stderr)
        return False
    for line in describe_warnings(dataset, samples, splits):
        print(line)
    return True


def _each(options: argparse.Namespace, action: Callable[[DatasetConfig, str], int]) -> int:
    """The worst exit code; every data set has its turn, whatever became of the one before."""
    title, datasets = _datasets_named(options.name)

    def code_of(dataset: DatasetConfig) -> int:
        try:
            return action(dataset, title)
        except InputError as error:
            print(f"fqsweep: {error}", file=sys.stderr)
            return EXIT_BAD_INPUT

    return max([code_of(dataset) for dataset in datasets])


def _datasets_named(name: str) -> tuple[str, tuple[DatasetConfig, ...]]:
    """A kind of data set with its default settings and all its group attributes, or those of a search space."""
    if name in WHOLE_SETS:
        return name, (WHOLE_SETS[name],)
    space = load_space(find_space(name))
    return space.name, space.datasets
