"""The export command on a real trial: packed and ONNX files that are opened and used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fqsweep import export
from fqsweep.cells import expand_cells
from fqsweep.engine.work import LogFile
from fqsweep.errors import InputError
from fqsweep.files import SweepPaths
from fqsweep.main import main
from fqsweep.quant.packed_model import load_model, read_notes
from fqsweep.quant.packing import read_metadata
from fqsweep.space import load_space
from fqsweep.tracking.stores import default_uri
from fqsweep.tracking.tracker import fetch_model, open_tracker
from fqsweep.trial import run_trial

SPACE = """
name: exported
datasets:
  - {kind: synthderm, group_attributes: [skin_tone], image_size: 32, num_images: 300, min_group_count: 5}
architectures: [resnet18]
budgets_bits: [0.5]
seeds: [0]
methods: [{method: static, finetune_epochs: 0}]
recipe: {epochs: 1, batch_size: 32, calibration_images: 20}
search: {trials_per_cell: 1}
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Tracking URI and run of a ResNet18 at half a bit a weight: a sweep of one trial, without Ray."""
    folder = tmp_path_factory.mktemp("exported")
    file = folder / "exported.yaml"
    file.write_text(SPACE)
    paths = SweepPaths(folder / "out")
    paths.out.mkdir()
    (cell,) = expand_cells(load_space(file))
    log = LogFile(paths.log("k"))
    result = run_trial(cell, key="k", weights={}, paths=paths, data_dir=None, device="cpu", recorder=log)
    book = open_tracker(default_uri(paths), paths=paths, sweep="exported", space_file=file, facts={})
    run = book.log_trial(result, [paths.trial("k") / "model.fqs"])
    assert run is not None
    return default_uri(paths), run


def test_the_packed_export_is_without_dropped_channels_and_used_alone(
    sweep: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri, run = sweep
    file = tmp_path / "small.fqs"
    assert main(["export", run, "--tracking-uri", uri, "--out", str(file)]) == 0
    said = capsys.readouterr().out
    assert "bits per weight; without dropped channels" in said
    assert f"{file}: {file.stat().st_size:,} bytes" in said
    assert float(read_metadata(file.read_bytes())["whole_mean_bits"]) <= 0.5
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.isfinite(load_model(file.read_bytes())(images)).all()


def test_a_target_that_cannot_be_written_is_said(
    sweep: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri, run = sweep
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "small.fqs"
    assert main(["export", run, "--tracking-uri", uri, "--out", str(target)]) == 2
    assert f"--out {target} cannot be written: " in capsys.readouterr().err


def test_the_onnx_export_runs_and_agrees_on_the_test_split(
    sweep: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ort = pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")
    pytest.importorskip("onnxscript", reason="the extra 'export' is not installed")
    uri, run = sweep
    file, packed = tmp_path / "model.onnx", tmp_path / "model.fqs"
    assert main(["export", run, "--tracking-uri", uri, "--out", str(file), "--format", "onnx"]) == 0
    said = capsys.readouterr().out
    assert " test images: largest difference of a logit " in said and "another first class on 0" in said
    assert main(["export", run, "--tracking-uri", uri, "--out", str(packed)]) == 0
    assert file.stat().st_size <= packed.stat().st_size * 1.06
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    notes = session.get_modelmeta().custom_metadata_map
    classes = json.loads(notes["classes"])
    (logits,) = session.run(["logits"], {"image": np.zeros((3, 3, 32, 32), np.float32)})
    assert logits.shape == (3, len(classes)) and np.isfinite(logits).all()


@pytest.mark.parametrize("instead", ["nothing", "a file"])
def test_packs_that_the_sweep_did_not_leave_are_made_elsewhere(sweep: tuple[str, str], instead: str) -> None:
    uri, run = sweep
    packs = SweepPaths(Path(uri.removeprefix("sqlite:///")).parent).packs
    kept = packs.rename(packs.with_name("kept"))
    if instead == "a file":
        packs.write_text("")
    try:
        notes = read_notes(read_metadata(fetch_model(uri, run)))
        with export.comparison_images(uri, run, notes, None) as (batches, source):
            assert source == "test images" and next(iter(batches)).shape[1:] == (3, 32, 32)
        assert not packs.is_dir()
    finally:
        packs.unlink(missing_ok=True)
        kept.rename(packs)


def test_the_sweep_is_given_by_its_folder_and_the_target_must_be_a_file(
    sweep: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    uri, run = sweep
    assert main(["export", run[:10], "--out", "model.fqs"]) == 2
    assert "give --sweep-out DIR or --tracking-uri URI" in capsys.readouterr().err
    out = Path(uri.removeprefix("sqlite:///")).parent
    assert main(["export", run[:10], "--sweep-out", str(out), "--out", "model.fqs"]) == 0
    assert load_model((tmp_path / "model.fqs").read_bytes()) is not None
    assert main(["export", run, "--sweep-out", str(out), "--out", str(tmp_path)]) == 2
    assert "is a folder: give the file to write" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "name", "kind"),
    [(None, "m", "packed"), (None, "m.FQS", "packed"), (None, "m.onnx", "onnx"), ("packed", "m.pt", "packed")],
)
def test_what_to_write_is_told_by_the_files_name(given: Any, name: str, kind: str) -> None:
    assert export.export_kind(given, Path(name)) == kind


def test_a_name_that_does_not_say_what_to_write_is_refused() -> None:
    with pytest.raises(InputError, match=r"m\.pt: \.pt does not say what to write: end it with \.fqs"):
        export.export_kind(None, Path("m.pt"))


def test_missing_packages_are_named_with_the_command(
    sweep: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export, "ONNX_PACKAGES", ("onnx", "no_such_package"))
    uri, run = sweep
    arguments = ["export", run, "--tracking-uri", uri, "--out", str(tmp_path / "x.onnx"), "--format", "onnx"]
    assert main(arguments) == 2
    assert (
        "needs no_such_package, not installed here: pip install onnx no_such_package" in capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())
