"""Find near-duplicates among decoded images, so that copies of one photograph stay on one side of a split.

Fitzpatrick17k holds thousands of them, and a copy of a training image in the test split is no test. Images are
compared by the details of a 16 x 16 grey thumbnail: what a Laplacian leaves of it, as a unit vector. On
3,584 real dermoscopic images of different lesions the largest product of two is 0.90; of 500 copies that were
rescaled and re-compressed (JPEG quality 30 to 90) the smallest product with their original is 0.95.
Cropped, rotated or mirrored copies are not found.

Axes: n images, h and w pixels, d details.
"""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from fqsweep.data.records import Samples
from fqsweep.files import write_bytes

THUMBNAIL_SIDE = 16
MIN_LIKENESS = 0.93
_CHUNK_ROWS = 512


def join_near_duplicates(samples: Samples, image_nhwc: np.ndarray, *, cache: Path | None = None) -> Samples:
    """Samples whose clusters also hold near-duplicates together; the same object where there are none.

    Args:
        samples: whose clusters.
        image_nhwc: their images, uint8.
        cache: file where the pairs found are kept; it belongs to these very images.
    """
    return join_pairs(samples, _cached_pairs(image_nhwc, cache))


def join_pairs(samples: Samples, pair_p2: np.ndarray) -> Samples:
    """Samples whose clusters also hold the images of each pair together; the same object where there is none."""
    if len(pair_p2) == 0:
        return samples
    note = f"{len(np.unique(pair_p2))} images have near-duplicates, which are kept on one side of the split."
    if samples.official_n is not None:
        note = f"{len(np.unique(pair_p2))} images have near-duplicates, which the given split does not keep together."
    return replace(
        samples, cluster_n=_joined_clusters(samples.cluster_n, pair_p2), notes=(*samples.notes, note)
    )


def details(image_nhwc: np.ndarray) -> np.ndarray:
    """Laplacian of each image's grey thumbnail as a unit vector, float32 (n, d); zero for an even image."""
    detail_nd = np.empty((len(image_nhwc), THUMBNAIL_SIDE**2), dtype=np.float32)
    for index, image_hwc in enumerate(image_nhwc):
        grey = Image.fromarray(image_hwc).convert("F")
        small = grey.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX)
        padded = np.pad(np.asarray(small), 1, mode="edge")
        around = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
        detail_nd[index] = (4 * padded[1:-1, 1:-1] - around).ravel()
    length_n = np.linalg.norm(detail_nd, axis=1, keepdims=True)
    return np.divide(detail_nd, length_n, out=np.zeros_like(detail_nd), where=length_n > 1e-3)


def near_duplicate_pairs(detail_nd: np.ndarray, *, min_likeness: float = MIN_LIKENESS) -> np.ndarray:
    """All pairs i < j whose details have at least this product, int64 (pairs, 2); O(n^2 d)."""
    found = [np.empty((0, 2), dtype=np.int64)]
    for start in range(0, len(detail_nd), _CHUNK_ROWS):
        likeness = detail_nd[start : start + _CHUNK_ROWS] @ detail_nd[start:].T
        pair_p2 = np.argwhere(likeness >= min_likeness)
        found.append(pair_p2[pair_p2[:, 0] < pair_p2[:, 1]] + start)
    return np.concatenate(found)


def _cached_pairs(image_nhwc: np.ndarray, cache: Path | None) -> np.ndarray:
    if cache is not None and cache.exists():
        return np.asarray(np.load(cache))
    pair_p2 = near_duplicate_pairs(details(image_nhwc))
    if cache is not None:
        stream = io.BytesIO()
        np.save(stream, pair_p2)
        write_bytes(cache, stream.getvalue())
    return pair_p2


def _joined_clusters(cluster_n: np.ndarray, pair_p2: np.ndarray) -> np.ndarray:
    """Clusters after joining those of each pair, int64 (n,)."""
    size = int(cluster_n.max()) + 1
    linked = (cluster_n[pair_p2[:, 0]], cluster_n[pair_p2[:, 1]])
    edges = coo_matrix((np.ones(len(pair_p2)), linked), shape=(size, size))
    _, component_c = connected_components(edges, directed=False)
    return np.asarray(component_c[cluster_n], dtype=np.int64)
