from pathlib import Path

import pandas as pd
import pytest

from fqsweep.config import TableConfig
from fqsweep.data import describe_samples
from fqsweep.errors import InputError
from tests.data.conftest import write_photo


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pd.DataFrame(
        {
            "file": ["a/1.png", "a/2", "3.jpg", "4.png"],
            "grade": [10, 2, 2, 10],
            "age": ["30", "55.0", "71", ""],
            "who": ["p1", "p1", "", ""],
        }
    ).to_csv(tmp_path / "table.csv", index=False)
    for seed, name in enumerate(("a/1.png", "a/2.jpg", "3.jpg", "4.png")):
        write_photo(tmp_path / "photos" / name, seed=seed)
    return tmp_path


def config(**changes: object) -> TableConfig:
    settings: dict[str, object] = {
        "kind": "table",
        "name": "clinic",
        "csv": "table.csv",
        "images": "photos",
        "image_column": "file",
        "label_column": "grade",
        "group_columns": {"age": "age"},
        "group_attributes": ("age",),
    }
    return TableConfig(**settings | changes)  # type: ignore[arg-type]


def test_whole_number_labels_are_ordered_by_size_and_patients_kept_together(folder: Path) -> None:
    samples = describe_samples(config(patient_column="who", unknown_groups="keep"), data_dir=folder)
    assert samples.class_names == ("2", "10")
    by_id = dict(zip(samples.id_n.tolist(), samples.cluster_n.tolist(), strict=True))
    assert by_id["a/1.png"] == by_id["a/2"]
    assert len(set(by_id.values())) == 3
    assert samples.groups["age"].names == ("30", "55", "71", "unknown")


def test_group_maps_accept_numbers_and_leave_unlisted_values_out(folder: Path) -> None:
    samples = describe_samples(config(group_maps={"age": {"young": (30,), "old": (55, "71")}}), data_dir=folder)
    age = samples.groups["age"]
    assert [age.names[code] for code in age.code_n] == ["old", "young", "old"]
    fewer = describe_samples(config(group_maps={"age": {"young": (30,)}}), data_dir=folder)
    assert "3 images of unknown age are left out." in fewer.notes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"label_column": "grad"},
            r"table\.csv has no column 'grad' \(nearest: 'grade'\); its columns: file, grade",
        ),
        ({"patient_column": "patient"}, "no column 'patient'; its columns"),
        (
            {"group_maps": {"age": {"x": (99,)}}},
            r"none of its values \(99\) occurs in the column, which has: 30, 55",
        ),
        ({"group_maps": {"age": {"x": (30,), "y": (30.0,)}}}, "'30' stands under both 'x' and 'y'"),
        ({"csv": "other.csv"}, r"other\.csv is needed but is not there \(CSVs beside it: table\.csv\)"),
        ({"images": "pictures"}, "pictures must be the folder of images of clinic"),
        ({"label_map": {"low": ("3",)}}, "no class '3'"),
    ],
)
def test_what_is_not_there_is_named(folder: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        describe_samples(config(**changes), data_dir=folder)


def test_repeated_rows_are_refused(folder: Path) -> None:
    path = folder / "table.csv"
    path.write_text(path.read_text() + "3.jpg,2,30,\n")
    with pytest.raises(InputError, match=r"1 have several \(3\.jpg\); remove the repeated rows"):
        describe_samples(config(), data_dir=folder)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00bad", b'file,grade\n"open'])
def test_a_file_that_is_no_csv_is_refused(folder: Path, content: bytes) -> None:
    (folder / "table.csv").write_bytes(content)
    with pytest.raises(InputError, match=r"table\.csv (cannot be read as a UTF-8 CSV|has no column)"):
        describe_samples(config(), data_dir=folder)
