"""ONNX nodes that turn packed codes into weights: any width from 1 to 8 bits, at its true size in the file.

ONNX has types of 2, 4 and 8 bits only. So codes lie as the bytes of the packed file and a model-local function takes
their bits apart: `BitwiseAnd` with eight masks, rows of B bits times their powers of two, minus the largest level,
times the step. Everything before the first layer depends on constants alone, and onnxruntime computes it once when it
opens the file; what then runs is plain float32.

Axes: u units of a layer, n weights of a unit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fqsweep.quant.codes import codes_as_bytes
from fqsweep.quant.levels import LIMIT_BY_BITS, MAX_BITS
from fqsweep.quant.packing import UnpackedWeights

DOMAIN = "fqsweep"
OPSET = 21
_IMPORTS = [helper.make_opsetid("", OPSET)]


def decoding_functions() -> list[onnx.FunctionProto]:
    """`DecodeB` for each width B: (code bytes, steps (u,), [n]) -> weights (u, n); `Order`: rows by index."""
    return [*(_decode_function(bits) for bits in range(1, MAX_BITS + 1)), _order_function()]


def _decode_function(bits: int) -> onnx.FunctionProto:
    masks = np.array([128 >> i for i in range(8)], dtype=np.uint8)
    powers = np.array([2.0 ** (bits - 1 - i) for i in range(bits)], dtype=np.float32)
    node = helper.make_node
    nodes = [
        _constant("masks", masks),
        _constant("powers", powers),
        _constant("limit", np.float32(LIMIT_BY_BITS[bits])),
        _constant("one", np.array([1])),
        _constant("zero", np.array([0])),
        _constant("by_code", np.array([-1, bits])),
        node("Unsqueeze", ["codes", "one"], ["column"]),
        node("BitwiseAnd", ["column", "masks"], ["planes"]),
        node("Cast", ["planes"], ["is_set"], to=TensorProto.BOOL),
        node("Cast", ["is_set"], ["bits"], to=TensorProto.FLOAT),
        node("Reshape", ["bits", "by_code"], ["bits_of_code"]),
        node("MatMul", ["bits_of_code", "powers"], ["code"]),
        node("Sub", ["code", "limit"], ["padded_level"]),
        node("Shape", ["steps"], ["units"]),
        node("Mul", ["units", "n"], ["count"]),
        node("Slice", ["padded_level", "zero", "count", "zero"], ["level"]),
        node("Concat", ["units", "n"], ["shape"], axis=0),
        node("Reshape", ["level", "shape"], ["level_un"]),
        node("Unsqueeze", ["steps", "one"], ["step_u1"]),
        node("Mul", ["level_un", "step_u1"], ["rows"]),
    ]
    return helper.make_function(DOMAIN, f"Decode{bits}", ["codes", "steps", "n"], ["rows"], nodes, _IMPORTS)


def _order_function() -> onnx.FunctionProto:
    """Rows in the order of an index, where the number of rows stands for a row of zeros."""
    node = helper.make_node
    nodes = [
        _constant("one_row", np.array([0, 0, 1, 0])),
        node("Pad", ["rows", "one_row"], ["with_zeros"]),
        node("Cast", ["index"], ["wide"], to=TensorProto.INT64),
        node("Gather", ["with_zeros", "wide"], ["ordered"], axis=0),
    ]
    return helper.make_function(DOMAIN, "Order", ["rows", "index"], ["ordered"], nodes, _IMPORTS)


def _constant(name: str, value: np.ndarray | np.float32) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.asarray(value)))


class WeightWriter:
    """Collects the nodes and constants that build quantised weights under their own names."""

    def __init__(self, state: UnpackedWeights) -> None:
        self.state = state
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}

    def write(self, name: str) -> None:
        """Build one weight."""
        weight = self.state[name].float()
        bits_u = self.state.bits[name]
        if not bits_u.any():
            self._node("ConstantOfShape", [self._numbers(weight.shape)], name)
            return
        count = self.state.float_columns.get(name, 0)
        coded = weight[:, :-count] if count else weight
        coded_name = None
        if coded.numel():  # a layer may have nothing left before it but constants
            coded_name = f"{name}/coded" if count else name
            rows = self._decode(name, coded.reshape(len(bits_u), -1).numpy(), bits_u)
            rows = self._order(name, rows, bits_u, output=f"{name}/ordered")
            self._node("Reshape", [rows, self._numbers(coded.shape)], coded_name)
        if count:
            self._append_columns(name, coded_name, weight[:, -count:].numpy(), bits_u)

    def _decode(self, name: str, weight_un: np.ndarray, bits_u: np.ndarray) -> str:
        """Rows of units by width, ascending."""
        parts = []
        size = self._numbers(weight_un.shape[1:])
        for bits in sorted(set(bits_u.tolist()) - {0}):
            units = bits_u == bits
            steps = self.state.steps[name][units]
            inputs = [
                self._constant(f"{name}/codes{bits}", codes_as_bytes(weight_un[units], steps, bits)),
                self._constant(f"{name}/steps{bits}", steps),
                size,
            ]
            parts.append(f"{name}/{bits}")
            self._node(f"Decode{bits}", inputs, parts[-1], domain=DOMAIN)
        if len(parts) == 1:
            return parts[0]
        self._node("Concat", parts, f"{name}/sorted", axis=0)
        return f"{name}/sorted"

    def _order(self, name: str, rows: str, bits_u: np.ndarray, *, output: str) -> str:
        place_u = _places(bits_u)
        if bits_u.all() and np.array_equal(place_u, np.arange(len(bits_u))):
            return rows
        kind = np.uint8 if place_u.max() < 256 else np.uint16
        index = self._constant(f"{name}/order", place_u.astype(kind))
        self._node("Order", [rows, index], output, domain=DOMAIN)
        return output

    def _append_columns(self, name: str, coded: str | None, column_rc: np.ndarray, bits_u: np.ndarray) -> None:
        """Join the float columns, which are kept for rows that are not dropped, sorted like the codes, if any."""
        bits_r = np.broadcast_to(bits_u, len(column_rc))
        in_use = np.argsort(bits_r, kind="stable")[np.count_nonzero(bits_r == 0) :]
        rows = self._constant(f"{name}/columns", column_rc[in_use].reshape(len(in_use), -1))
        if len(bits_u) > 1:
            rows = self._order(name, rows, bits_u, output=f"{name}/ordered_columns")
        self._node(
            "Reshape", [rows, self._numbers(column_rc.shape)], name if coded is None else f"{name}/float"
        )
        if coded is not None:
            self._node("Concat", [coded, f"{name}/float"], name, axis=1)

    def _constant(self, name: str, value: np.ndarray) -> str:
        self.constants[name] = value
        return name

    def _numbers(self, values: tuple[int, ...]) -> str:
        """A list of whole numbers as a constant, one for all layers that need it."""
        name = "/".join(("numbers", *map(str, values)))
        self.constants[name] = np.array(values, dtype=np.int64)
        return name

    def _node(self, kind: str, inputs: list[str], output: str, *, domain: str = "", **options: Any) -> None:
        self.nodes.append(helper.make_node(kind, inputs, [output], domain=domain, **options))


def _places(bits_u: np.ndarray) -> np.ndarray:
    """Where each unit's row lies when rows are sorted by width; dropped ones, which are not there, come last."""
    order = np.argsort(bits_u, kind="stable")
    num_dropped = int(np.count_nonzero(bits_u == 0))
    place_u = np.full(len(bits_u), len(bits_u) - num_dropped, dtype=np.int64)
    place_u[order[num_dropped:]] = np.arange(len(bits_u) - num_dropped)
    return place_u
