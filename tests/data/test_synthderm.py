import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fqsweep.config import SynthdermConfig
from fqsweep.data import describe_samples
from fqsweep.data.synthderm import CLASS_NAMES, SKIN_TYPES, contact_sheet, paint_image, type_shares
from fqsweep.errors import InputError


def config(**changes: object) -> SynthdermConfig:
    return SynthdermConfig(kind="synthderm", **changes)  # type: ignore[arg-type]


def paint(number: int, *, label: int = 1, skin_type: int = 2, size: int = 48, **changes: object) -> np.ndarray:
    return paint_image(config(**changes), number, label=label, skin_type=skin_type, size=size)


@settings(max_examples=15, deadline=None)
@given(number=st.integers(0, 10**6), label=st.integers(0, 5), kind=st.integers(0, 5), size=st.integers(16, 130))
def test_an_image_is_the_same_at_every_call(number: int, label: int, kind: int, size: int) -> None:
    first, second = (paint(number, label=label, skin_type=kind, size=size) for _ in range(2))
    assert first.shape == (size, size, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, second)


def test_an_image_is_the_same_at_every_size_up_to_resampling() -> None:
    for number in range(6):
        small = paint(number, label=number, size=48).astype(float)
        large = paint(number, label=number, size=192).astype(float)
        averaged = large.reshape(48, 4, 48, 4, 3).mean(axis=(1, 3))
        assert np.abs(averaged - small).mean() < 1.5


def test_other_numbers_and_other_seeds_give_other_images() -> None:
    assert not np.array_equal(paint(0), paint(1))
    assert not np.array_equal(paint(0), paint(0, generator_seed=1))


def test_more_images_leave_the_first_ones_as_they_were() -> None:
    few, many = (describe_samples(config(num_images=count), data_dir=None) for count in (200, 500))
    assert np.array_equal(few.label_n, many.label_n[:200])
    assert np.array_equal(few.source.read(150, size=32), many.source.read(150, size=32))


def test_the_lightest_type_is_imbalance_times_as_frequent_as_the_darkest() -> None:
    share_g = type_shares(4.0)
    assert share_g.sum() == pytest.approx(1)
    assert share_g[0] / share_g[-1] == pytest.approx(4)
    assert type_shares(1.0) == pytest.approx(1 / 6)
    samples = describe_samples(config(num_images=6000), data_dir=None)
    observed_g = np.bincount(samples.groups["skin_type"].code_n) / 6000
    assert observed_g == pytest.approx(share_g, abs=0.02)


def test_darker_types_are_darker_and_show_less_of_the_lesion() -> None:
    bright, contrast = [], []
    for kind in range(6):
        images = np.stack([paint(number, label=1, skin_type=kind, difficulty=0.0) for number in range(12)])
        grey = images.astype(float).mean(axis=-1)
        around = np.median(np.concatenate([grey[:, 6:10, 6:-6], grey[:, -10:-6, 6:-6]], axis=1))
        bright.append(around)
        contrast.append(around - grey[:, 20:28, 20:28].mean())
    assert all(np.diff(bright) < 0)
    assert contrast[0] > 2 * contrast[-1] > 0


def test_both_attributes_describe_the_same_people() -> None:
    samples = describe_samples(config(group_attributes=("skin_type", "skin_tone")), data_dir=None)
    assert np.array_equal(samples.groups["skin_type"].code_n // 3, samples.groups["skin_tone"].code_n)
    assert samples.groups["skin_type"].names == SKIN_TYPES
    assert samples.class_names == CLASS_NAMES


def test_classes_can_be_mapped_and_keep_their_images() -> None:
    malignant = config(num_images=300, label_map={"malignant": ("melanoma",), "benign": ("naevus",)})
    mapped = describe_samples(malignant, data_dir=None)
    whole = describe_samples(config(num_images=300), data_dir=None)
    position = whole.id_n.tolist().index(mapped.id_n[5])
    assert np.array_equal(mapped.source.read(5, size=32), whole.source.read(position, size=32))
    with pytest.raises(InputError, match=r"no class 'nevus' \(nearest: 'naevus'\)"):
        describe_samples(config(label_map={"benign": ("nevus",)}), data_dir=None)


def test_settings_that_change_pixels_change_the_content() -> None:
    variants = ({}, {"difficulty": 0.1}, {"imbalance": 2.0}, {"generator_seed": 5})
    contents = {describe_samples(config(**changes), data_dir=None).content for changes in variants}
    assert len(contents) == 4


def test_the_contact_sheet_has_a_row_per_type_and_a_column_per_class() -> None:
    sheet = contact_sheet(config(), size=24)
    assert sheet.size == (6 * 24, 6 * 24)
    rows = np.asarray(sheet).reshape(6, 24, -1).mean(axis=(1, 2))
    assert rows[0] > rows[-1]
