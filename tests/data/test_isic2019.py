from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from fqsweep.config import Isic2019Config
from fqsweep.data import describe_samples, open_dataset
from fqsweep.errors import InputError


def config(**changes: object) -> Isic2019Config:
    return Isic2019Config(kind="isic2019", **changes)  # type: ignore[arg-type]


def test_rows_become_samples_in_the_order_of_ids(isic_root: Path) -> None:
    samples = describe_samples(config(), data_dir=isic_root.parent)
    assert samples.id_n.tolist() == ["ISIC_0000001", "ISIC_0000003", "ISIC_0000004"]
    assert [samples.class_names[code] for code in samples.label_n] == ["MEL", "NV", "BCC"]
    assert samples.class_names == ("MEL", "NV", "BCC")
    sex = samples.groups["sex"]
    assert [sex.names[code] for code in sex.code_n] == ["female", "male", "male"]
    assert "1 image of unknown sex left out." in samples.notes
    assert any("UNK" in note for note in samples.notes)


def test_images_of_one_lesion_share_a_cluster_and_a_missing_lesion_shares_none(isic_root: Path) -> None:
    samples = describe_samples(config(unknown_groups="keep"), data_dir=isic_root.parent)
    cluster = dict(zip(samples.id_n.tolist(), samples.cluster_n.tolist(), strict=True))
    assert cluster["ISIC_0000001"] == cluster["ISIC_0000003"]
    assert len(set(cluster.values())) == 3


def test_ages_fall_into_named_bins(isic_root: Path) -> None:
    samples = describe_samples(config(group_attributes=("age",)), data_dir=isic_root.parent)
    age = samples.groups["age"]
    named = dict(zip(samples.id_n.tolist(), (age.names[code] for code in age.code_n), strict=True))
    assert named == {"ISIC_0000001": "40-59", "ISIC_0000002_downsampled": "60+", "ISIC_0000003": "<40"}


def test_unknown_groups_can_be_kept_as_a_group(isic_root: Path) -> None:
    samples = describe_samples(config(unknown_groups="keep"), data_dir=isic_root.parent)
    assert samples.groups["sex"].names == ("female", "male", "unknown")
    assert len(samples) == 4


def test_the_twin_without_downsampled_is_found(isic_root: Path) -> None:
    images = isic_root / "ISIC_2019_Training_Input"
    (images / "ISIC_0000002_downsampled.jpg").rename(images / "ISIC_0000002.jpg")
    (images / "ISIC_0000001.jpg").rename(images / "ISIC_0000001_downsampled.jpg")
    assert len(describe_samples(config(unknown_groups="keep"), data_dir=isic_root.parent)) == 4


def test_the_doubly_nested_folder_of_the_official_archive_is_found(isic_root: Path) -> None:
    images = isic_root / "ISIC_2019_Training_Input"
    images.rename(isic_root / "moved")
    images.mkdir()
    (isic_root / "moved").rename(images / images.name)
    samples = describe_samples(config(), data_dir=isic_root.parent)
    assert samples.source.read(0, size=16).shape == (16, 16, 3)


def test_labels_can_be_mapped_and_unlisted_classes_are_left_out(isic_root: Path) -> None:
    mapped = config(label_map={"benign": ("NV",), "malignant": ("MEL", "SCC")}, unknown_groups="keep")
    samples = describe_samples(mapped, data_dir=isic_root.parent)
    assert samples.class_names == ("benign", "malignant")
    assert len(samples) == 3
    assert "1 image of classes outside label_map left out: BCC." in samples.notes


@pytest.mark.parametrize(
    ("label_map", "message"),
    [
        ({"bad": ("MELA",)}, r"no class 'MELA' \(nearest: 'MEL'\); its classes: MEL, NV"),
        ({"a": ("NV",), "b": ("NV",)}, "'NV' stands under both 'a' and 'b'"),
        ({"a": ("DF",)}, "no image is left of 4 rows"),
    ],
)
def test_a_label_map_that_cannot_work_is_refused(
    isic_root: Path, label_map: dict[str, tuple[str, ...]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        describe_samples(config(label_map=label_map), data_dir=isic_root.parent)


def test_missing_parts_are_named(isic_root: Path) -> None:
    data_dir = isic_root.parent
    with pytest.raises(InputError, match="pass --data-dir"):
        describe_samples(config(), data_dir=None)
    with pytest.raises(InputError, match=r"elsewhere must be the folder of ISIC 2019"):
        describe_samples(config(folder="elsewhere"), data_dir=data_dir)
    (isic_root / "ISIC_2019_Training_Input" / "ISIC_0000001.jpg").unlink()
    with pytest.raises(InputError, match=r"1 of 3 images .*ISIC_0000001"):
        describe_samples(config(), data_dir=data_dir)
    metadata = isic_root / "ISIC_2019_Training_Metadata.csv"
    text = metadata.read_text()
    metadata.write_text(text.replace("sex", "gender", 1))
    with pytest.raises(InputError, match=r"Metadata\.csv has no column 'sex'.*its columns: image, age_approx"):
        describe_samples(config(), data_dir=data_dir)
    metadata.write_text(text.replace("female", "f"))
    with pytest.raises(InputError, match="column 'sex' must hold female, male or nothing, but has f"):
        describe_samples(config(), data_dir=data_dir)
    metadata.write_text("\n".join(text.splitlines()[:-1]))
    with pytest.raises(InputError, match=r"must describe every image .* 1 are missing, first: ISIC_0000003"):
        describe_samples(config(), data_dir=data_dir)
    metadata.unlink()
    with pytest.raises(
        InputError, match=r"Metadata\.csv is needed .*CSVs beside it: ISIC_2019_Training_GroundTruth"
    ):
        describe_samples(config(), data_dir=data_dir)


@pytest.mark.parametrize("edges", [(60, 40), (40, 40), ()])
def test_age_edges_must_rise(edges: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError, match=r"must be rising numbers such as \[40, 60\]"):
        config(group_attributes=("age",), age_edges=edges)


def test_an_age_that_is_no_number_is_named_with_its_line(isic_root: Path) -> None:
    metadata = isic_root / "ISIC_2019_Training_Metadata.csv"
    metadata.write_text(metadata.read_text().replace(",60", ",sixty").replace("60,", "sixty,", 1))
    assert metadata.read_text().splitlines()[2].split(",")[1] == "sixty"  # of the truth's third image
    with pytest.raises(InputError, match="line 3: column 'age_approx' must hold numbers, but has 'sixty'"):
        describe_samples(config(group_attributes=("age",)), data_dir=isic_root.parent)


def test_rows_given_twice_must_agree(isic_root: Path) -> None:
    metadata = isic_root / "ISIC_2019_Training_Metadata.csv"
    lines = metadata.read_text().splitlines()
    metadata.write_text("\n".join([*lines, lines[-1]]))
    assert len(describe_samples(config(), data_dir=isic_root.parent)) == 3
    metadata.write_text("\n".join([*lines, lines[-1].replace("male", "female")]))
    with pytest.raises(InputError, match="1 images have several rows that do not agree, first: ISIC_0000003"):
        describe_samples(config(), data_dir=isic_root.parent)


def test_sex_crossed_with_age_is_a_group_attribute(isic_root: Path) -> None:
    crossed = config(group_attributes=("sex x age",), unknown_groups="keep")
    groups = describe_samples(crossed, data_dir=isic_root.parent).groups["sex x age"]
    assert groups.names == ("female x 40-59", "male x <40", "unknown")
    with pytest.raises(ValueError, match=r"must be one of sex, age, or several crossed \('sex x age'\)"):
        config(group_attributes=("sex x site",))


def test_the_real_images_open_with_their_known_counts(shared_data: Path, tmp_path: Path) -> None:
    small = config(image_size=32, max_images=600, group_attributes=("sex", "age"), min_group_count=5)
    samples = describe_samples(small, data_dir=shared_data)
    assert len(samples) == 3584
    assert dict(zip(samples.class_names, np.bincount(samples.label_n).tolist(), strict=True))["MEL"] > 280
    dataset = open_dataset(small, data_dir=shared_data, pack_dir=tmp_path)
    assert dataset.image_nhwc.shape == (600, 32, 32, 3)
    assert 60 < dataset.image_nhwc.mean() < 220
    again = open_dataset(small, data_dir=shared_data, pack_dir=tmp_path)
    assert again.digest == dataset.digest


def test_the_complete_official_labels_are_read(shared_data: Path, tmp_path: Path) -> None:
    """All 25,331 rows, with empty files in place of images: describing decodes nothing."""
    root = tmp_path / "isic2019"
    (root / "ISIC_2019_Training_Input").mkdir(parents=True)
    for name in ("ISIC_2019_Training_GroundTruth.csv", "ISIC_2019_Training_Metadata.csv"):
        (root / name).write_bytes((shared_data / "labels" / name).read_bytes())
    for line in (root / "ISIC_2019_Training_GroundTruth.csv").read_text().splitlines()[1:]:
        (root / "ISIC_2019_Training_Input" / f"{line.split(',')[0]}.jpg").touch()
    samples = describe_samples(config(), data_dir=tmp_path)
    assert len(samples) == 25_331 - 384
    assert samples.class_names == ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC")
    assert np.bincount(samples.groups["sex"].code_n).tolist() == [11_661, 13_286]
