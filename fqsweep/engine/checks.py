"""Everything that can be known to be wrong before a sweep starts, and what it is expected to cost.

The driver runs it in a process of its own, because it needs torch and the driver lives for days without it:

    python -m fqsweep.engine.checks SPACE.yaml OUT [DATA_DIR]      # JSON on the last line; exit code 2: bad input
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fqsweep.cells import budgets_of, method_points
from fqsweep.config import Allocating, ArchitectureConfig, SearchSpace, content_hash
from fqsweep.disk import is_no_space, no_space, writing
from fqsweep.errors import EXIT_BAD_INPUT, EXIT_NO_SPACE, EXIT_OK, InputError, TrialError
from fqsweep.files import SweepPaths, write_bytes, write_json
from fqsweep.names import part_of_key
from fqsweep.processes import Beside
from fqsweep.space import load_space
from fqsweep.tracking.new_database import making_tables

if TYPE_CHECKING:
    from torch import nn


PATTERN_OPTIONS = ("exempt", "pin", "limits")


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What the checks found out.

    Attributes:
        facts: data set name and configuration -> digest of images, labels, groups, splits.
        macs: ``<architecture>@<pixels>`` -> multiply-accumulates an image.
        warnings: what to know of the data before their figures are believed, a line each.
    """

    facts: dict[str, str]
    macs: dict[str, float]
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a sweep begins with, made beside what takes seconds to import.

    Attributes:
        checked: waits for the checks; raises ``InputError`` on bad input, of which nothing was started.
        tables: waits for the tables of a new database (``making_tables``); None where none is wanted.
    """

    checked: Callable[[], Checked]
    tables: Callable[[], bytes] | None


@contextlib.contextmanager
def preparing(space_file: Path, paths: SweepPaths, data_dir: Path | None, uri: str) -> Iterator[Prepared]:
    """Begin all of it; whoever leaves the block ends what still runs."""
    with making_tables(uri) as tables, checking(space_file, paths, data_dir) as checked:
        yield Prepared(checked=checked, tables=tables)


@contextlib.contextmanager
def checking(space_file: Path, paths: SweepPaths, data_dir: Path | None) -> Iterator[Callable[[], Checked]]:
    """``check_inputs`` and the networks' costs in a process of their own, without torch in this one."""
    given = [str(space_file), str(paths.out), *([str(data_dir)] if data_dir else [])]
    with Beside("fqsweep.engine.checks", *given) as process:

        def found() -> Checked:
            code, output, complaints = process.wait()
            if code == EXIT_BAD_INPUT:
                raise InputError(complaints.strip())
            if code == EXIT_NO_SPACE:
                raise no_space(paths.out)
            if code != EXIT_OK:
                raise RuntimeError(f"the checks of {space_file} ended with {code}:\n{complaints}")
            return Checked(**json.loads(output.splitlines()[-1]))

        yield found


def check_inputs(
    space: SearchSpace, paths: SweepPaths, data_dir: Path | None
) -> tuple[dict[str, str], list[str]]:
    """Everything that can be known to be wrong before a trial starts.

    Returns:
        facts for the parent run: data set name and configuration -> digest of images, labels, groups, splits, and
        architecture -> digest of the file of its pretrained weights; and what to know of the data, a line each.

    Raises:
        InputError: with the first data set or architecture that cannot be used.
    """
    from fqsweep.data import dataset_digest, plan_dataset
    from fqsweep.data.report import describe_warnings
    from fqsweep.models import build_model

    _check_writable(paths.out)
    _check_name(paths, space.name)
    digests, warnings = {}, []
    for dataset in space.datasets:
        samples, splits = plan_dataset(dataset, data_dir=data_dir)
        warnings += describe_warnings(dataset, samples, splits)
        # Another configuration is another data set with cells of its own: only the same one must not change.
        same = content_hash(dataset.contents)
        digests[f"data/{part_of_key(dataset.name)}/{same}"] = dataset_digest(
            samples, splits, dataset.image_size
        )
        for architecture in space.architectures:
            if isinstance(architecture.pretrained, str):
                build_model(architecture, num_classes=len(samples.class_names), image_size=dataset.image_size)
                same = content_hash(architecture.model_dump(mode="json"))
                digests[f"weights/{architecture.name}/{same}"] = _digest(
                    Path(architecture.pretrained).expanduser()
                )
            _check_network(space, architecture, dataset.image_size, samples.class_names)
    _check_unchanged(paths, digests)
    return digests, warnings


def check_networks(space: SearchSpace) -> None:
    """What ``check_inputs`` says of layer-name patterns and budgets, where there is no data set yet.

    Raises:
        InputError: a pattern fits no layer of an architecture, or a budget does not hold the smallest network, which
            is that of two classes here.
    """
    for architecture in space.architectures:
        _check_network(space, architecture, space.datasets[0].image_size, ("0", "1"))


def _check_network(
    space: SearchSpace, architecture: ArchitectureConfig, image_size: int, class_names: Sequence[str]
) -> None:
    """Layer-name patterns and budgets against a network without values."""
    from fqsweep.models import build_model, file_notes, quantisable_layers

    untrained = architecture.model_copy(update={"pretrained": False})
    model = build_model(untrained, num_classes=len(class_names), image_size=image_size, device="meta")
    _check_patterns(space, architecture.name, list(quantisable_layers(model)))
    notes = file_notes(architecture, image_size=image_size, class_names=tuple(class_names))
    _check_budgets(space, model, notes)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_patterns(space: SearchSpace, architecture: str, layers: list[str]) -> None:
    """Every pattern of every method names a layer: a trial would find out after its parent was trained."""
    from fqsweep.quant.units import matching_names

    for point in method_points(space):
        settings = point.settings
        for option in PATTERN_OPTIONS:
            for pattern in getattr(settings, option, ()):
                try:
                    matching_names(pattern, layers)
                except ValueError as error:
                    raise InputError(f"{point.variant}: {option}: {error} (of {architecture})") from error


def _check_budgets(space: SearchSpace, model: nn.Module, notes: Mapping[str, str]) -> None:
    """Every budget holds what pinned and limited layers take at least, or, in bytes, the smallest file there is.

    A trial would find out after its parent was trained.

    Args:
        model: may be without values, on ``meta``; notes: what its packed file says of itself.
    """
    from fqsweep.assignment import smallest_file_bytes, smallest_mean_bits
    from fqsweep.quant.remainder import bound_remainder
    from fqsweep.quant.units import list_units

    architecture = notes["architecture"]
    for point in method_points(space):
        settings = point.settings
        if not isinstance(settings, Allocating):
            continue
        try:
            units = list_units(model, granularity=settings.granularity, exempt=settings.exempt)
            smallest = smallest_mean_bits(settings, units)
        except TrialError as error:
            raise InputError(f"{point.variant}: {error} (of {architecture})") from error
        budgets = budgets_of(space, point)
        for budget_bits, _ in budgets:
            if budget_bits is not None and budget_bits < smallest * (1 - 1e-9):
                raise InputError(
                    f"{point.variant}: a budget of {budget_bits:g} bits is below what pin and limits take of "
                    f"{architecture} ({smallest:.4g}); raise the budget, or pin and limit less"
                )
        sizes = [budget_bytes for _, budget_bytes in budgets if budget_bytes is not None]
        if not sizes:
            continue
        smallest_bytes = smallest_file_bytes(
            settings, units, partial(bound_remainder, model.state_dict(), units, metadata=notes)
        )
        if min(sizes) < smallest_bytes:
            raise InputError(
                f"{point.variant}: a budget of {min(sizes):,} bytes does not hold the smallest file of "
                f"{architecture}, which takes up to {smallest_bytes:,} bytes with biases, norms, exempt layers and "
                "the index of bits; raise it, or allow smaller choices"
            )


def _check_writable(out: Path) -> None:
    with writing(f"output folder {out}", instead="another --out"):
        out.mkdir(parents=True, exist_ok=True)
        write_bytes(out / ".writable", b"fqsweep")
        (out / ".writable").unlink()


def _check_name(paths: SweepPaths, name: str) -> None:
    """An output folder is one sweep's: MLflow and the report know it by its name."""
    before = json.loads(paths.plan.read_text(encoding="utf-8"))["name"] if paths.plan.exists() else name
    if before != name:
        raise InputError(
            f"{paths.out} holds the sweep {before!r}, and this one is named {name!r}: give another --out, or name it "
            f"{before!r} again"
        )


def _check_unchanged(paths: SweepPaths, digests: dict[str, str]) -> None:
    """A sweep goes on only with the data it began with."""
    noted = paths.data_digests
    before = json.loads(noted.read_text()) if noted.exists() else {}
    changed = [name for name, digest in digests.items() if before.get(name, digest) != digest]
    if changed:
        raise InputError(
            f"{', '.join(changed)}: the images, labels or weights have changed since {paths.out} was begun; "
            "use another --out, or put the files back"
        )
    write_json(noted, {**before, **digests})


def main(arguments: list[str]) -> int:
    """Check, and print what was found as JSON."""
    from fqsweep.engine.estimate import macs_per_image

    data_dir = Path(arguments[2]) if len(arguments) > 2 else None
    try:
        space = load_space(Path(arguments[0]))
        facts, warnings = check_inputs(space, SweepPaths(Path(arguments[1])), data_dir)
        sizes = {dataset.image_size for dataset in space.datasets}
        macs = {f"{a.name}@{size}": macs_per_image(a.name, size) for a in space.architectures for size in sizes}
    except InputError as error:
        print(error, file=sys.stderr)
        return EXIT_BAD_INPUT
    except OSError as error:
        if is_no_space(error):
            return EXIT_NO_SPACE
        raise
    print(json.dumps(asdict(Checked(facts=facts, macs=macs, warnings=warnings))))
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
