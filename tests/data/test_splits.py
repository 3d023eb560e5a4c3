from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fqsweep.config import SplitFractions
from fqsweep.data.records import Samples, Splits
from fqsweep.data.splits import (
    Leak,
    check_groups,
    find_leaks,
    split_samples,
    splits_as_csv,
    stable_order,
    thin_pairs,
)
from fqsweep.errors import InputError
from fqsweep.fairness import score_probabilities

SHARES = {"train": 0.6, "calibration": 0.1, "validation": 0.15, "test": 0.15}
Make = Callable[..., Samples]
relaxed = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@relaxed
@given(seed=st.integers(0, 2**16), count=st.integers(1, 400), clusters=st.integers(1, 300))
def test_splits_are_disjoint_cover_everything_and_keep_clusters_whole(
    make_samples: Make, seed: int, count: int, clusters: int
) -> None:
    rng = np.random.default_rng(seed)
    cluster_n = rng.integers(0, clusters, count)
    samples = make_samples(rng.integers(0, 4, count), rng.integers(0, 3, count), cluster_n)
    splits = split_samples(samples, SplitFractions(seed=seed), attributes=["site"])
    together = np.concatenate([index for _, index in splits.items()])
    assert np.array_equal(np.sort(together), np.arange(count))
    cluster_sets = [set(cluster_n[index].tolist()) for _, index in splits.items()]
    assert sum(map(len, cluster_sets)) == len(set.union(*cluster_sets))
    assert all((np.diff(index) > 0).all() for _, index in splits.items())


@relaxed
@given(seed=st.integers(0, 2**16), count=st.integers(20, 600))
def test_every_stratum_class_and_group_has_its_share_to_within_three_images(
    make_samples: Make, seed: int, count: int
) -> None:
    rng = np.random.default_rng(seed)
    samples = make_samples(
        rng.choice(4, count, p=[0.7, 0.15, 0.1, 0.05]), rng.choice(3, count, p=[0.6, 0.3, 0.1])
    )
    splits = split_samples(samples, SplitFractions(seed=seed), attributes=["site"])
    label_n, group_n = samples.label_n, samples.groups["site"].code_n
    for code_n in (label_n * 3 + group_n, label_n, group_n, np.zeros(count, np.int64)):
        total = np.bincount(code_n)
        for name, index in splits.items():
            got = np.bincount(code_n[index], minlength=len(total))
            assert np.abs(got - SHARES[name] * total).max() <= 3


def test_clustered_images_keep_their_shares_to_within_a_percent(make_samples: Make) -> None:
    rng = np.random.default_rng(1)
    cluster_n = np.repeat(np.arange(2000), rng.integers(1, 5, 2000))
    label_c, group_c = rng.choice(5, 2000, p=[0.5, 0.2, 0.15, 0.1, 0.05]), rng.integers(0, 2, 2000)
    samples = make_samples(label_c[cluster_n], group_c[cluster_n], cluster_n)
    splits = split_samples(samples, SplitFractions(), attributes=["site"])
    for name, index in splits.items():
        share_k = np.bincount(samples.label_n[index], minlength=5) / np.bincount(samples.label_n)
        assert share_k == pytest.approx(SHARES[name], abs=0.01)


def test_the_split_does_not_depend_on_the_order_of_rows(make_samples: Make) -> None:
    rng = np.random.default_rng(2)
    label_n, group_n = rng.integers(0, 4, 300), rng.integers(0, 2, 300)
    cluster_n, id_n = rng.integers(0, 200, 300), np.array([f"image{number}" for number in range(300)])
    order = rng.permutation(300)
    plain = make_samples(label_n, group_n, cluster_n, id_n)
    mixed = make_samples(label_n[order], group_n[order], 500 - cluster_n[order], id_n[order])
    for (_, first), (_, second) in zip(
        split_samples(plain, SplitFractions(), attributes=["site"]).items(),
        split_samples(mixed, SplitFractions(), attributes=["site"]).items(),
        strict=True,
    ):
        assert set(plain.id_n[first]) == set(mixed.id_n[second])


def test_another_seed_gives_another_split(make_samples: Make) -> None:
    samples = make_samples(np.zeros(200), np.zeros(200))
    tests = [split_samples(samples, SplitFractions(seed=seed), attributes=["site"]).test for seed in (0, 1)]
    assert not np.array_equal(*tests)


def test_ten_images_of_one_kind_are_divided_by_hand(make_samples: Make) -> None:
    fractions = SplitFractions(train=0.4, calibration=0.2, validation=0.2, test=0.2)
    splits = split_samples(make_samples(np.zeros(10), np.zeros(10)), fractions, attributes=["site"])
    assert [len(index) for _, index in splits.items()] == [4, 2, 2, 2]


def test_the_order_of_an_id_does_not_depend_on_the_machine() -> None:
    order = stable_order(np.array(["ISIC_0000001", "ISIC_0000002"]), seed=0)
    assert order == pytest.approx([0.0013432876430673484, 0.3573562140071001], abs=1e-12)


def test_small_groups_and_untrained_classes_are_all_named_in_one_message(make_samples: Make) -> None:
    samples = make_samples([0] * 60 + [1], [0] * 58 + [1] * 3)
    splits = split_samples(samples, SplitFractions(), attributes=["site"])
    with pytest.raises(InputError, match="group1") as caught:
        check_groups(samples, splits, attributes=["site"], min_count=5)
    for split in ("calibration", "validation", "test"):
        assert f"in {split}" in str(caught.value)
    assert "of 5 images" in str(caught.value)
    assert "min_group_count" in str(caught.value)


def test_a_class_without_training_images_is_refused(make_samples: Make) -> None:
    samples = make_samples([0] * 99 + [1], [0, 1] * 50)
    splits = split_samples(samples, SplitFractions(), attributes=["site"])
    where = next(name for name, index in splits.items() if 99 in index)
    if where == "train":
        moved = splits.train[splits.train != 99]
        splits = type(splits)(**dict(splits.items()) | {"train": moved, "test": np.append(splits.test, 99)})
    with pytest.raises(InputError, match="class 'class1' has no image in train"):
        check_groups(samples, splits, attributes=["site"], min_count=1)


def test_one_group_alone_is_refused_because_nothing_can_be_compared(make_samples: Make) -> None:
    samples = make_samples([0, 1] * 100, [0] * 200)
    splits = split_samples(samples, SplitFractions(), attributes=["site"])
    with pytest.raises(InputError, match="site has one group alone, group0: nothing can be compared"):
        check_groups(samples, splits, attributes=["site"], min_count=1)


def test_one_class_alone_is_refused_because_nothing_can_be_told_apart(make_samples: Make) -> None:
    samples = make_samples([0] * 200, [0, 1] * 100)
    splits = split_samples(samples, SplitFractions(), attributes=["site"])
    with pytest.raises(InputError, match="all images are of one class, 'class0': nothing can be told apart"):
        check_groups(samples, splits, attributes=["site"], min_count=1)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_split_of_one_class_and_groups_of_one_class_each_are_refused(make_samples: Make, split: str) -> None:
    splits = Splits(**{name: np.arange(place, 160, 4) for place, name in enumerate(SHARES)})
    label_n, group_n = np.arange(160) // 4 % 2, np.arange(160) // 8 % 2
    samples = make_samples(label_n, group_n)
    check_groups(samples, splits, attributes=["site"], min_count=1)
    index = getattr(splits, split)
    for label_i, message in (
        (np.zeros(40), f"all images in {split} are of one class, 'class0'"),
        (group_n[index], f"no group of site has images of two classes in {split}"),
    ):
        changed = label_n.copy()
        changed[index] = label_i
        with pytest.raises(InputError, match=rf"^{message}\. Merge .*keep more classes"):
            check_groups(replace(samples, label_n=changed), splits, attributes=["site"], min_count=1)


@relaxed
@given(seed=st.integers(0, 2**16))
def test_what_is_refused_is_just_what_cannot_be_scored(make_samples: Make, seed: int) -> None:
    rng = np.random.default_rng(seed)
    few = rng.integers(0, 2, (2, 8))  # four images of each split that is scored
    label_n, group_n = np.concatenate([[0, 0, 1, 1, 0, 0, 1, 1], few[0]]), np.append([0, 1] * 4, few[1])
    splits = Splits(**{name: np.arange(4 * place, 4 * place + 4) for place, name in enumerate(SHARES)})

    def scored(index: np.ndarray) -> bool:
        try:
            score_probabilities(np.full((4, 2), 0.5), label_n[index], group_n[index], num_groups=2, min_count=1)
        except ValueError:
            return False
        return True

    can_be_scored = scored(splits.validation) and scored(splits.test)
    with nullcontext() if can_be_scored else pytest.raises(InputError, match=" in (validation|test)"):
        check_groups(make_samples(label_n, group_n), splits, attributes=["site"], min_count=1)


def test_of_very_many_small_groups_the_message_names_some_and_counts_the_rest(make_samples: Make) -> None:
    samples = make_samples([0] * 200, list(range(100)) * 2)
    splits = split_samples(samples, SplitFractions(), attributes=["site"])
    with pytest.raises(InputError, match=r"; and [0-9]+ more\. Merge groups .*group_edges") as caught:
        check_groups(samples, splits, attributes=["site"], min_count=5)
    assert str(caught.value).count("; ") == 20


def test_large_enough_groups_pass(make_samples: Make) -> None:
    samples = make_samples([0, 1] * 100, [0] * 100 + [1] * 100)
    check_groups(
        samples,
        split_samples(samples, SplitFractions(), attributes=["site"]),
        attributes=["site"],
        min_count=10,
    )


def test_official_lists_are_kept_and_what_they_lack_is_taken_out_of_train(make_samples: Make) -> None:
    rng = np.random.default_rng(3)
    official_n = np.repeat(["train", "validation"], [800, 200])
    plain = make_samples(rng.integers(0, 3, 1000), rng.integers(0, 2, 1000), rng.integers(0, 700, 1000))
    samples = replace(plain, official_n=official_n)
    splits = split_samples(samples, SplitFractions(), attributes=["site"])
    assert splits.validation.tolist() == list(range(800, 1000))
    for name, share in (("train", 0.6), ("calibration", 0.1), ("test", 0.15)):
        assert len(getattr(splits, name)) == pytest.approx(800 * share / 0.85, abs=3)
    inside = [set(plain.cluster_n[getattr(splits, name)]) for name in ("train", "calibration", "test")]
    assert sum(map(len, inside)) == len(set.union(*inside))


def test_leaks_are_found_where_lists_divide_a_patient(make_samples: Make) -> None:
    samples = make_samples([0] * 6, [0] * 6, [0, 0, 1, 1, 2, 3])
    splits = Splits(
        train=np.array([0, 2]), calibration=np.array([3]), validation=np.array([4]), test=np.array([1, 5])
    )
    assert find_leaks(samples, splits) == [
        Leak(("image00000", "image00001"), ("train", "test")),
        Leak(("image00002", "image00003"), ("train", "calibration")),
    ]
    assert find_leaks(samples, split_samples(samples, SplitFractions(), attributes=["site"])) == []


def test_pairs_with_few_test_images_are_named(make_samples: Make) -> None:
    samples = make_samples([0] * 12 + [1] * 9 + [0] * 10, [0] * 12 + [1] * 19)
    empty = np.empty(0, np.int64)
    splits = Splits(train=empty, calibration=empty, validation=empty, test=np.arange(31))
    assert thin_pairs(samples, splits, attributes=["site"]) == [
        "site 'group0', class 'class1': 0 test images",
        "site 'group1', class 'class1': 9 test images",
    ]


def test_the_split_can_be_read_by_people(make_samples: Make) -> None:
    samples = make_samples([0, 1], [1, 0])
    splits = Splits(
        train=np.array([1]), calibration=np.array([0]), validation=np.empty(0, int), test=np.empty(0, int)
    )
    assert splits_as_csv(samples, splits).decode().splitlines() == [
        "id,split,class,site",
        "image00000,calibration,class0,group1",
        "image00001,train,class1,group0",
    ]
