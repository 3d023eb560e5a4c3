from pathlib import Path

import numpy as np
from PIL import Image

from fqsweep.config import Isic2019Config, SynthdermConfig
from fqsweep.data import describe_samples, duplicates
from fqsweep.data.duplicates import (
    MIN_LIKENESS,
    details,
    join_near_duplicates,
    join_pairs,
    near_duplicate_pairs,
)
from fqsweep.data.subset import take


def test_pairs_are_those_above_the_likeness() -> None:
    whole, middle = MIN_LIKENESS

    def turned(likeness: float) -> list[float]:
        return [likeness, float(np.sqrt(1 - likeness**2))]

    straight, back = [1.0, 0.0], [-1.0, 0.0]
    alike = np.array([[straight] * 2, [turned(whole + 0.01), turned(middle + 0.01)], [back] * 2], np.float32)
    assert near_duplicate_pairs(alike).tolist() == [[0, 1]]
    for parts in ((whole - 0.01, 1.0), (1.0, middle - 0.01)):
        other = np.array([[straight] * 2, [turned(part) for part in parts]], np.float32)
        assert near_duplicate_pairs(other).tolist() == [], "whole and middle, each by itself"


def test_pairs_across_chunks_are_found() -> None:
    detail_nd = np.random.default_rng(0).standard_normal((1200, 64)).astype(np.float32)
    detail_nd /= np.linalg.norm(detail_nd, axis=1, keepdims=True)
    detail_nd[1100] = detail_nd[3]
    assert near_duplicate_pairs(np.stack([detail_nd, detail_nd], axis=1)).tolist() == [[3, 1100]]


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


def test_lesions_that_share_a_round_border_are_not_taken_for_copies(shared_data: Path) -> None:
    samples = take(describe_samples(Isic2019Config(kind="isic2019"), data_dir=shared_data), np.arange(300))
    image_nhwc = np.stack([samples.source.read(index, size=64) for index in range(300)])
    across, down = np.meshgrid(np.arange(64) - 31.5, np.arange(64) - 31.5)
    image_nhwc[:, across**2 + down**2 > 31**2] = 0
    whole_nd = details(image_nhwc)[:, 0]
    assert (np.triu(whole_nd @ whole_nd.T, 1) > MIN_LIKENESS[0]).sum() > 100
    assert join_near_duplicates(samples, image_nhwc) is samples
    image_nhwc[200] = image_nhwc[7]
    assert near_duplicate_pairs(details(image_nhwc)).tolist() == [[7, 200]]


def test_many_that_hang_together_are_pointed_at() -> None:
    samples = describe_samples(SynthdermConfig(kind="synthderm", num_images=300, image_size=16), data_dir=None)
    chain_p2 = np.array([[index, index + 1] for index in range(10, 16)])
    joined = join_pairs(samples, np.concatenate([chain_p2, [[50, 60]]]))
    names = ", ".join(samples.id_n[10:13])
    assert joined.notes[-2].startswith("9 images have near-duplicates")
    assert joined.notes[-1].startswith(f"7 of them hang together ({names}, ...): look whether they are copies")
    assert len(join_pairs(samples, chain_p2[:5]).notes) == len(samples.notes) + 1, "six of 300 are no warning"


def test_a_damaged_note_of_pairs_is_made_anew(tmp_path: Path) -> None:
    image_nhwc = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), dtype=np.uint8)
    image_nhwc[2] = image_nhwc[0]
    cache = tmp_path / "pairs.npy"
    for content in (b"", b"\x93NUMPY"):
        cache.write_bytes(content)
        assert duplicates._cached_pairs(image_nhwc, cache).tolist() == [[0, 2]]
    assert np.load(cache).tolist() == [[0, 2]]
