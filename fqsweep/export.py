"""The model of a run, written for use elsewhere and checked before it is written.

packed file of the run (its dropped channels left when it was made) -> as it is, or ONNX -> compared with the run's
own model on the test images of its data set (or on random ones, where these cannot be had) -> on disk.
"""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import torch

from fqsweep.data import open_dataset
from fqsweep.data.loading import BatchLoader
from fqsweep.disk import writing
from fqsweep.errors import InputError
from fqsweep.files import SweepPaths, write_bytes
from fqsweep.quant.packed_model import ModelNotes, load_model, mean_bits, read_notes
from fqsweep.quant.packing import REMOVED, PackedFileError, read_metadata, unpack_weights
from fqsweep.space import load_space
from fqsweep.tracking.stores import sqlite_file
from fqsweep.tracking.tracker import fetch_model, fetch_space

BATCH = 64
NUM_RANDOM_IMAGES = 64
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
Batches = Iterable[torch.Tensor]


def export_run(
    uri: str,
    run_id: str,
    target: Path,
    *,
    kind: Literal["packed", "onnx"],
    data_dir: Path | None,
) -> Iterator[str]:
    """Write the model of a run; yields what was done, line by line.

    Args:
        uri: MLflow's; kind: what to write.
        data_dir: where data sets lie, for the comparison.

    Raises:
        InputError: no such run, a packed file that cannot be used, packages that are missing, or a target that cannot
            be written.
        OnnxMismatch: what would be written does not compute what the run's model does.
    """
    if kind == "onnx":
        check_onnx_packages()
    try:
        blob = fetch_model(uri, run_id)
        notes, model = read_notes(read_metadata(blob)), load_model(blob)
        described = describe_bits(blob)
    except PackedFileError as error:
        raise InputError(f"run {run_id}: {error}") from error
    yield described
    if kind == "packed":
        _write(target, blob)
    else:
        # Only here: the packages are an extra.
        from fqsweep.quant.onnx_export import compare_with_torch, export_onnx

        content = export_onnx(blob)
        with comparison_images(uri, run_id, notes, data_dir) as (batches, source):
            found = compare_with_torch(content, model, batches)
        _write(target, content)
        yield (
            f"onnxruntime agrees with the run's model on {found.num_images:,} {source}: largest difference of a "
            f"logit {found.max_error:.1e}, another first class on {found.num_differing}"
        )
        size = notes.image_size
        yield f"input image: float32 (batch, 3, {size}, {size}), normalised as the file's metadata says"
    yield f"{target}: {target.stat().st_size:,} bytes"


def export_kind(given: Literal["packed", "onnx"] | None, out: Path) -> Literal["packed", "onnx"]:
    """What to write: what was asked for, which the file's name must not contradict, else what its name says.

    Raises:
        InputError: both contradict each other.
    """
    suffix = out.suffix.lower()
    if given is None and suffix not in ("", ".fqs", ".onnx"):
        raise InputError(
            f"--out {out}: {suffix} does not say what to write: end it with .fqs (packed) or .onnx, or give --format"
        )
    if given is None:
        return "onnx" if suffix == ".onnx" else "packed"
    if (given, suffix) in (("packed", ".onnx"), ("onnx", ".fqs")):
        fitting = {"packed": ".fqs", "onnx": ".onnx"}[given]
        raise InputError(
            f"--format {given} and --out {out} contradict each other: leave --format out, or give a file that ends "
            f"with {fitting}"
        )
    return given


def _write(target: Path, content: bytes) -> None:
    with writing(f"--out {target}", instead="another file"):
        write_bytes(target, content)


def check_onnx_packages() -> None:
    """The packages of the extra are there.

    Raises:
        InputError: some are missing.
    """
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"an ONNX file needs {', '.join(missing)}, not installed here: pip install {' '.join(ONNX_PACKAGES)} "
            "(or fqsweep's extra 'export')"
        )


def describe_bits(blob: bytes) -> str:
    """Mean bits over the weights of the whole network, and what is left of them in the file."""
    state, metadata = unpack_weights(blob), read_metadata(blob)
    count = sum(state[name].numel() for name in state.bits)
    if REMOVED in metadata:
        return f"{float(metadata[REMOVED]):.3g} bits per weight; without dropped channels {count:,} weights are left"
    return f"{mean_bits(state):.3g} bits per weight; {count:,} quantised weights"


@contextlib.contextmanager
def comparison_images(
    uri: str, run_id: str, notes: ModelNotes, data_dir: Path | None
) -> Iterator[tuple[Batches, str]]:
    """Normalised images to compare with, made as they are asked for, and what they are."""
    with tempfile.TemporaryDirectory() as folder:
        yield _images(uri, run_id, notes, data_dir, Path(folder))


def _images(
    uri: str, run_id: str, notes: ModelNotes, data_dir: Path | None, folder: Path
) -> tuple[Batches, str]:
    try:
        return _test_images(uri, run_id, notes, data_dir, folder), "test images"
    except (InputError, OSError) as error:
        generator = torch.Generator().manual_seed(0)
        shape = (NUM_RANDOM_IMAGES, 3, notes.image_size, notes.image_size)
        reason = str(error).splitlines()[0]
        return [torch.randn(shape, generator=generator)], f"random images (no test images: {reason})"


def _test_images(uri: str, run_id: str, notes: ModelNotes, data_dir: Path | None, folder: Path) -> Batches:
    """Batches of the test split; packs that the sweep did not leave are made in ``folder``."""
    file, params = fetch_space(uri, run_id, folder)
    space = load_space(file)
    wanted = [dataset for dataset in space.datasets if dataset.name == params["dataset"]]
    if not wanted:
        raise InputError(f"{file.name} has no data set {params['dataset']!r}")
    database = sqlite_file(uri)
    packs = SweepPaths(folder if database is None else database.parent).packs
    if not packs.is_dir():
        packs = SweepPaths(folder).packs
    dataset = open_dataset(wanted[0], data_dir=data_dir, pack_dir=packs)
    loader = BatchLoader(
        images=dataset.image_nhwc,
        labels=dataset.samples.label_n,
        groups=next(iter(dataset.samples.groups.values())).code_n,
        indices=dataset.splits.test,
        batch_size=BATCH,
        device=torch.device("cpu"),
        mean=notes.normalisation.mean,
        std=notes.normalisation.std,
        shuffle=False,
    )
    return (batch.image_bchw for batch in loader.epoch(0))
