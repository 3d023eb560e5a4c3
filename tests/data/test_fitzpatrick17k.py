from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fqsweep.config import Fitzpatrick17kConfig
from fqsweep.data import describe_samples
from fqsweep.errors import InputError


def config(**changes: object) -> Fitzpatrick17kConfig:
    return Fitzpatrick17kConfig(kind="fitzpatrick17k", **changes)  # type: ignore[arg-type]


def test_tone_joins_types_one_to_three_and_four_to_six(fitzpatrick_root: Path) -> None:
    samples = describe_samples(
        config(group_attributes=("skin_tone", "skin_type")), data_dir=fitzpatrick_root.parent
    )
    assert samples.groups["skin_tone"].names == ("1-3", "4-6")
    assert samples.groups["skin_tone"].code_n.tolist() == [0, 0, 1, 1]
    assert samples.groups["skin_type"].names == ("1", "3", "4", "6")
    assert samples.class_names == ("acne", "vitiligo")
    assert "1 image of unknown skin_tone left out." in samples.notes


def test_unknown_types_can_be_kept(fitzpatrick_root: Path) -> None:
    samples = describe_samples(config(unknown_groups="keep"), data_dir=fitzpatrick_root.parent)
    assert samples.groups["skin_tone"].names == ("1-3", "4-6", "unknown")


@pytest.mark.parametrize("folder", ["data/finalfitz17k", "finalfitz17k", "."])
def test_folder_names_found_in_the_wild_are_accepted(fitzpatrick_root: Path, folder: str) -> None:
    images = list((fitzpatrick_root / "images").iterdir())
    (fitzpatrick_root / folder).mkdir(parents=True, exist_ok=True)
    for path in images:
        path.rename(fitzpatrick_root / folder / path.name)
    assert len(describe_samples(config(), data_dir=fitzpatrick_root.parent)) == 4


def test_the_column_may_be_called_fitzpatrick(fitzpatrick_root: Path) -> None:
    path = fitzpatrick_root / "fitzpatrick17k.csv"
    text = path.read_text()
    path.write_text(text.replace("fitzpatrick_scale", "fitzpatrick"))
    assert len(describe_samples(config(), data_dir=fitzpatrick_root.parent)) == 4
    path.write_text(text.replace("fitzpatrick_scale", "fitz_scale"))
    with pytest.raises(InputError, match=r"no column 'fitzpatrick_scale' \(nearest: 'fitz_scale'\)"):
        describe_samples(config(), data_dir=fitzpatrick_root.parent)


def test_a_type_that_is_none_is_named_with_its_line(fitzpatrick_root: Path) -> None:
    path = fitzpatrick_root / "fitzpatrick17k.csv"
    path.write_text(path.read_text().replace(",6,", ",7,"))
    with pytest.raises(
        InputError, match="line 5: fitzpatrick_scale must be 1 to 6, or -1 for unknown, but is 7"
    ):
        describe_samples(config(), data_dir=fitzpatrick_root.parent)


def test_the_complete_public_csv_is_read(shared_data: Path, tmp_path: Path) -> None:
    """All 16,577 rows, with empty files in place of images: describing decodes nothing."""
    root = tmp_path / "fitzpatrick17k"
    (root / "images").mkdir(parents=True)
    text = (shared_data / "labels" / "fitzpatrick17k.csv").read_text()
    (root / "fitzpatrick17k.csv").write_text(text)
    for line in text.splitlines()[1:]:
        (root / "images" / f"{line.split(',')[0]}.jpg").touch()
    samples = describe_samples(config(group_attributes=("skin_type",)), data_dir=tmp_path)
    assert len(samples) == 16_577 - 565
    assert len(samples.class_names) == 114
    assert np.bincount(samples.groups["skin_type"].code_n).tolist() == [2947, 4808, 3308, 2781, 1533, 635]
    partition = describe_samples(config(label_level="three_partition_label"), data_dir=tmp_path)
    assert partition.class_names == ("benign", "malignant", "non-neoplastic")


def test_images_marked_as_wrongly_labelled_can_be_dropped(fitzpatrick_root: Path) -> None:
    path = fitzpatrick_root / "fitzpatrick17k.csv"
    path.write_text(path.read_text().replace("non-neoplastic,,", "non-neoplastic,3 Wrongly labelled,", 1))
    assert len(describe_samples(config(), data_dir=fitzpatrick_root.parent)) == 4
    kept = describe_samples(config(drop_wrong_labels=True), data_dir=fitzpatrick_root.parent)
    assert kept.id_n.tolist() == [f"{number:032x}" for number in (1, 2, 3)]
    assert "1 image marked as wrongly labelled left out." in kept.notes


@pytest.mark.parametrize(("strange", "message"), [("7", "must be 1 to 6"), ("dark", "must hold numbers")])
def test_lines_are_those_of_the_file_where_rows_were_dropped(
    fitzpatrick_root: Path, strange: str, message: str
) -> None:
    path = fitzpatrick_root / "fitzpatrick17k.csv"
    text = path.read_text().replace("non-neoplastic,,", "non-neoplastic,3 Wrongly labelled,", 1)
    path.write_text(text.replace(",6,", f",{strange},"))
    with pytest.raises(InputError, match=f"line 5: .*{message}"):
        describe_samples(config(drop_wrong_labels=True), data_dir=fitzpatrick_root.parent)


def test_images_may_be_called_by_their_address(fitzpatrick_root: Path) -> None:
    table = pd.read_csv(fitzpatrick_root / "fitzpatrick17k.csv", dtype=str)
    table["url_alphanum"] = [f"httpsite{number}.jpg" for number in range(5)]
    table.to_csv(fitzpatrick_root / "fitzpatrick17k.csv", index=False)
    for number in range(1, 5):
        (fitzpatrick_root / "images" / f"{number:032x}.jpg").rename(
            fitzpatrick_root / "images" / f"httpsite{number}.jpg"
        )
    assert len(describe_samples(config(), data_dir=fitzpatrick_root.parent)) == 4


@pytest.mark.parametrize("names", [("train.csv", "val.csv"), ("train_score.csv", "all_val.csv")])
def test_the_archives_lists_are_kept_and_a_missing_one_is_asked_for(
    fitzpatrick_root: Path, names: tuple[str, str]
) -> None:
    official = config(official_splits=True)
    with pytest.raises(InputError, match=r"needs the list of the training images .* as train\.csv"):
        describe_samples(official, data_dir=fitzpatrick_root.parent)
    hashes = [f"{number:032x}" for number in range(5)]
    pd.DataFrame({"md5hash": hashes[:2]}).to_csv(fitzpatrick_root / "mine.csv", index=False)
    with pytest.raises(InputError, match=r"other CSVs there: mine\.csv\); put it there"):
        describe_samples(official, data_dir=fitzpatrick_root.parent)
    (fitzpatrick_root / "mine.csv").rename(fitzpatrick_root / names[0])
    pd.DataFrame({"md5hash": hashes[2:3]}).to_csv(fitzpatrick_root / names[1], index=False)
    samples = describe_samples(official, data_dir=fitzpatrick_root.parent)
    assert samples.official_n is not None
    assert samples.official_n.tolist() == ["train", "train", "validation"]
    pd.DataFrame({"md5hash": hashes[:1]}).to_csv(fitzpatrick_root / "test.csv", index=False)
    with pytest.raises(InputError, match="stands in the lists of train and test"):
        describe_samples(official, data_dir=fitzpatrick_root.parent)
