"""A packed model as an ONNX file of nearly the same size, with exactly the same weights.

torch's exporter gives the graph; large constants are hidden from its optimiser, which would compute with them and
write the results out in float32, and are put back afterwards: quantised weights as codes with the nodes that
decode them (``onnx_decoding``), others as they are, whole numbers in the smallest type.
Needs the extra ``export`` (onnx, onnxruntime, onnxscript).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime
import onnxscript.optimizer
import torch
from onnx import helper, numpy_helper
from torch import nn

from fqsweep.quant.onnx_decoding import DOMAIN, OPSET, WeightWriter, decoding_functions
from fqsweep.quant.packed_model import load_model, read_notes
from fqsweep.quant.packing import CHECKSUM, read_metadata, unpack_weights

INPUT, OUTPUT = "image", "logits"
HIDDEN_BYTES = 1_000
TOLERANCE = 1e-4
TIE_TOLERANCE = 1e-5  # two logits so near to each other are a tie, which rounding may decide either way


class OnnxMismatch(RuntimeError):
    """onnxruntime does not compute what torch computes from the same packed file."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far onnxruntime and torch agree.

    Attributes:
        max_error: largest difference of a logit; num_differing: images with another first class.
    """

    num_images: int
    max_error: float
    num_differing: int


def export_onnx(blob: bytes) -> bytes:
    """The ONNX file (opset 21) of a packed model.

    Input ``image``: float32 (batch, 3, size, size), RGB, pixels in [0, 1] less ``mean`` over ``std`` of the
    metadata's ``normalisation``. Output ``logits``: float32 (batch, classes). The metadata holds what the packed
    file says of itself: architecture, classes, normalisation, image size.

    Raises:
        PackedFileError, InputError: as ``packed_model.load_model``.
    """
    notes = read_metadata(blob)
    state = unpack_weights(blob)
    graph_model, hidden = _trace(load_model(blob), read_notes(notes).image_size)
    writer = WeightWriter(state)
    for tensor in hidden:
        if tensor.name in state.bits:
            writer.write(tensor.name)
    others = [tensor for tensor in hidden if tensor.name not in state.bits]
    _put_back(graph_model.graph, writer, others)
    _share_equal_constants(graph_model.graph)
    _shorten_names(graph_model.graph, keep={INPUT, OUTPUT, *state})
    graph_model.functions.extend(decoding_functions())
    graph_model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    helper.set_model_props(
        graph_model, {k: v for k, v in notes.items() if k not in (CHECKSUM, "layers", "heads")}
    )
    onnx.checker.check_model(graph_model)
    content: bytes = graph_model.SerializeToString(deterministic=True)
    return content


def _trace(model: nn.Module, image_size: int) -> tuple[onnx.ModelProto, list[onnx.TensorProto]]:
    """The network's graph, optimised without its large constants, and these."""
    example = torch.zeros(2, 3, image_size, image_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            model.requires_grad_(False),
            (example,),
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
        assert program is not None
        traced = program.model_proto
        hidden = [tensor for tensor in traced.graph.initializer if tensor.ByteSize() > HIDDEN_BYTES]
        _keep_initializers(traced.graph, [t for t in traced.graph.initializer if t.ByteSize() <= HIDDEN_BYTES])
        traced.graph.input.extend(helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in hidden)
        traced = onnxscript.optimizer.optimize(traced)
    for node in traced.graph.node:
        node.ClearField("name")
        node.ClearField("doc_string")
        del node.metadata_props[:]
    del traced.graph.value_info[:], traced.graph.metadata_props[:]
    return traced, hidden


def _keep_initializers(graph: onnx.GraphProto, kept: list[onnx.TensorProto]) -> None:
    copies = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
    del graph.initializer[:]
    graph.initializer.extend(copies)


def _put_back(graph: onnx.GraphProto, writer: WeightWriter, others: Iterable[onnx.TensorProto]) -> None:
    """Constants instead of the inputs that stood for them, and the nodes that decode before all others."""
    nodes = list(writer.nodes)
    constants = {name: numpy_helper.from_array(value, name) for name, value in writer.constants.items()}
    place_by_content: dict[bytes, str] = {}
    for tensor in others:
        value = numpy_helper.to_array(tensor)
        if value.dtype.kind != "i":
            constants[tensor.name] = tensor
            continue
        # TinyViT repeats its table of window offsets in every block.
        content = value.tobytes() + repr(value.shape).encode()
        first = place_by_content.setdefault(content, f"{tensor.name}/small")
        if first not in constants:
            small = value.astype(np.min_scalar_type(int(value.max())) if value.min() >= 0 else value.dtype)
            constants[first] = numpy_helper.from_array(small, first)
        nodes.append(helper.make_node("Cast", [first], [tensor.name], to=tensor.data_type))
    nodes.extend(graph.node)
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(constants.values())
    inputs = [value for value in graph.input if value.name == INPUT]
    del graph.input[:]
    graph.input.extend(inputs)


def _share_equal_constants(graph: onnx.GraphProto) -> None:
    """One constant for all that are equal: exporters write the same starts and shapes for every block."""
    first_by_content: dict[bytes, str] = {}
    name_by_name: dict[str, str] = {}
    kept = []
    for tensor in graph.initializer:
        name = tensor.name
        tensor.ClearField("name")
        name_by_name[name] = first_by_content.setdefault(tensor.SerializeToString(), name)
        tensor.name = name
        if name_by_name[name] == name:
            kept.append(tensor)
    _keep_initializers(graph, kept)
    for node in graph.node:
        node.input[:] = [name_by_name.get(name, name) for name in node.input]


def _shorten_names(graph: onnx.GraphProto, *, keep: set[str]) -> None:
    """Short names for values that are not of the network's own: they are a tenth of a small file."""
    short: dict[str, str] = {}

    def renamed(name: str) -> str:
        return name if not name or name in keep else short.setdefault(name, f"v{len(short):x}")

    for tensor in graph.initializer:
        tensor.name = renamed(tensor.name)
    for node in graph.node:
        node.input[:] = [renamed(name) for name in node.input]
        node.output[:] = [renamed(name) for name in node.output]


def open_onnx(content: bytes) -> onnxruntime.InferenceSession:
    """An onnxruntime session on one thread of the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def compare_with_torch(content: bytes, model: nn.Module, batches: Iterable[torch.Tensor]) -> Agreement:
    """Run both on the same images.

    Raises:
        OnnxMismatch: a logit differs by more than 1e-4 of the largest one (or of 1), or is no number; or the first
            class is another one where torch's own two are further apart than a tenth of that.
    """
    session = open_onnx(content)
    num_images, num_differing, max_error = 0, 0, 0.0
    for image_bchw in batches:
        with torch.no_grad():
            expected_bk = model(image_bchw).numpy()
        (found_bk,) = session.run([OUTPUT], {INPUT: image_bchw.numpy()})
        error = float(np.abs(found_bk - expected_bk).max())
        if not error <= TOLERANCE * max(1.0, float(np.abs(expected_bk).max())):
            raise OnnxMismatch(
                f"onnxruntime's logits differ from torch's by {error:.1e} (allowed: {TOLERANCE:.0e} of the largest): "
                "nothing was written; use --format packed"
            )
        max_error = max(max_error, error)
        num_images += len(found_bk)
        chosen_b = found_bk.argmax(axis=1)
        margin_b = expected_bk.max(axis=1) - np.take_along_axis(expected_bk, chosen_b[:, None], axis=1)[:, 0]
        if (margin_b > TIE_TOLERANCE * max(1.0, float(np.abs(expected_bk).max()))).any():
            raise OnnxMismatch(
                f"onnxruntime and torch name different classes for {int((margin_b > 0).sum())} of {len(margin_b)} "
                f"images of a batch, by up to {margin_b.max():.1e}: nothing was written; use --format packed"
            )
        num_differing += int((chosen_b != expected_bk.argmax(axis=1)).sum())
    return Agreement(num_images=num_images, max_error=max_error, num_differing=num_differing)
