"""Find near-duplicates among decoded images, so that copies of one photograph stay on one side of a split.

Fitzpatrick17k holds thousands of them, and a copy of a training image in the test split is no test. Images are
compared by the details of two 16 x 16 grey thumbnails, of the whole and of its middle: what a Laplacian leaves of
each, as a unit vector. On 3,601 real dermoscopic images of different lesions the largest products of two are 0.91
and 0.88; of 500 copies that were rescaled and re-compressed (JPEG quality 30 to 90) the smallest products with their
original are 0.95 and 0.88, all at 32 px, and further apart at 64 and 224 px. The middle tells apart what shares a
frame: with black round borders painted on all of them the wholes of up to 168,000 pairs of different lesions are
alike, wholes and middles of 14 at most. Cropped, rotated or mirrored copies are not found.

Axes: n images, h and w pixels, p parts (whole, middle), d details.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from fqsweep.config import DatasetConfig, FilesBase
from fqsweep.data.records import Samples
from fqsweep.files import write_bytes

THUMBNAIL_SIDE = 16
DETAILS_SHAPE = (2, THUMBNAIL_SIDE**2)
MIDDLE_FRAC = 0.6  # of each side
MIN_LIKENESS = (0.93, 0.88)
# More of all images than this in one cluster is no series of one patient: something that many show looks like a copy.
MOST_ALIKE_FRAC = 0.02
_CHUNK_ROWS = 512


def joins_near_duplicates(config: DatasetConfig) -> bool:
    """Whether images of this data set that look alike are kept on one side."""
    return isinstance(config, FilesBase) and config.near_duplicates == "together"


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
    alike_n = np.unique(pair_p2)
    together = (
        "which are kept on one side of the split"
        if samples.official_n is None
        else "which the given split does not keep together"
    )
    joined_n = _joined_clusters(samples.cluster_n, pair_p2)
    notes = [f"{len(alike_n)} images have near-duplicates, {together}."]
    _, position_a, count_c = np.unique(joined_n[alike_n], return_inverse=True, return_counts=True)
    largest_n = alike_n[position_a == count_c.argmax()]
    if len(largest_n) > MOST_ALIKE_FRAC * len(samples):
        notes.append(
            f"{len(largest_n)} of them hang together ({', '.join(samples.id_n[largest_n[:3]])}, ...): look whether "
            "they are copies, or only show the same frame (near_duplicates: ignore)."
        )
    return replace(samples, cluster_n=joined_n, notes=(*samples.notes, *notes))


def details(image_nhwc: np.ndarray) -> np.ndarray:
    """Laplacians of each image's grey thumbnails as unit vectors, float32 (n, p, d); zero for an even part."""
    detail_npd = np.empty((len(image_nhwc), *DETAILS_SHAPE), dtype=np.float32)
    for index, image_hwc in enumerate(image_nhwc):
        grey = Image.fromarray(image_hwc).convert("F")
        edge_x, edge_y = (side * (1 - MIDDLE_FRAC) / 2 for side in grey.size)
        middle = (edge_x, edge_y, grey.width - edge_x, grey.height - edge_y)
        for part, box in enumerate((None, middle)):
            small = grey.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX, box=box)
            padded = np.pad(np.asarray(small), 1, mode="edge")
            around = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
            detail_npd[index, part] = (4 * padded[1:-1, 1:-1] - around).ravel()
    length_np = np.linalg.norm(detail_npd, axis=2, keepdims=True)
    return np.divide(detail_npd, length_np, out=np.zeros_like(detail_npd), where=length_np > 1e-3)


def near_duplicate_pairs(detail_npd: np.ndarray) -> np.ndarray:
    """All pairs i < j whose products reach ``MIN_LIKENESS``, part by part, int64 (pairs, 2); O(n^2 d)."""
    found = [np.empty((0, 2), dtype=np.int64)]
    for start in range(0, len(detail_npd), _CHUNK_ROWS):
        rows_npd, others_npd = detail_npd[start : start + _CHUNK_ROWS], detail_npd[start:]
        whole, middle = (
            rows_npd[:, part] @ others_npd[:, part].T >= least for part, least in enumerate(MIN_LIKENESS)
        )
        pair_p2 = np.argwhere(whole & middle)
        found.append(pair_p2[pair_p2[:, 0] < pair_p2[:, 1]] + start)
    return np.concatenate(found)


def _cached_pairs(image_nhwc: np.ndarray, cache: Path | None) -> np.ndarray:
    if cache is not None:
        with contextlib.suppress(OSError, ValueError, EOFError):  # not there, or damaged: found anew
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
