"""The data sets that a search space can name, how they are split, and how their groups are cut."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from fqsweep.config.records import Record


class SplitFractions(Record):
    """How the images are divided; the split depends on ``seed`` and on the images' names, labels, groups and
    clusters (lesion, patient, near-duplicates) alone.

    Attributes:
        train, calibration, validation, test: shares of the images, together 1. Calibration serves importance and
            matching; validation chooses; test is read once, at the end of a trial.
        seed: another seed is another split.
    """

    train: float = Field(default=0.6, gt=0, lt=1)
    calibration: float = Field(default=0.1, gt=0, lt=1)
    validation: float = Field(default=0.15, gt=0, lt=1)
    test: float = Field(default=0.15, gt=0, lt=1)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _sum_to_one(self) -> SplitFractions:
        total = self.train + self.calibration + self.validation + self.test
        if abs(total - 1) > 1e-6:
            raise ValueError(f"train + calibration + validation + test must be 1, but is {total:g}")
        return self


CROSS = " x "


def in_data_dir(data_dir: Path, name: str) -> Path:
    """What a data set names: a file or folder below the data folder, or a whole path, also from ``~``."""
    return data_dir / Path(name).expanduser()


def crossed_parts(attribute: str) -> tuple[str, ...]:
    """The attributes that a group attribute crosses; a plain one is its only part.

    >>> crossed_parts("sex x age"), crossed_parts("sex")
    (('sex', 'age'), ('sex',))
    """
    return tuple(part.strip() for part in attribute.split(CROSS))


def plain_attributes(attributes: tuple[str, ...]) -> tuple[str, ...]:
    """All attributes that take part in ``attributes``, crossed or not, each once."""
    return tuple(dict.fromkeys(part for attribute in attributes for part in crossed_parts(attribute)))


def _attribute_of(*known: str) -> Callable[[str], str]:
    """A check that a group attribute is one of ``known`` or several of them crossed."""

    def check(attribute: str) -> str:
        parts = crossed_parts(attribute)
        if len(set(parts)) < len(parts) or not set(parts) <= set(known):
            raise ValueError(f"must be one of {', '.join(known)}, or several crossed ({CROSS.join(known)!r})")
        return CROSS.join(parts)

    return check


def _check_rising(edges: tuple[float, ...]) -> tuple[float, ...]:
    if not edges or list(edges) != sorted(set(edges)):
        raise ValueError(f"must be rising numbers such as [40, 60], but is {list(edges)}")
    return edges


SkinAttribute = Annotated[str, AfterValidator(_attribute_of("skin_type", "skin_tone"))]
PersonAttribute = Annotated[str, AfterValidator(_attribute_of("sex", "age"))]


def _number_as_text(value: Any) -> Any:
    """Classes are text; YAML reads 3 as a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return str(int(value)) if float(value).is_integer() else repr(value)


ClassName = Annotated[str, BeforeValidator(_number_as_text)]
# Keys that came later, and what they are where nobody says: such data sets are what they were before.
ADDED_KEYS = (("near_duplicates", "together"),)


class DatasetBase(Record):
    """What every data set has.

    Attributes:
        name: the value of the run parameter ``dataset``; unique within a search space.
        group_attributes: whose groups are compared, each once; every attribute gives its own cells, all sharing
            one full-precision parent. ``sex x age`` crosses two: each pair is a group. Samples of unknown group
            in any of them are left out.
        image_size: side of the square images in pixels.
        splits: shares of training, calibration, validation and test.
        min_group_count: a group with fewer images in a split is refused, not scored.
        label_map: new class name -> list of the set's own classes; unlisted classes are left out.
        drop_classes: the set's own classes that are left out.
        max_images: use only a seeded subset of this many images (stratified), None for all.
    """

    name: str = Field(min_length=1)
    group_attributes: tuple[str, ...] = Field(min_length=1)
    image_size: int = Field(default=224, ge=16, le=1024)
    splits: SplitFractions = SplitFractions()
    min_group_count: int = Field(default=10, ge=1)
    label_map: dict[str, tuple[ClassName, ...]] | None = None
    drop_classes: tuple[ClassName, ...] = ()
    max_images: int | None = Field(default=None, ge=50)

    @field_validator("group_attributes")
    @classmethod
    def _each_attribute_once(cls, attributes: tuple[str, ...]) -> tuple[str, ...]:
        crossings = [crossed_parts(attribute) for attribute in attributes]
        for index, parts in enumerate(crossings):
            if parts in crossings[:index]:
                raise ValueError(f"{CROSS.join(parts)!r} stands here twice; leave it out once")
        return attributes

    @property
    def contents(self) -> dict[str, Any]:
        """All but the name, as plain values: the same contents are the same data set, whatever it is called."""
        plain = self.model_dump(mode="json", exclude={"name"})
        return {key: value for key, value in plain.items() if (key, value) not in ADDED_KEYS}


class FilesBase(DatasetBase):
    """What data sets have that are read from image files.

    Attributes:
        unknown_groups: ``drop`` images whose group is missing in the table, or ``keep`` them as a group.
        near_duplicates: images that look alike stay ``together`` on one side of the split; ``ignore`` it where
            different images share a frame or a layout, which is enough to look alike.
        missing_images: ``refuse`` a table that lists images which are not there, or ``drop`` those rows (for
            sets that are fetched one by one, of which some are gone for good).
    """

    unknown_groups: Literal["drop", "keep"] = "drop"
    near_duplicates: Literal["together", "ignore"] = "together"
    missing_images: Literal["refuse", "drop"] = "refuse"


class SynthdermConfig(DatasetBase):
    """Procedural skin images (see ``fqsweep.data.synthderm``).

    Attributes:
        num_images: images in all splits together.
        difficulty: 0 easy to 1 hard: how far the classes' shapes, borders, colours and textures overlap.
        imbalance: share of images of the lightest type over share of the darkest.
        generator_seed: another seed is another data set.
    """

    kind: Literal["synthderm"]
    name: str = "synthderm"
    group_attributes: tuple[SkinAttribute, ...] = Field(default=("skin_type",), min_length=1)
    image_size: int = Field(default=64, ge=16, le=1024)
    num_images: int = Field(default=6000, ge=100)
    difficulty: float = Field(default=0.5, ge=0, le=1)
    imbalance: float = Field(default=4.0, ge=1, le=50)
    generator_seed: int = Field(default=0, ge=0)


# The official tables that list the images.
ISIC2019_TRUTH_CSV = "ISIC_2019_Training_GroundTruth.csv"
FITZPATRICK17K_CSV = "fitzpatrick17k.csv"


class Isic2019Config(FilesBase):
    """ISIC 2019 in its official folder layout, ``<data-dir>/isic2019`` (or ``folder``).

    Attributes:
        folder: its folder below the data folder.
        age_edges: inner borders of the age bins in years; (40, 60) gives <40, 40-59, 60+.
    """

    kind: Literal["isic2019"]
    name: str = "isic2019"
    folder: str = "isic2019"
    group_attributes: tuple[PersonAttribute, ...] = Field(default=("sex",), min_length=1)
    age_edges: Annotated[tuple[int, ...], AfterValidator(_check_rising)] = (40, 60)


class Fitzpatrick17kConfig(FilesBase):
    """Fitzpatrick17k with its public CSV, ``<data-dir>/fitzpatrick17k`` (or ``folder``).

    Attributes:
        folder: its folder below the data folder.
        label_level: ``label`` (114 conditions), ``nine_partition_label`` or ``three_partition_label``.
        group_attributes: ``skin_type`` (six types) or ``skin_tone`` (types 1-3 against 4-6).
        drop_wrong_labels: leave out the images that the authors' quality check marked "3 Wrongly labelled".
        official_splits: use the lists of the prepared archive (``train.csv`` and others beside the images);
            a split without a list is taken out of the training list.
    """

    kind: Literal["fitzpatrick17k"]
    name: str = "fitzpatrick17k"
    folder: str = "fitzpatrick17k"
    group_attributes: tuple[SkinAttribute, ...] = Field(default=("skin_tone",), min_length=1)
    label_level: Literal["label", "nine_partition_label", "three_partition_label"] = "label"
    drop_wrong_labels: bool = False
    official_splits: bool = False


class TableConfig(FilesBase):
    """Any CSV or Parquet file with an image folder.

    Attributes:
        csv: path of the table, relative to the data folder or absolute; ``.parquet`` is read as Parquet.
        images: the image folder, relative to the data folder or absolute.
        image_column: file name or path below ``images``; a missing or other suffix is looked up, and so are folders
            that the table leaves out, where one file alone ends like the name.
        label_column: the class.
        group_columns: group attribute -> column. Empty cells are unknown, and so are nan, n/a, na, none, null and
            unknown, in capitals or not, unless ``group_maps`` lists them.
        patient_column: images with one value here stay on one side of the split.
        group_maps: group attribute -> {group name: list of values}; what is not listed is unknown, and noted.
        group_edges: group attribute -> rising inner borders of bins; [40, 60] gives <40, 40-59 and 60+.
        split_column: the split of each image (train, calibration, validation, test); rows without one are left
            out, and a split that never occurs is taken out of train.
    """

    kind: Literal["table"]
    csv: str
    images: str
    image_column: str
    label_column: str
    group_columns: dict[str, str] = Field(min_length=1)
    patient_column: str | None = None
    group_maps: dict[str, dict[str, tuple[str | bool | int | float, ...]]] = Field(default_factory=dict)
    group_edges: dict[str, Annotated[tuple[float, ...], AfterValidator(_check_rising)]] = Field(
        default_factory=dict
    )
    split_column: str | None = None

    @model_validator(mode="after")
    def _attributes_have_columns(self) -> TableConfig:
        for crossed in self.group_attributes:
            parts = crossed_parts(crossed)
            if len(set(parts)) < len(parts):
                raise ValueError(
                    f"group attribute {crossed!r} crosses an attribute with itself; name each once"
                )
        for attribute in (*plain_attributes(self.group_attributes), *self.group_maps, *self.group_edges):
            if attribute not in self.group_columns:
                known = ", ".join(self.group_columns)
                words = [word for word in re.split(r"\W+|\b[xX]\b", attribute) if word]
                are_crossed = len(words) > 1 and set(words) <= {*self.group_columns}
                hint = f"; crossed, write {CROSS.join(words)}" if are_crossed else ""
                raise ValueError(
                    f"group attribute {attribute!r} has no entry in group_columns (has: {known}){hint}"
                )
        for attribute in self.group_edges.keys() & self.group_maps.keys():
            raise ValueError(f"group attribute {attribute!r} has both group_maps and group_edges; keep one")
        return self


DatasetConfig = Annotated[
    SynthdermConfig | Isic2019Config | Fitzpatrick17kConfig | TableConfig, Field(discriminator="kind")
]
