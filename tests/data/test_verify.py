"""What ``fqsweep data verify`` finds in sound and damaged folders."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fqsweep.config import TableConfig
from fqsweep.data import open_dataset, plan_dataset
from fqsweep.data.report import describe_warnings
from fqsweep.data.verify import describe_findings, verify_dataset
from fqsweep.engine.sweep import later_warnings
from fqsweep.errors import InputError
from fqsweep.files import SweepPaths
from fqsweep.main import main
from tests.data.conftest import write_photo

NUM_IMAGES = 60


def config(**changes: object) -> TableConfig:
    settings: dict[str, object] = {
        "kind": "table",
        "name": "clinic",
        "csv": "table.csv",
        "images": "photos",
        "image_column": "file",
        "label_column": "grade",
        "group_columns": {"sex": "sex"},
        "group_attributes": ("sex",),
        "image_size": 32,
        "min_group_count": 2,
        "patient_column": "who",
    }
    return TableConfig(**settings | changes)  # type: ignore[arg-type]


@pytest.fixture
def clinic(tmp_path: Path) -> Path:
    rows = []
    for number in range(NUM_IMAGES):
        write_photo(tmp_path / "photos" / f"{number}.jpg", seed=number, side=40)
        row = {"file": f"{number}.jpg", "grade": "ab"[number % 2], "sex": "mf"[number // 2 % 2]}
        rows.append({**row, "who": f"p{number // 2}"})
    pd.DataFrame(rows).to_csv(tmp_path / "table.csv", index=False)
    return tmp_path


def cut(path: Path, kept_frac: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(kept_frac * len(content))])


def test_a_sound_set_is_sound(clinic: Path) -> None:
    seen: list[tuple[int, int]] = []
    found = verify_dataset(
        config(), data_dir=clinic, on_progress=lambda done, total: seen.append((done, total))
    )
    assert found.is_sound and found.num_looked_at == NUM_IMAGES
    assert seen[-1] == (NUM_IMAGES, NUM_IMAGES)
    text = describe_findings(found)
    assert "clinic: 60 images" in text and text.endswith("clinic is sound")
    assert "warning: fewer than 10 test images" in text


def test_strange_files_are_read_and_broken_ones_named(clinic: Path) -> None:
    photos = clinic / "photos"
    cut(photos / "0.jpg", 0.9)
    (photos / "1.jpg").unlink()
    write_photo(photos / "1.png", seed=1, side=64)
    cut(photos / "1.png", 0.5)
    Image.new("CMYK", (40, 40), (255, 0, 0, 0)).save(photos / "2.jpg")
    (photos / "3.jpg").unlink()
    Image.fromarray(np.full((40, 40), 0x5A5A, np.uint16)).save(photos / "3.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.eye(40, dtype=np.uint8) * 255).save(photos / "4.jpg", exif=exif)
    (photos / "5.jpg").write_bytes(b"")
    table = pd.read_csv(clinic / "table.csv")
    table["file"] = table["file"].str.removesuffix(".jpg")
    table.to_csv(clinic / "table.csv", index=False)
    found = verify_dataset(config(), data_dir=clinic)
    assert [name for name, _ in found.broken] == ["0", "1", "5"]
    assert not found.is_sound and len(found.samples) == NUM_IMAGES - 3
    text = describe_findings(found)
    for name in ("0.jpg", "1.png", "5.jpg"):
        assert f"{photos / name} cannot be decoded" in text
    headers = verify_dataset(config(), data_dir=clinic, fast=True)
    assert [name for name, _ in headers.broken] == ["5"]
    assert "only headers were read" in describe_findings(headers)


def test_missing_images_are_listed_unless_they_may_be_missing(clinic: Path) -> None:
    (clinic / "photos" / "7.jpg").unlink()
    found = verify_dataset(config(), data_dir=clinic)
    assert found.missing == ("7.jpg",) and not found.is_sound
    assert "missing images (1):\n  7.jpg" in describe_findings(found)
    assert verify_dataset(config(missing_images="drop"), data_dir=clinic).is_sound


def test_leaks_in_official_lists_are_found_by_patient_and_by_picture(clinic: Path) -> None:
    table = pd.read_csv(clinic / "table.csv")
    table["part"] = np.where(table.index < 40, "train", "test")
    table.loc[table["file"] == "1.jpg", "part"] = "test"  # the other image of its patient is for training
    table.to_csv(clinic / "table.csv", index=False)
    with Image.open(clinic / "photos" / "10.jpg") as image:
        image.resize((60, 60)).save(clinic / "photos" / "50.jpg", quality=60)
    found = verify_dataset(config(split_column="part"), data_dir=clinic)
    sides = {tuple(sorted(leak.ids)): set(leak.splits) for leak in found.leaks}
    assert {"0.jpg", "1.jpg"} in [set(ids) for ids in sides]
    assert any("50.jpg" in ids or "51.jpg" in ids for ids in sides)
    assert all("test" in splits for splits in sides.values())
    text = describe_findings(found)
    assert not found.is_sound and "leaks between splits" in text
    assert text.endswith("is not sound: correct the given split, or leave it out and have one made")
    assert verify_dataset(config(), data_dir=clinic).leaks == []


def test_leaks_of_a_given_split_are_warned_of_before_and_when_images_are_opened(
    clinic: Path,
) -> None:
    table = pd.read_csv(clinic / "table.csv")
    table["part"] = np.array(["train", "calibration", "validation", "test"])[table.index // 4 % 4]
    table.loc[table["file"] == "1.jpg", "part"] = "test"  # the other image of its patient is for training
    table.to_csv(clinic / "table.csv", index=False)
    with Image.open(clinic / "photos" / "10.jpg") as image:
        image.resize((60, 60)).save(clinic / "photos" / "51.jpg", quality=60)
    given = config(split_column="part", min_group_count=1)
    samples, splits = plan_dataset(given, data_dir=clinic)
    (planned,) = [text for text in describe_warnings(given, samples, splits) if "several sides" in text]
    assert planned.startswith("warning: clinic: ") and "(train) and " in planned
    opened = open_dataset(given, data_dir=clinic, pack_dir=clinic / "packs")
    warnings = (clinic / "packs" / f"{opened.digest}_warnings.txt").read_text()
    assert "2 images have near-duplicates, which the given split does not keep together." in warnings
    assert "2 lesions, patients or near-duplicates have images on several sides of the split" in warnings
    (later,) = [
        line for line in later_warnings(SweepPaths(clinic), [planned]) if "near-duplicates have" in line
    ]
    assert later in warnings
    own = config(min_group_count=1)
    assert not [text for text in describe_warnings(own, *plan_dataset(own, data_dir=clinic)) if "sides" in text]


def test_groups_too_small_are_said_beside_the_counts(clinic: Path) -> None:
    found = verify_dataset(config(min_group_count=30), data_dir=clinic)
    assert not found.is_sound
    assert len(found.small) == 4  # two sexes, in validation and in test
    text = describe_findings(found)
    assert "groups or classes too small (4):" in text and "of 30 images in validation\n" in text
    assert "\n  Merge groups or classes (" in text


def test_very_many_small_groups_are_counted_to_the_last(clinic: Path) -> None:
    groups = config(min_group_count=30, group_columns={"who": "who"}, group_attributes=("who",))
    found = verify_dataset(groups, data_dir=clinic)
    assert f"groups or classes too small ({len(found.small)}):" in describe_findings(found)
    assert len(found.small) >= NUM_IMAGES  # of two images a patient, in validation and in test


def test_a_folder_without_any_readable_image_is_bad_input(clinic: Path) -> None:
    for path in (clinic / "photos").iterdir():
        path.write_bytes(b"")
    with pytest.raises(InputError, match="no image can be read, first: .*0.jpg"):
        verify_dataset(config(), data_dir=clinic)


def test_the_exit_code_tells_sound_from_broken_from_bad_input(
    isic_root: Path, write_space: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    space = write_space("{kind: isic2019, min_group_count: 1, image_size: 32, group_attributes: [sex]}")
    assert main(["data", "verify", str(space), "--data-dir", str(isic_root.parent)]) == 1
    assert "isic2019 is not sound" in capsys.readouterr().out
    assert main(["data", "verify", str(space), "--data-dir", str(isic_root / "nowhere")]) == 2
    assert "must be the folder of ISIC 2019" in capsys.readouterr().err


def test_all_real_images_decode_and_do_not_leak(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "verify", "isic2019", "--data-dir", str(shared_data)]) == 0
    text = capsys.readouterr().out
    assert "3,601 images were read, 0 are broken" in text
    assert "isic2019 is sound" in text
