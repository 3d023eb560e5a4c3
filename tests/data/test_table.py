from pathlib import Path
from typing import Literal
from unicodedata import normalize

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from fqsweep.config import TableConfig
from fqsweep.data import describe_samples, open_dataset
from fqsweep.data.verify import verify_dataset
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
    assert "3 images of unknown age left out." in fewer.notes
    assert "group_maps: age does not list, so that they are unknown: 55 (1), 71 (1)." in fewer.notes
    typo = describe_samples(config(group_maps={"age": {"young": (30, 31), "old": (55, 71)}}), data_dir=folder)
    assert "group_maps: age lists what never occurs: 31." in typo.notes


def test_a_group_map_means_the_very_words_that_it_lists(folder: Path) -> None:
    table = pd.read_csv(folder / "table.csv", dtype=str)
    table["age"] = ["none", "light", "", "NA"]
    table.to_csv(folder / "table.csv", index=False)
    maps = {"age": {"non-smoker": ("none",), "smoker": ("light",)}}
    samples = describe_samples(config(group_maps=maps), data_dir=folder)
    assert samples.id_n.tolist() == ["a/1.png", "a/2"]
    assert "group_maps: age does not list, so that they are unknown: NA (1)." in samples.notes
    region = describe_samples(
        config(group_maps={"age": {"america": ("NA",), "rest": ("light", "none")}}), data_dir=folder
    )
    assert sorted(region.groups["age"].names) == ["america", "rest"] and len(region) == 3


def test_two_columns_of_one_name_are_refused_where_one_of_them_is_read(folder: Path) -> None:
    rows = (folder / "table.csv").read_text().splitlines()
    (folder / "table.csv").write_text("\n".join([f"{rows[0]}, grade ", *(f"{row},7" for row in rows[1:])]))
    with pytest.raises(
        InputError, match=r"table\.csv has 2 columns called 'grade'; give each a name of its own"
    ):
        describe_samples(config(), data_dir=folder)
    (folder / "table.csv").write_text("\n".join([f"{rows[0]}, who ", *(f"{row},7" for row in rows[1:])]))
    assert len(describe_samples(config(unknown_groups="keep"), data_dir=folder).id_n) == 4


def test_a_blank_around_the_name_of_a_column_is_no_part_of_it(folder: Path) -> None:
    text = (folder / "table.csv").read_text()
    (folder / "table.csv").write_text(text.replace("file,grade", "file , grade", 1))
    assert describe_samples(config(), data_dir=folder).class_names == ("2", "10")


@pytest.mark.parametrize(("stored", "listed"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_accents_in_file_names_may_be_stored_in_either_way(
    folder: Path, stored: Literal["NFC", "NFD"], listed: Literal["NFC", "NFD"]
) -> None:
    (folder / "photos" / "3.jpg").rename(folder / "photos" / normalize(stored, "Bär é.jpg"))
    table = pd.read_csv(folder / "table.csv", dtype=str)
    for name in ("Bär é.jpg", "Bär é"):
        table.loc[2, "file"] = normalize(listed, name)
        table.to_csv(folder / "table.csv", index=False)
        assert len(describe_samples(config(unknown_groups="keep"), data_dir=folder).id_n) == 4


@pytest.mark.parametrize(
    ("yes", "no"), [("yes", "no"), ("TRUE", "FALSE"), ("True", "False"), ("on", "off"), (1, 0)]
)
def test_a_truth_value_of_a_group_map_means_the_word_that_the_table_has(
    folder: Path, yes: object, no: object
) -> None:
    table = pd.read_csv(folder / "table.csv").assign(smokes=[yes, yes, no, no])
    table.to_csv(folder / "table.csv", index=False)
    smoking = config(
        group_columns={"smokes": "smokes"},
        group_attributes=("smokes",),
        group_maps={"smokes": {"smoker": (True,), "other": (False,)}},
    )
    groups = describe_samples(smoking, data_dir=folder).groups["smokes"]
    assert [groups.names[code] for code in groups.code_n] == ["other", "other", "smoker", "smoker"]


def test_an_attribute_is_not_crossed_with_itself() -> None:
    with pytest.raises(ValueError, match="'age x age' crosses an attribute with itself; name each once"):
        config(group_attributes=("age x age",))


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
            r"none of the values of 'x' \(99\) occurs in the column, which has: 30, 55",
        ),
        (
            {"group_maps": {"age": {"young": (30,), "old": (7, "8")}}},
            r"group_maps: age: none of the values of 'old' \(7, 8\) occurs",
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


def test_classes_that_are_numbers_may_be_mapped_as_numbers(folder: Path) -> None:
    mapped = config(label_map={"high": (10,), "low": (2.0,)}, unknown_groups="keep")
    assert mapped == config(label_map={"high": ("10",), "low": ("2",)}, unknown_groups="keep")
    assert describe_samples(mapped, data_dir=folder).class_names == ("high", "low")
    with pytest.raises(ValidationError):
        config(label_map={"high": (True,)})


@pytest.mark.parametrize(("separator", "name"), [(";", "semicolons"), ("\t", "tabs")])
def test_another_separator_is_named(folder: Path, separator: str, name: str) -> None:
    table = pd.read_csv(folder / "table.csv")
    table.to_csv(folder / "table.csv", index=False, sep=separator, decimal="," if separator == ";" else ".")
    with pytest.raises(InputError, match=rf"table\.csv: the names in its header line are separated by {name}"):
        describe_samples(config(), data_dir=folder)


def test_paths_as_windows_writes_them_are_found(folder: Path) -> None:
    path = folder / "table.csv"
    path.write_text(path.read_text().replace("a/", "a\\"))
    samples = describe_samples(config(unknown_groups="keep"), data_dir=folder)
    assert samples.id_n.tolist() == ["3.jpg", "4.png", "a/1.png", "a/2"]


def test_names_that_differ_in_capitals_alone_and_images_without_a_patient_are_noted(folder: Path) -> None:
    table = pd.read_csv(folder / "table.csv").assign(
        grade=["BCC", "bcc", "MEL", "MEL"], sex=["F", "f", "m", "m"]
    )
    table.to_csv(folder / "table.csv", index=False)
    changes: dict[str, object] = {"group_columns": {"sex": "sex"}, "group_attributes": ("sex",)}
    samples = describe_samples(config(patient_column="who", **changes), data_dir=folder)
    assert "classes that differ in capitals alone: BCC, bcc; label_map makes them one." in samples.notes
    assert "groups of sex that differ in capitals alone: F, f; group_maps makes them one." in samples.notes
    assert "who: 2 images without one: nothing keeps them together." in samples.notes
    joined = config(label_map={"BCC": ("BCC", "bcc"), "MEL": ("MEL",)}, **changes)
    assert not any("classes that differ" in note for note in describe_samples(joined, data_dir=folder).notes)


def test_images_that_only_look_alike_are_left_apart_where_that_is_asked_for(tmp_path: Path) -> None:
    rows = [
        {"file": f"{index}.png", "grade": index % 2, "age": str(30 + 40 * (index // 2 % 2))}
        for index in range(80)
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "table.csv", index=False)
    for index in range(80):
        write_photo(tmp_path / "photos" / f"{index}.png", seed=0)
    alike = config(image_size=16, min_group_count=1)
    with pytest.raises(InputError, match=r"80 of them hang together \(.*\(near_duplicates: ignore\)"):
        open_dataset(alike, data_dir=tmp_path, pack_dir=tmp_path / "packs")
    assert not verify_dataset(alike, data_dir=tmp_path).is_sound
    apart = alike.model_copy(update={"near_duplicates": "ignore"})
    dataset = open_dataset(apart, data_dir=tmp_path, pack_dir=tmp_path / "packs")
    assert len(np.unique(dataset.samples.cluster_n)) == 80 and not dataset.samples.notes
    assert verify_dataset(apart, data_dir=tmp_path).is_sound
    assert apart.contents != alike.contents and "near_duplicates" not in alike.contents


def test_parquet_gives_the_same_samples_as_csv(folder: Path) -> None:
    typed = pd.read_csv(folder / "table.csv")
    typed["who"] = typed["who"].astype("category")
    typed.to_parquet(folder / "table.parquet")
    from_csv, from_parquet = (
        describe_samples(config(csv=name, patient_column="who", unknown_groups="keep"), data_dir=folder)
        for name in ("table.csv", "table.parquet")
    )
    assert from_csv.id_n.tolist() == from_parquet.id_n.tolist()
    assert from_csv.class_names == from_parquet.class_names
    assert from_csv.groups["age"].names == from_parquet.groups["age"].names
    assert from_csv.cluster_n.tolist() == from_parquet.cluster_n.tolist()
    typed.set_index("file").to_parquet(folder / "table.parquet")
    indexed = describe_samples(config(csv="table.parquet", unknown_groups="keep"), data_dir=folder)
    assert indexed.id_n.tolist() == from_csv.id_n.tolist()
    typed.set_index("file", drop=False).to_parquet(folder / "table.parquet")
    twice = describe_samples(config(csv="table.parquet", unknown_groups="keep"), data_dir=folder)
    assert twice.id_n.tolist() == from_csv.id_n.tolist()
    (folder / "table.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(InputError, match=r"table\.parquet cannot be read as a Parquet file"):
        describe_samples(config(csv="table.parquet"), data_dir=folder)


def test_edges_make_bins_and_a_missing_number_is_unknown(folder: Path) -> None:
    samples = describe_samples(config(group_edges={"age": (40, 60)}, unknown_groups="keep"), data_dir=folder)
    named = dict(zip(samples.id_n.tolist(), samples.groups["age"].code_n.tolist(), strict=True))
    assert samples.groups["age"].names == ("<40", "40-59", "60+", "unknown")
    assert named == {"a/1.png": 0, "a/2": 1, "3.jpg": 2, "4.png": 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_edges": {"age": (60, 40)}}, "must be rising numbers"),
        ({"group_edges": {"sex": (1,)}}, "no entry in group_columns"),
        ({"group_edges": {"age": (1,)}, "group_maps": {"age": {"a": (1,)}}}, "both group_maps and group_edges"),
        ({"group_attributes": ("age x sex",)}, "'sex' has no entry in group_columns"),
        (
            {"group_columns": {"age": "age", "sex": "sex"}, "group_attributes": ("age*sex",)},
            "has no entry in group_columns .*; crossed, write age x sex",
        ),
        ({"group_attributes": ("age", "age x who", "age  x who")}, "'age x who' stands here twice"),
    ],
)
def test_bins_that_cannot_be_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_crossed_attributes_make_a_group_of_each_pair(folder: Path) -> None:
    crossed = config(
        group_columns={"age": "age", "who": "who"},
        group_attributes=("age", "who x age"),
        group_edges={"age": (40, 60)},
        unknown_groups="keep",
    )
    samples = describe_samples(crossed, data_dir=folder)
    groups = samples.groups["who x age"]
    named = {name: groups.names[code] for name, code in zip(samples.id_n.tolist(), groups.code_n, strict=True)}
    assert named == {"a/1.png": "p1 x <40", "a/2": "p1 x 40-59", "3.jpg": "unknown", "4.png": "unknown"}
    assert samples.groups["age"].names == ("<40", "40-59", "60+", "unknown")


def test_images_of_a_class_called_none_take_part(folder: Path) -> None:
    path = folder / "table.csv"
    path.write_text(path.read_text().replace(",10,", ",none,"))
    samples = describe_samples(config(unknown_groups="keep"), data_dir=folder)
    assert samples.class_names == ("2", "none") and len(samples) == 4


def test_a_group_called_none_is_unknown_and_ranges_are_names(folder: Path) -> None:
    path = folder / "table.csv"
    path.write_text(path.read_text().replace(",71,", ",none,").replace(",30,", ",3_0,"))
    age = describe_samples(config(unknown_groups="keep"), data_dir=folder).groups["age"]
    assert age.names == ("3_0", "55", "unknown")
    assert "age: read as unknown: none (1)." in describe_samples(config(), data_dir=folder).notes


def test_classes_can_be_dropped_by_name(folder: Path) -> None:
    samples = describe_samples(config(drop_classes=("10",), unknown_groups="keep"), data_dir=folder)
    assert samples.class_names == ("2",)
    assert "2 images of dropped classes left out: 10." in samples.notes
    with pytest.raises(InputError, match=r"drop_classes: .* has no class '11' \(nearest: '10'\)"):
        describe_samples(config(drop_classes=("11",)), data_dir=folder)
    with pytest.raises(InputError, match="'10' stands in label_map and in drop_classes"):
        describe_samples(config(drop_classes=("10",), label_map={"x": ("10",)}), data_dir=folder)


def test_missing_images_are_refused_or_dropped_as_asked(folder: Path) -> None:
    (folder / "photos" / "3.jpg").unlink()
    with pytest.raises(InputError, match=r"1 of 3 images .*3\.jpg; .* set missing_images: drop"):
        describe_samples(config(), data_dir=folder)
    samples = describe_samples(config(missing_images="drop"), data_dir=folder)
    assert samples.id_n.tolist() == ["a/1.png", "a/2"]
    assert "1 image without an image file left out." in samples.notes


def test_a_split_column_is_kept_and_strange_words_in_it_are_named(folder: Path) -> None:
    table = pd.read_csv(folder / "table.csv", dtype=str)
    table["part"] = ["Training", "val", "test", ""]
    table.to_csv(folder / "table.csv", index=False)
    samples = describe_samples(config(split_column="part", unknown_groups="keep"), data_dir=folder)
    assert samples.official_n is not None
    named = dict(zip(samples.id_n.tolist(), samples.official_n.tolist(), strict=True))
    assert named == {"a/1.png": "train", "a/2": "validation", "3.jpg": "test"}
    assert "1 image in none of the official lists left out." in samples.notes
    table.assign(part="fold1").to_csv(folder / "table.csv", index=False)
    with pytest.raises(InputError, match="column 'part' must name splits .* but has fold1; write these words"):
        describe_samples(config(split_column="part"), data_dir=folder)
