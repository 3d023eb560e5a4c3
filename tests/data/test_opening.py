import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fqsweep.config import SynthdermConfig
from fqsweep.data import open_dataset
from fqsweep.errors import InputError


def config(**changes: object) -> SynthdermConfig:
    settings: dict[str, object] = {
        "kind": "synthderm",
        "num_images": 300,
        "image_size": 16,
        "min_group_count": 1,
    }
    return SynthdermConfig(**settings | changes)  # type: ignore[arg-type]


def test_a_data_set_opens_whole(tmp_path: Path) -> None:
    dataset = open_dataset(config(), data_dir=None, pack_dir=tmp_path)
    assert dataset.image_nhwc.shape == (300, 16, 16, 3)
    assert sum(len(index) for _, index in dataset.splits.items()) == 300
    index = int(dataset.splits.test[0])
    assert np.array_equal(dataset.image_nhwc[index], dataset.samples.source.read(index, size=16))


def test_the_split_is_stored_beside_the_pack(tmp_path: Path) -> None:
    dataset = open_dataset(config(), data_dir=None, pack_dir=tmp_path)
    lines = (tmp_path / f"{dataset.digest}_splits.csv").read_text().splitlines()
    assert lines[0] == "id,split,class,skin_type" and len(lines) == 301
    first_test = dataset.samples.id_n[dataset.splits.test[0]]
    assert next(line for line in lines if line.startswith(first_test)).split(",")[1] == "test"


def test_the_environment_names_a_store_of_packs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FQSWEEP_PACK_STORE", (tmp_path / "bucket").as_uri())
    open_dataset(config(), data_dir=None, pack_dir=tmp_path / "out")
    assert [path.suffix for path in sorted((tmp_path / "bucket").iterdir())] == [".json", ".npy"]


def test_crossed_groups_work_for_generated_sets(tmp_path: Path) -> None:
    crossed = config(group_attributes=("skin_tone x skin_type",), num_images=600)
    groups = open_dataset(crossed, data_dir=None, pack_dir=tmp_path).samples.groups["skin_tone x skin_type"]
    assert groups.names[0] == "I-III x I" and len(groups.names) == 6


def test_the_digest_tells_data_sets_apart(tmp_path: Path) -> None:
    def digest(**changes: object) -> str:
        return open_dataset(config(**changes), data_dir=None, pack_dir=tmp_path).digest

    variants: list[dict[str, object]] = [
        {},
        {"image_size": 17},
        {"generator_seed": 1},
        {"splits": {"seed": 1}},
        {"max_images": 250},
        {"group_attributes": ("skin_tone",)},
    ]
    assert len({digest(**changes) for changes in variants}) == len(variants)
    assert digest() == digest(name="another name", min_group_count=2)


def test_groups_too_small_are_refused_before_anything_is_decoded(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"data set 'synthderm': skin_type 'I' has \d+ of 40 images in validation"
    ) as e:
        open_dataset(config(min_group_count=40), data_dir=None, pack_dir=tmp_path)
    assert "'VI' has" in str(e.value)
    assert list(tmp_path.glob("*.npy")) == []


def test_the_package_imports_without_torch() -> None:
    code = "import sys, fqsweep.data; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=root).returncode == 0
