"""The command line: plans, bad input, exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fqsweep.cells import expand_cells
from fqsweep.engine.checks import Checked, Prepared, check_inputs
from fqsweep.engine.sweep import SweepSummary
from fqsweep.engine.tasks import Task
from fqsweep.engine.work import perform
from fqsweep.errors import InputError
from fqsweep.files import SweepPaths, write_json
from fqsweep.main import _own_command, main
from fqsweep.space import load_space

PROJECT = Path(__file__).resolve().parents[1]
SPACE = """
name: bad
datasets:
  - {kind: table, name: photos, csv: photos.csv, images: photos, image_column: file, label_column: diagnosis,
     group_columns: {sex: sex}, group_attributes: [sex], image_size: 32, min_group_count: 2, patient_column: patient}
architectures: [test_resnet]
budgets_bits: [2]
seeds: [0]
methods: [{method: fp32}, {method: static}]
recipe: {epochs: 1, batch_size: 16, finetune_epochs: 1}
"""


def test_data_sets_are_verified_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "verify", "synthderm"]) == 0
    assert "synthderm: 6,000 images" in capsys.readouterr().out
    assert main(["data", "verify", "isic2019"]) == 2
    assert "pass --data-dir" in capsys.readouterr().err


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with 80 small photos, a CSV and a search space."""
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    rows = []
    for i in range(80):
        Image.fromarray(rng.integers(0, 255, (36, 36, 3), dtype=np.uint8)).save(
            tmp_path / "photos" / f"{i}.png"
        )
        row = {"file": f"{i}.png", "diagnosis": "ab"[i % 2], "sex": "mf"[(i // 2) % 2], "patient": f"p{i}"}
        rows.append(row)
    pd.DataFrame(rows).to_csv(tmp_path / "photos.csv", index=False)
    (tmp_path / "bad.yaml").write_text(SPACE)
    return tmp_path


@pytest.fixture
def checks_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks in this process, which has loaded torch already; the other tests start one for them."""

    @contextlib.contextmanager
    def prepare(space_file: Path, paths: SweepPaths, data_dir: Path | None, _uri: str) -> Iterator[Prepared]:
        def check() -> Checked:
            facts, warnings = check_inputs(load_space(space_file), paths, data_dir)
            return Checked(facts=facts, macs={}, warnings=warnings)

        yield Prepared(checked=check, tables=None)

    monkeypatch.setattr("fqsweep.engine.checks.preparing", prepare)


def run(folder: Path, *more: str) -> int:
    return main(
        ["run", str(folder / "bad.yaml"), "--out", str(folder / "out"), "--data-dir", str(folder), *more]
    )


def edit(folder: Path, old: str, new: str) -> None:
    text = (folder / "bad.yaml").read_text()
    assert old in text
    (folder / "bad.yaml").write_text(text.replace(old, new))


def assert_nothing_started(folder: Path) -> None:
    assert not (folder / "out" / "ledger.jsonl").exists()
    assert not (folder / "out" / "baselines").exists()


def test_without_a_command_nothing_starts_and_the_commands_are_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([]) == 2
    assert "run a sweep, or go on with it" in capsys.readouterr().err


def test_packing_into_a_folder_that_cannot_be_made_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "pack", "synthderm", "--out", "/proc/nowhere"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_plan_of_the_paper_prints_the_whole_grid_from_any_folder(tmp_path: Path) -> None:
    command = [sys.executable, str(PROJECT / "fqsweep" / "main.py"), "plan", "search_spaces/paper.yaml"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    for part in ("fitzpatrick17k", "isic2019", "resnet50", "tiny_vit_5m_224", "uniform-8-ft", "baq", "4; 5; 6"):
        assert part in ended.stdout
    assert "40 full-precision parents" in ended.stdout
    assert list(tmp_path.iterdir()) == []


def test_plan_as_json_counts_cells_and_shared_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "demo", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["num_cells"] == len(plan["cells"])
    assert plan["num_baselines"] == 1 and plan["num_importance"] == 1
    assert plan["num_trials"] > plan["num_cells"]


def test_a_port_that_there_is_not_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["ui", "--port", "70000"])
    assert ended.value.code == 2
    assert "--port: must be at most 65535" in capsys.readouterr().err


def test_the_command_that_goes_on_is_the_one_that_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for script, shown in (("main.py", "main.py"), ("__main__.py", "-m fqsweep")):
        monkeypatch.setattr(sys, "argv", [str(PROJECT / "fqsweep" / script), "run", "demo"])
        assert _own_command().startswith(sys.executable) and _own_command().endswith(shown)


def test_a_reader_who_has_seen_enough_gets_no_traceback() -> None:
    command = [sys.executable, "-m", "fqsweep", "plan", "demo"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.wait(timeout=60) == 141
        assert process.stderr.read() == ""


def test_an_unknown_search_space_names_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "papr"]) == 2
    said = capsys.readouterr().err
    assert "with fqsweep come: " in said and "demo, evidence_deit, " in said


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("file,", "fil,", "fil"),
        ("label_column: diagnosis", "label_column: diagnose", "'diagnosis'"),
        ("{sex: sex}", "{sex: gender}", "gender"),
        ("test_resnet", "tset_resnet", "near: test_resnet"),
        ("csv: photos.csv", "csv: foto.csv", "foto.csv"),
        ("images: photos,", "images: pictures,", "pictures"),
        ("min_group_count: 2", "min_group_count: 30", "of 30 images in validation"),
        ("budgets_bits: [2]", "budgets_bits: [0.5]\nbudgets_bit: 3", "budgets_bit: unknown key"),
        ("{method: static}", "{method: static, choices: [2, 4]}", "below the smallest bit choice"),
        ("{method: static}", "{method: static}, {method: static, label: other}", "are the same method"),
        ("image_size: 32", "image_size: 32, label_map: {x: [a], y: [c]}", "'c'"),
        ("architectures: [test_resnet]", "architectures: [{name: test_resnet, pretrained: no.pth}]", "no.pth"),
    ],
)
def test_bad_input_ends_with_2_before_anything_starts(
    photos: Path, capsys: pytest.CaptureFixture[str], checks_here: None, old: str, new: str, message: str
) -> None:
    edit(photos, old, new)
    if "budgets_bits: [2]" in old or "choices" in new:
        edit(photos, "budgets_bits: [", "budgets_bits: [1, ")
    assert run(photos) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") < 25
    assert "Traceback" not in error
    assert_nothing_started(photos)


def test_a_missing_image_is_named_before_anything_starts(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "photos" / "7.png").unlink()
    assert run(photos) == 2
    assert "7.png" in capsys.readouterr().err
    assert_nothing_started(photos)


@pytest.mark.usefixtures("checks_here")
def test_a_data_folder_that_was_not_given_is_asked_for(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(photos / "bad.yaml"), "--out", str(photos / "out")]) == 2
    assert "--data-dir" in capsys.readouterr().err


@pytest.mark.usefixtures("checks_here")
def test_a_tracking_server_that_is_away_is_said_before_anything_starts(
    photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # three take 14 s
    assert run(photos, "--tracking-uri", "http://127.0.0.1:9") == 2
    error = capsys.readouterr().err
    assert "http://127.0.0.1:9" in error and "start the server or correct --tracking-uri" in error
    assert "Traceback" not in error
    assert_nothing_started(photos)


@pytest.mark.usefixtures("checks_here")
def test_an_output_folder_that_cannot_be_written_is_named(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "out").write_text("a file")
    assert run(photos) == 2
    assert "give another --out" in capsys.readouterr().err


@pytest.mark.usefixtures("checks_here")
@pytest.mark.parametrize("option", ["pin: {frist: 8}", 'exempt: ["haed*"]', 'limits: {"layer9.*": {max: 4}}'])
def test_a_pattern_that_fits_no_layer_is_refused_before_anything_is_trained(
    photos: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    edit(photos, "{method: static}", f"{{method: static, {option}}}")
    assert run(photos) == 2
    shown = capsys.readouterr().err
    assert f"static: {option.split(':')[0]}: " in shown and "fits no quantisable layer; the first are:" in shown
    assert not (photos / "out" / "ledger.jsonl").exists()
    assert main(["plan", str(photos / "bad.yaml")]) == 2
    assert capsys.readouterr().err == shown


@pytest.mark.usefixtures("checks_here")
@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            'limits: {"*": {min: 4}}',
            r"static: a budget of 2 bits is below what pin and limits take of .* \(4\)",
        ),
        ('pin: {"*": 3}', r"static: a budget of 2 bits is below what pin and limits take of .* \(3\)"),
        ('choices: [0, 4], limits: {"*": {min: 1, max: 3}}', r"leave layer .* none of the choices \[0, 4\]"),
    ],
)
def test_a_budget_that_layers_cannot_keep_is_refused_before_anything_is_trained(
    photos: Path, capsys: pytest.CaptureFixture[str], option: str, message: str
) -> None:
    edit(photos, "{method: static}", f"{{method: static, {option}}}")
    assert run(photos) == 2
    shown = capsys.readouterr().err
    assert re.search(message, shown)
    assert not (photos / "out" / "ledger.jsonl").exists()
    assert main(["plan", str(photos / "bad.yaml")]) == 2
    assert capsys.readouterr().err == shown


@pytest.mark.parametrize(
    ("budget", "option", "held"),
    [(350, "", False), (600_000, "", True), (300_000, ', exempt: ["layer4*"]', False)],
)
def test_a_budget_in_bytes_that_holds_no_file_is_refused_before_anything_is_trained(
    photos: Path, budget: int, option: str, held: bool
) -> None:
    """350 where kB were meant; and layers that stay in float32 alone are larger."""
    edit(photos, "budgets_bits: [2]", f"budgets_bytes: [{budget}]")
    edit(photos, "{method: static}", f"{{method: static{option}}}")
    paths, space = SweepPaths(photos / "out"), load_space(photos / "bad.yaml")
    if held:
        check_inputs(space, paths, photos)
        return
    with pytest.raises(
        InputError, match=f"static: a budget of {budget:,} bytes does not hold the smallest file"
    ):
        check_inputs(space, paths, photos)


@pytest.mark.usefixtures("checks_here")
def test_groups_that_would_be_recorded_under_one_name_are_refused(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(photos, "group_attributes:", "group_maps: {sex: {A/B: [f], A_B: [m]}}, group_attributes:")
    file, said = str(photos / "bad.yaml"), "groups 'A/B' and 'A_B' of sex would both be recorded as"
    assert run(photos) == 2
    assert said in capsys.readouterr().err
    for command in (["plan", file], ["data", "verify", file]):
        assert main([*command, "--data-dir", str(photos)]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.usefixtures("checks_here")
def test_an_output_folder_is_one_sweeps(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(SweepPaths(photos / "out").plan, {"name": "other", "cells": [], "shared": []})
    assert run(photos) == 2
    assert "holds the sweep 'other', and this one is named" in capsys.readouterr().err


@pytest.mark.usefixtures("checks_here")
def test_an_output_folder_that_no_address_can_name_is_refused(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("run#1", "what?", "c%20d"):
        assert (
            main(["run", str(photos / "bad.yaml"), "--out", str(photos / name), "--data-dir", str(photos)]) == 2
        )
        assert "has no address with" in capsys.readouterr().err
    assert not list(photos.rglob("mlflow.db"))


@pytest.mark.usefixtures("checks_here")
def test_a_tracking_uri_that_is_a_path_is_refused_with_its_address(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(photos, "--tracking-uri", "runs/mlflow.db") == 2
    assert "give the address of a database, sqlite:///runs/mlflow.db" in capsys.readouterr().err


@pytest.mark.usefixtures("checks_here")
def test_data_that_changed_since_the_sweep_began_is_refused(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = load_space(photos / "bad.yaml")
    paths = SweepPaths(photos / "out")
    check_inputs(space, paths, photos)
    check_inputs(space, paths, photos)
    table = pd.read_csv(photos / "photos.csv")
    table.loc[0, "sex"] = "f"
    table.to_csv(photos / "photos.csv", index=False)
    assert run(photos) == 2
    assert "have changed since" in capsys.readouterr().err
    edit(photos, "min_group_count: 2", "min_group_count: 3")  # another data set, with cells of its own
    check_inputs(load_space(photos / "bad.yaml"), paths, photos)


@pytest.mark.usefixtures("checks_here")
def test_a_second_driver_is_told_who_holds_the_folder(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from filelock import FileLock

    (photos / "out").mkdir()
    write_json(SweepPaths(photos / "out").driver_note, {"pid": 12, "host": "ward3", "since": 0.0})
    with FileLock(photos / "out" / "driver.lock"):
        assert run(photos) == 2
    assert "is in use by process 12 on ward3 (since 19" in capsys.readouterr().err


@pytest.mark.usefixtures("checks_here")
def test_failed_cells_are_named_also_where_the_report_cannot_be_made(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = SweepSummary(
        counts={"done": 1, "failed": 1}, failures=["fp32: nan"], tracking_uri="u", parent_id="p"
    )

    def report(*_given: Any, **_named: Any) -> None:
        raise InputError("the runs are not there")

    monkeypatch.setattr("fqsweep.engine.sweep.run_sweep", lambda _options: summary)
    monkeypatch.setattr("fqsweep.main._report", report)
    assert run(photos) == 1
    error = capsys.readouterr().err
    assert "failed: fp32: nan" in error and " retry " in error
    assert "its report could not be made: the runs are not there" in error


def test_a_broken_photo_fails_its_task_for_good_and_names_the_file(photos: Path) -> None:
    (photos / "photos" / "7.png").write_bytes((photos / "photos" / "8.png").read_bytes()[:100])
    cell = expand_cells(load_space(photos / "bad.yaml"))[0]
    task = Task(key=cell.baseline_key, kind="baseline", cell=cell)
    outcome = perform(task, paths=SweepPaths(photos / "out"), data_dir=photos, gpus=0, num_threads=1)
    assert outcome.ending == "failed"
    assert "7.png" in outcome.reason


def test_data_list_and_verify_show_counts(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "list"]) == 0
    assert "isic2019" in capsys.readouterr().out
    assert main(["data", "verify", str(photos / "bad.yaml"), "--data-dir", str(photos)]) == 0
    assert "photos: 80 images" in capsys.readouterr().out


def test_real_isic_images_are_described(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "verify", "isic2019_cpu", "--fast", "--data-dir", str(shared_data)]) == 0
    assert "3,584 images" in capsys.readouterr().out


def test_plan_warns_of_classes_with_few_test_images_in_a_group(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(photos / "bad.yaml"), "--data-dir", str(photos)]) == 0
    warning = "warning: photos: 4 (class, group) pairs have fewer than 10 test images, so that balanced_acc_worst by sex"
    assert warning in capsys.readouterr().out
    (photos / "photos.csv").unlink()
    assert main(["plan", str(photos / "bad.yaml"), "--data-dir", str(photos)]) == 2
    shown = capsys.readouterr()
    assert "bad: 2 cells, 2 trials" in shown.out and "data set photos cannot be used yet" in shown.err
    assert main(["plan", str(photos / "bad.yaml"), "--data-dir", str(photos), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["num_cells"] == 2


def test_plan_and_run_say_what_is_left_out(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from filelock import FileLock

    table = pd.read_csv(photos / "photos.csv")
    table.loc[3, "sex"], table.loc[4, "diagnosis"] = "none", ""
    table.to_csv(photos / "photos.csv", index=False)
    assert main(["plan", str(photos / "bad.yaml"), "--data-dir", str(photos)]) == 0
    planned = capsys.readouterr().out
    (photos / "out").mkdir()
    with FileLock(photos / "out" / "driver.lock"):  # so that nothing is started
        assert run(photos) == 2
    for shown in (planned, capsys.readouterr().out):
        assert "photos: 1 image without a label left out.\nphotos: 1 image of unknown sex left" in shown


def test_every_data_set_has_its_turn(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(photos, "datasets:\n", "datasets:\n  - {kind: isic2019}\n")
    command = ["data", "verify", str(photos / "bad.yaml"), "--data-dir", str(photos)]
    assert main(command) == 2
    shown = capsys.readouterr()
    assert "fqsweep: " in shown.err and "must be the folder of ISIC 2019" in shown.err
    assert "photos is sound" in shown.out


@pytest.mark.parametrize(
    ("given", "file", "kind"),
    [
        (None, "model.onnx", "onnx"),
        (None, "MODEL.ONNX", "onnx"),
        (None, "model.fqs", "packed"),
        (None, "model", "packed"),
        ("onnx", "model.bin", "onnx"),
        ("packed", "model.fqs", "packed"),
    ],
)
def test_an_export_is_of_the_kind_that_its_name_says(
    monkeypatch: pytest.MonkeyPatch, given: str | None, file: str, kind: str
) -> None:
    asked: list[str] = []

    def export_run(*_: object, kind: str, data_dir: Path | None) -> list[str]:
        asked.append(kind)
        return []

    monkeypatch.setattr("fqsweep.export.export_run", export_run)
    options = ["--format", given] if given else []
    assert main(["export", "abc", "--tracking-uri", "http://nowhere", "--out", file, *options]) == 0
    assert asked == [kind]


@pytest.mark.parametrize(
    ("given", "file", "fitting"), [("packed", "x.onnx", ".fqs"), ("onnx", "x.fqs", ".onnx")]
)
def test_an_export_whose_name_contradicts_its_format_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str, file: str, fitting: str
) -> None:
    out = tmp_path / file
    assert (
        main(["export", "abc", "--tracking-uri", "http://nowhere", "--out", str(out), "--format", given]) == 2
    )
    said = capsys.readouterr().err
    assert f"--format {given} and --out {out} contradict each other" in said
    assert f"a file that ends with {fitting}" in said
    assert not out.exists()
