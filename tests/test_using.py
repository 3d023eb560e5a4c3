"""The page on using an exported model really runs, block by block, and names the class that the network names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.special import softmax

from fqsweep.data.folder import decode_square
from fqsweep.served_model import PackedClassifier
from tests.quant.packed_networks import SIZE_BY_NAME, packed_network

PAGE = Path(__file__).resolve().parents[1] / "docs" / "using.md"
NETWORK = "resnet18"
SIDE = SIZE_BY_NAME[NETWORK]
ORIENTATION, QUARTER_TURN = 0x0112, 6


def block(heading: str) -> str:
    """The one block of code below a heading of the page."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    (found,) = re.findall(r"^```python\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
    return str(found)


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A packed network and a large photo that lies on its side, in the working folder.

    Its edges differ from its middle, its colours from each other, and top from bottom, so that another square,
    another order of channels or no turn gives other logits.
    """
    monkeypatch.chdir(tmp_path)
    y, x = np.mgrid[0:1:400j, 0:1:600j]
    pixel_hwc = np.stack([255 * x, 200 * y * x, 255 * (abs(x - 0.5) > 0.3)], axis=2).astype(np.uint8)
    photo = Image.fromarray(pixel_hwc)
    exif = photo.getexif()
    exif[ORIENTATION] = QUARTER_TURN
    photo.save("photo.jpg", quality=90, exif=exif)
    blob = packed_network(NETWORK, drop_frac=0.3)
    Path("model.fqs").write_bytes(blob)
    return blob


def expected(blob: bytes) -> pd.Series:
    """The class probabilities of the photo, by what MLflow serves."""
    return PackedClassifier(blob).predict(decode_square(Path("photo.jpg"), size=SIDE)[None]).iloc[0]


def run_block(heading: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(block(heading), str(PAGE), "exec"), names)
    return names


def test_the_packed_file_names_the_class(packed: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    names = run_block("The packed file")
    wanted = expected(packed)
    np.testing.assert_allclose(softmax(names["logits"].numpy()), wanted, atol=1e-6)
    assert capsys.readouterr().out.startswith(f"{wanted.idxmax()} [")


def test_the_onnx_file_names_the_class_from_the_same_pixels(
    packed: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript", reason="the extra 'export' is not installed")
    pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")
    from fqsweep.quant.onnx_export import export_onnx

    assert "fqsweep" not in block("The ONNX file, without fqsweep")
    Path("model.onnx").write_bytes(export_onnx(packed))
    capsys.readouterr()
    names = run_block("The ONNX file, without fqsweep")
    np.testing.assert_array_equal(names["square"], decode_square(Path("photo.jpg"), size=SIDE))
    wanted = expected(packed)
    np.testing.assert_allclose(softmax(names["logits"][0]), wanted, atol=1e-5)
    assert capsys.readouterr().out.startswith(f"{wanted.idxmax()} [")
