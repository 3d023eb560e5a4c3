"""The plan: counts that are those of the sweep, and times that follow the work."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import pandas as pd
import pytest

from fqsweep.cells import expand_cells
from fqsweep.config import FilesBase, Isic2019Config, Resources, SynthdermConfig, TableConfig
from fqsweep.engine import estimate as estimate_module
from fqsweep.engine.estimate import CostModel, describe_plan, estimate, num_images
from fqsweep.engine.search import plan_sweep, shared_tasks
from fqsweep.engine.tasks import Task
from fqsweep.errors import InputError
from fqsweep.space import find_space, load_space
from tests.small_spaces import small_space


class Ward(FilesBase):
    """A kind of data set that this module knows nothing of."""

    kind: Literal["ward"]
    name: str = "ward"


def tasks_of(folder: Path, *changes: tuple[str, str]) -> dict[str, Task]:
    """The first parent, cost table and a trial of each method."""
    cells = expand_cells(small_space(folder, *changes))
    tasks = {task.kind: task for task in reversed(shared_tasks(cells).values())}
    return {**tasks, **{c.point.method: Task(key=c.key, kind="trial", cell=c) for c in reversed(cells)}}


def test_the_plan_counts_what_the_sweep_will_do(tmp_path: Path) -> None:
    space = small_space(tmp_path)
    plan = estimate(space, data_dir=None, num_cores=4)
    assert (plan.num_cells, plan.num_trials, plan.num_baselines, plan.num_importance) == (12, 16, 2, 2)
    state = plan_sweep(space, study=None, cost=CostModel(space.resources, data_dir=None).seconds)  # type: ignore[arg-type]
    assert plan.worker_s == pytest.approx(state.cost_left())
    assert plan.total_s == pytest.approx(plan.worker_s / 4)


def test_the_work_of_a_parent_is_its_epochs_of_training_and_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate_module, "macs_per_image", lambda _name, _size: 1000.0)
    tasks = tasks_of(tmp_path)
    model = CostModel(Resources(), data_dir=None)
    # 500 images: 300 to train (forward and backward count three), 75 to validate, 50 to calibrate, 75 to test.
    assert model.macs(tasks["baseline"]) == pytest.approx(1000 * 2 * (300 * 3 + 75))
    assert model.macs(tasks["importance"]) == pytest.approx(1000 * 50 * (7 + 2 * 9))
    assert model.macs(tasks["fp32"]) == pytest.approx(1000 * (75 + 75))
    assert model.macs(tasks["static"]) == pytest.approx(1000 * (300 * 3 + 75 + 150))


def test_twice_the_epochs_twice_the_training(tmp_path: Path) -> None:
    model = CostModel(Resources(), data_dir=None)
    plain = model.macs(tasks_of(tmp_path)["baseline"])
    assert model.macs(tasks_of(tmp_path, ("  epochs: 2", "  epochs: 4"))["baseline"]) == pytest.approx(
        2 * plain
    )


def test_larger_images_more_cores_and_a_gpu_move_the_time_the_right_way(tmp_path: Path) -> None:
    task = tasks_of(tmp_path)["baseline"]
    larger = tasks_of(tmp_path, ("image_size: 32", "image_size: 64"))["baseline"]
    one = CostModel(Resources(), data_dir=None)
    assert one.seconds(larger) > one.seconds(task)
    assert CostModel(Resources(cpus_per_trial=4), data_dir=None).seconds(task) < one.seconds(task)
    assert CostModel(Resources(gpus_per_trial=1), data_dir=None).seconds(task) < one.seconds(task)


def test_images_are_counted_where_the_data_is_and_taken_from_the_release_where_not(tmp_path: Path) -> None:
    config = Isic2019Config(kind="isic2019")
    assert num_images(config, None) == num_images(config, tmp_path / "absent") == 25_331
    (tmp_path / "isic2019").mkdir()
    (tmp_path / "isic2019" / "ISIC_2019_Training_GroundTruth.csv").write_text("image,MEL\na,1\nb,0\nc,0\n")
    assert num_images(config, tmp_path) == 3
    assert num_images(config.model_copy(update={"max_images": 2}), tmp_path) == 2
    assert num_images(SynthdermConfig(kind="synthderm", num_images=123), None) == 123
    assert num_images(Ward(kind="ward", group_attributes=("sex",)), tmp_path) == 10_000, (
        "a kind that was added elsewhere is no table"
    )
    assert num_images(SynthdermConfig(kind="synthderm", num_images=123, max_images=60), None) == 60


def test_a_table_is_counted_from_its_csv_or_parquet_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t.csv").write_text('file,label,sex\n"a\nb",x,f\nc,y,m\n\n,,\n')
    pd.read_csv(tmp_path / "t.csv").dropna(how="all").to_parquet(tmp_path / "t.parquet")
    (tmp_path / "broken.parquet").write_text("PAR")
    config = TableConfig(
        kind="table",
        name="t",
        csv="t.csv",
        images="images",
        image_column="file",
        label_column="label",
        group_columns={"sex": "sex"},
        group_attributes=("sex",),
    )
    assert num_images(config, tmp_path) == 2
    assert num_images(config.model_copy(update={"csv": "t.parquet"}), tmp_path) == 2
    assert num_images(config.model_copy(update={"csv": "broken.parquet"}), tmp_path) == 10_000
    monkeypatch.setenv("HOME", str(tmp_path))
    assert num_images(config.model_copy(update={"csv": "~/t.csv"}), tmp_path / "elsewhere") == 2


def test_an_architecture_that_is_not_known_is_refused(tmp_path: Path) -> None:
    space = small_space(tmp_path, ("[test_resnet]", "[test_resent]"))
    with pytest.raises(InputError, match="timm .* does not know it; near: test_resnet"):
        estimate(space, data_dir=None, num_cores=1)


def test_a_plan_names_budgets_in_bits_and_in_bytes() -> None:
    space = load_space(find_space("demo")).model_copy(update={"budgets_bytes": (500_000,)})
    text = describe_plan(space, estimate(space, data_dir=None, num_cores=2), data_dir=None)
    assert "data set      synthderm, 2,000 images, at 32 px" in text
    assert "budgets       0.5 bit; 1 bit; 2 bit; 4 bit; 500 kB" in text
    assert re.search(r"static +0\.5; 1; 2; 4; 500 kB +5 +5", text)


def test_a_plan_says_whose_images_it_counts(tmp_path: Path) -> None:
    space = load_space(find_space("isic2019_cpu"))
    plan = estimate(space, data_dir=None, num_cores=2)
    nowhere, absent = (describe_plan(space, plan, data_dir=folder) for folder in (None, tmp_path / "absent"))
    assert "25,331 images (of the official release; --data-dir counts yours)" in nowhere
    assert (
        "25,331 images (of the official release; its table is not in the data folder, or cannot be read)"
        in absent
    )
    (tmp_path / "isic2019").mkdir()
    (tmp_path / "isic2019" / "ISIC_2019_Training_GroundTruth.csv").write_text("image,MEL\na,1\nb,0\nc,0\n")
    assert "isic2019, 3 images (rows of its table), at 48 px" in describe_plan(space, plan, data_dir=tmp_path)
    few = space.model_copy(update={"datasets": (space.datasets[0].model_copy(update={"max_images": 3000}),)})
    assert "3,000 images (at most 3,000 of the official release" in describe_plan(few, plan, data_dir=None)
