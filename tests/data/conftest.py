"""Small data sets on disk, made anew for each test, and the real ones where they are at hand."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fqsweep.config import SynthdermConfig
from fqsweep.data.records import Groups, Samples
from fqsweep.data.synthderm import describe as describe_synthderm

ISIC_CLASSES = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK")


def write_photo(path: Path, *, seed: int = 0, side: int = 24) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def isic_root(tmp_path: Path) -> Path:
    """Four rows: a naevus and a melanoma of one lesion, one of unknown sex, one of unknown age."""
    root = tmp_path / "isic2019"
    names = ["ISIC_0000003", "ISIC_0000001", "ISIC_0000002_downsampled", "ISIC_0000004"]
    truth = pd.DataFrame(0.0, index=range(4), columns=list(ISIC_CLASSES))
    for row, label in enumerate(("NV", "MEL", "NV", "BCC")):
        truth.loc[row, label] = 1.0
    truth.insert(0, "image", names)
    metadata = pd.DataFrame(
        {
            "image": names[::-1],
            "age_approx": ["", "60", "40", "35"],
            "anatom_site_general": "",
            "lesion_id": ["", "", "L1", "L1"],
            "sex": ["male", "", "female", "male"],
        }
    )
    root.mkdir()
    truth.to_csv(root / "ISIC_2019_Training_GroundTruth.csv", index=False)
    metadata.to_csv(root / "ISIC_2019_Training_Metadata.csv", index=False)
    for seed, name in enumerate(names):
        write_photo(root / "ISIC_2019_Training_Input" / f"{name}.jpg", seed=seed)
    return root


@pytest.fixture
def fitzpatrick_root(tmp_path: Path) -> Path:
    root = tmp_path / "fitzpatrick17k"
    hashes = [f"{number:032x}" for number in range(5)]
    pd.DataFrame(
        {
            "md5hash": hashes,
            "fitzpatrick_scale": [1, 3, 4, 6, -1],
            "label": ["acne", "vitiligo", "acne", "vitiligo", "acne"],
            "nine_partition_label": "inflammatory",
            "three_partition_label": "non-neoplastic",
            "qc": "",
            "url": "",
        }
    ).to_csv(root.with_suffix(".csv"), index=False)
    root.mkdir()
    root.with_suffix(".csv").rename(root / "fitzpatrick17k.csv")
    for seed, name in enumerate(hashes):
        write_photo(root / "images" / f"{name}.jpg", seed=seed)
    return root


@pytest.fixture
def make_samples() -> Callable[..., Samples]:
    """Samples from plain codes, for tests that need no images."""

    def make(label_n: object, group_n: object, cluster_n: object = None, id_n: object = None) -> Samples:
        labels, groups = np.asarray(label_n, np.int64), np.asarray(group_n, np.int64)
        count = len(labels)
        return Samples(
            id_n=np.array([f"image{number:05d}" for number in range(count)])
            if id_n is None
            else np.asarray(id_n),
            label_n=labels,
            class_names=tuple(f"class{code}" for code in range(labels.max() + 1)),
            groups={
                "site": Groups(code_n=groups, names=tuple(f"group{code}" for code in range(groups.max() + 1)))
            },
            cluster_n=np.arange(count) if cluster_n is None else np.asarray(cluster_n, np.int64),
            source=describe_synthderm(SynthdermConfig(kind="synthderm", num_images=100)).source,
            content="plain codes",
        )

    return make


@pytest.fixture
def write_space(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a search space of one data set, given as a YAML mapping, and returns its file."""

    def write(dataset: str) -> Path:
        path = tmp_path / "space.yaml"
        lines = ["name: small", f"datasets: [{dataset}]", "architectures: [test_resnet]"]
        path.write_text("\n".join([*lines, "seeds: [0]", "methods: [{method: fp32}]"]))
        return path

    return write
