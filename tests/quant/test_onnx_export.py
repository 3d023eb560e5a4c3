"""Packed models as ONNX files: the same weights bit for bit, the same logits, nearly the same size."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
import torch

from fqsweep.quant import fake_quantize, pack_weights
from fqsweep.quant.packed_model import load_model, shrink
from fqsweep.quant.packing import unpack_weights
from tests.quant.packed_networks import SIZE_BY_NAME, packed_network, random_images

pytest.importorskip("onnxscript", reason="the extra 'export' is not installed")
onnx = pytest.importorskip("onnx", reason="the extra 'export' is not installed")
ort = pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")

from fqsweep.quant import onnx_export  # noqa: E402
from fqsweep.quant.onnx_decoding import DOMAIN, OPSET, WeightWriter, decoding_functions  # noqa: E402
from fqsweep.quant.onnx_export import OnnxMismatch, compare_with_torch, export_onnx  # noqa: E402

# Beside the packed file, for images of 32 or 64 pixels and about 1.8 bits a weight: small files, much graph.
LARGEST_GROWTH = {"resnet18": 0.06, "deit_tiny_patch16_224": 0.09, "tiny_vit_5m_224": 0.14}
exported = cache(export_onnx)


@cache
def small_network(name: str) -> bytes:
    return shrink(packed_network(name, drop_frac=0.6))


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGEST_GROWTH)
def test_onnxruntime_computes_the_same_from_nearly_the_same_size(name: str) -> None:
    blob = small_network(name)
    content = exported(blob)
    batches = [random_images(count, SIZE_BY_NAME[name], seed=count) for count in (1, 5)]
    found = compare_with_torch(content, load_model(packed_network(name, drop_frac=0.6)), batches)
    assert found.num_images == 6 and found.num_differing == 0
    assert len(content) <= len(blob) * (1 + LARGEST_GROWTH[name])


def decoded_weights(content: bytes) -> dict[str, np.ndarray]:
    """Every quantised weight as onnxruntime decodes it, its own optimisations off."""
    model = onnx.ModelProto.FromString(content)
    names = [output for node in model.graph.node for output in node.output if output.endswith(".weight")]
    for name in names:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(names, {"image": np.zeros((1, 3, 32, 32), np.float32)}), strict=True))


@pytest.mark.parametrize("whole_layers", [(), ("layer1.0.conv2", "layer2.0.conv1")])
def test_weights_are_decoded_bit_for_bit(whole_layers: tuple[str, ...]) -> None:
    blob = packed_network("resnet18", drop_frac=0.6, whole_layers=whole_layers)
    if not whole_layers:
        blob = small_network("resnet18")
    state = unpack_weights(blob)
    found = decoded_weights(exported(blob))
    assert set(found) == set(state.bits)
    assert any(state.float_columns) == (not whole_layers)
    for name, value in found.items():
        assert np.array_equal(value, state[name].numpy()), name


@pytest.mark.parametrize(
    "bits", [[3, 3, 0], [0, 3, 3], [0], [1], [8, 1, 0, 4, 0, 7, 2, 5, 3, 6], [2, 4, 4, 8], [5, 5], [0, 0]]
)
@pytest.mark.parametrize(("num_coded", "num_columns"), [(3, 0), (3, 1), (0, 1)])
def test_rows_come_back_in_their_order(bits: list[int], num_coded: int, num_columns: int) -> None:
    """Sorted, unsorted, dropped first or last, all dropped; with and without a float column, and with nothing else."""
    widths = torch.tensor(bits)
    weight = fake_quantize(torch.randn(len(bits), 3, 2, 2, generator=torch.Generator().manual_seed(0)), widths)
    state = unpack_weights(pack_weights({"w": weight}, {"w": widths}))
    if num_columns:
        column = torch.where(widths > 0, 0.3 + torch.arange(len(bits)), 0.0)
        state["w"] = torch.cat([weight[:, :num_coded], column[:, None, None, None].expand(-1, 1, 2, 2)], dim=1)
        state.float_columns["w"] = 1
    writer = WeightWriter(state)
    writer.write("w")
    output = onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, list(state["w"].shape))
    constants = [onnx.numpy_helper.from_array(value, name) for name, value in writer.constants.items()]
    graph = onnx.helper.make_graph(writer.nodes, "g", [], [output], constants)
    imports = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, 1)]
    model = onnx.helper.make_model(graph, functions=decoding_functions(), opset_imports=imports, ir_version=10)
    (found,) = onnx_export.open_onnx(model.SerializeToString()).run(["w"], {})
    assert np.array_equal(found, state["w"].numpy())


def test_the_file_says_how_to_use_it() -> None:
    content = exported(small_network("resnet18"))
    notes = {entry.key: entry.value for entry in onnx.ModelProto.FromString(content).metadata_props}
    assert notes["architecture"] == "resnet18" and notes["image_size"] == "32"
    assert json.loads(notes["classes"]) == [f"class {i}" for i in range(7)]
    assert json.loads(notes["normalisation"]) == {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}
    session = onnx_export.open_onnx(content)
    (image,), (logits,) = session.get_inputs(), session.get_outputs()
    assert image.name == "image" and image.shape == ["batch", 3, 32, 32]
    assert logits.name == "logits" and logits.shape == ["batch", 7]


def test_another_network_is_noticed() -> None:
    other = load_model(packed_network("resnet18", drop_frac=0.6, seed=1))
    with pytest.raises(OnnxMismatch, match="onnxruntime's logits differ from torch's by"):
        compare_with_torch(exported(small_network("resnet18")), other, [random_images(2, 32, seed=0)])


class NearlyLevel(torch.nn.Module):
    """Two logits that differ by less than the tolerance of a logit, the other way round than in the file."""

    def forward(self, image_bchw: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[1.0, 1.0 + 5e-5]]).expand(len(image_bchw), 2)


def test_another_first_class_is_noticed_though_every_logit_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    class Session:
        def run(self, _names: object, given: dict[str, np.ndarray]) -> list[np.ndarray]:
            (image,) = given.values()
            return [np.tile(np.array([[1.0 + 2e-5, 1.0]], np.float32), (len(image), 1))]

    monkeypatch.setattr(onnx_export, "open_onnx", lambda _content: Session())
    with pytest.raises(OnnxMismatch, match="name different classes for 2 of 2 images of a batch, by up to 5"):
        compare_with_torch(b"", NearlyLevel(), [random_images(2, 8, seed=0)])


def test_a_logit_that_is_no_number_is_noticed() -> None:
    images = torch.full((1, 3, 32, 32), torch.nan)
    model = load_model(small_network("resnet18"))
    with pytest.raises(OnnxMismatch, match="differ from torch's by nan"):
        compare_with_torch(exported(small_network("resnet18")), model, [images])
