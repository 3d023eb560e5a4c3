"""Find near-duplicates among decoded images, so that copies of one photograph stay on one side of a split.

Fitzpatrick17k holds thousands of them (Groeger et al. 2023; Abhishek et al. 2024), and a copy of a training
image in the test split is no test. Images are compared by a 256-bit difference hash of their brightness.

Axes: n images, h and w pixels, b bits.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from PIL import Image
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from fqsweep.data.records import Samples

HASH_SIDE = 16
# Re-compressed and rescaled copies differ in few of the 256 bits, different lesions in about half.
MAX_DIFFERENT_BITS = 12
_CHUNK_ROWS = 512


def join_near_duplicates(samples: Samples, image_nhwc: np.ndarray) -> Samples:
    """Samples whose clusters also hold near-duplicates together; the same object where there are none."""
    first, second = near_duplicate_pairs(difference_hashes(image_nhwc))
    if len(first) == 0:
        return samples
    cluster_n = _joined_clusters(samples.cluster_n, first, second)
    num_joined = len(np.unique(np.concatenate([first, second])))
    note = f"{num_joined} images have near-duplicates, which are kept on one side of the split."
    return replace(samples, cluster_n=cluster_n, notes=(*samples.notes, note))


def difference_hashes(image_nhwc: np.ndarray) -> np.ndarray:
    """Bit (y, x) says whether brightness rises from x to x + 1 on a 17 x 16 thumbnail; uint64 (n, 4)."""
    bits_nb = np.empty((len(image_nhwc), HASH_SIDE * HASH_SIDE), dtype=bool)
    for index, image_hwc in enumerate(image_nhwc):
        small = Image.fromarray(image_hwc).convert("L").resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.BOX)
        bits_nb[index] = np.diff(np.asarray(small, np.int16), axis=1).ravel() > 0
    return np.packbits(bits_nb, axis=1).view(np.uint64)


def near_duplicate_pairs(
    hash_nw: np.ndarray, *, max_different_bits: int = MAX_DIFFERENT_BITS
) -> tuple[np.ndarray, np.ndarray]:
    """Indices i < j of all pairs whose hashes differ in at most so many bits; O(n^2) word operations."""
    firsts, seconds = [], []
    for start in range(0, len(hash_nw), _CHUNK_ROWS):
        rows = hash_nw[start : start + _CHUNK_ROWS]
        rest = hash_nw[start:]
        distance = np.zeros((len(rows), len(rest)), dtype=np.uint16)
        for word in range(hash_nw.shape[1]):
            distance += np.bitwise_count(rows[:, word, None] ^ rest[None, :, word])
        near_i, near_j = np.nonzero(distance <= max_different_bits)
        ordered = near_i < near_j
        firsts.append(near_i[ordered] + start)
        seconds.append(near_j[ordered] + start)
    return np.concatenate(firsts), np.concatenate(seconds)


def _joined_clusters(cluster_n: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Clusters after joining those of each pair, int64 (n,)."""
    size = int(cluster_n.max()) + 1
    edges = coo_matrix((np.ones(len(first)), (cluster_n[first], cluster_n[second])), shape=(size, size))
    _, component_c = connected_components(edges, directed=False)
    return np.asarray(component_c[cluster_n], dtype=np.int64)
