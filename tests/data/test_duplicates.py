from pathlib import Path

import numpy as np
from PIL import Image

from fqsweep.config import Isic2019Config
from fqsweep.data import describe_samples
from fqsweep.data.duplicates import details, join_near_duplicates, near_duplicate_pairs
from fqsweep.data.subset import take


def test_pairs_are_those_above_the_likeness() -> None:
    detail_nd = np.array([[1, 0], [0.8, 0.6], [0.6, 0.8], [-1, 0]], np.float32)
    assert near_duplicate_pairs(detail_nd, min_likeness=0.9).tolist() == [[1, 2]]


def test_pairs_across_chunks_are_found() -> None:
    detail_nd = np.random.default_rng(0).standard_normal((1200, 64)).astype(np.float32)
    detail_nd /= np.linalg.norm(detail_nd, axis=1, keepdims=True)
    detail_nd[1100] = detail_nd[3]
    assert near_duplicate_pairs(detail_nd).tolist() == [[3, 1100]]


def test_even_images_have_no_details_and_resemble_nothing() -> None:
    even = np.full((3, 32, 32, 3), 128, np.uint8)
    assert not details(even).any()
    assert len(near_duplicate_pairs(details(even))) == 0


def test_copies_of_real_photographs_are_found_and_other_lesions_are_not(
    shared_data: Path, tmp_path: Path
) -> None:
    samples = take(describe_samples(Isic2019Config(kind="isic2019"), data_dir=shared_data), np.arange(300))
    image_nhwc = np.stack([samples.source.read(index, size=64) for index in range(300)])
    assert join_near_duplicates(samples, image_nhwc) is samples
    for index in range(150):
        Image.fromarray(samples.source.read(index, size=160)).save(tmp_path / "copy.jpg", quality=40)
        with Image.open(tmp_path / "copy.jpg") as copy:
            image_nhwc[150 + index] = np.asarray(copy.resize((64, 64), Image.Resampling.BICUBIC))
    found = set(map(tuple, near_duplicate_pairs(details(image_nhwc)).tolist()))
    assert found == {(index, 150 + index) for index in range(150)}
    cache = tmp_path / "pairs.npy"
    joined = join_near_duplicates(samples, image_nhwc, cache=cache)
    again = join_near_duplicates(samples, np.empty((0, 1, 1, 3), np.uint8), cache=cache)
    assert np.array_equal(joined.cluster_n[:150], joined.cluster_n[150:])
    assert np.array_equal(joined.cluster_n, again.cluster_n)
    assert joined.notes[-1] == "300 images have near-duplicates, which are kept on one side of the split."
