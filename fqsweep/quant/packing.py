"""Quantised models on disk: what a weight costs in bits is what it takes in the file.

Format ``fqsweep-packed`` version 1 (docs/packed_format.md): a safetensors file. Its metadata holds the format, the
version, under ``crc32`` a checksum of everything else and, as JSON under ``layers``, name, shape, dtype and number
of units of every quantised tensor in order.
Tensors:
- ``codes.B`` for each width B from 1 to 8 in use: uint8, the B-bit codes of all units of that width, in
  the order of layers, units and weights, most significant bit first, the last byte padded with zeros.
  A code is the level plus its largest value (2 to 8 bits) or 1 for positive (1 bit);
- ``steps``: float32, one per unit that is not dropped; ``bits``: uint8, two widths a byte, high half first;
- ``plain.NAME``: every tensor that is not quantised, as it is.
A weight is code level times step in float32, so packing is exact for weights that lie on their grid.

Version 2 holds a network without its dropped channels (``removal``), whose layers are smaller than the architecture
says. A layer may have ``float_columns`` in its record: so many last input columns are not coded but lie as float32
in ``columns.NAME``, for the rows that are not dropped. ``heads`` in the metadata is JSON: attention layer -> number
of heads, channels of a query or key, channels of a value.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import safetensors
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from fqsweep.quant.codes import codes_of, codes_to_bytes, levels_from_bytes, pair_widths, unpair_widths
from fqsweep.quant.levels import LIMIT_BY_BITS, MAX_BITS, absmax_steps, limits_of, round_to_levels

FORMAT = "fqsweep-packed"
PLAIN_VERSION, SMALLER_VERSION = "1", "2"
VERSIONS = (PLAIN_VERSION, SMALLER_VERSION)
CHECKSUM = "crc32"
# Metadata of a file without dropped channels: mean bits per weight of the whole network.
REMOVED = "whole_mean_bits"
Bits = int | np.ndarray | torch.Tensor


# What reading a header that lies can raise.
_DAMAGE = (
    safetensors.SafetensorError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


class PackedFileError(ValueError):
    """A packed file is damaged, cut short, or something else."""


class HeadShape(NamedTuple):
    """Sizes of an attention layer."""

    num_heads: int
    key_dim: int
    value_dim: int


class UnpackedWeights(dict[str, torch.Tensor]):
    """A state dict and what is known of its quantised tensors.

    Attributes:
        bits: tensor name -> uint8 widths per unit; steps: the float32 steps.
        float_columns: tensor name -> number of last input columns that lie on no grid.
        heads: attention layer -> its sizes, where they are not the architecture's.
        numbers: tensor name -> what its units are called; is in no file, and follows the units that are kept.
    """

    bits: dict[str, np.ndarray]
    steps: dict[str, np.ndarray]
    float_columns: dict[str, int]
    heads: dict[str, HeadShape]
    numbers: dict[str, np.ndarray]

    def __init__(self, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        super().__init__(tensors or {})
        self.bits, self.steps, self.float_columns, self.heads, self.numbers = {}, {}, {}, {}, {}

    def copy(self) -> UnpackedWeights:
        """The same tensors in a mapping that can be changed."""
        other = UnpackedWeights(self)
        other.bits, other.steps, other.numbers = dict(self.bits), dict(self.steps), dict(self.numbers)
        other.float_columns, other.heads = dict(self.float_columns), dict(self.heads)
        return other

    def keep_rows(self, name: str, rows: torch.Tensor) -> None:
        """Keep some rows of a layer, in this order: weight and bias, and what is known of its units."""
        key = f"{name}.weight"
        has_units = len(self.bits.get(key, ())) == len(self[key])
        for known in (self.bits, self.steps, self.numbers) if has_units else ():
            if key in known:
                known[key] = known[key][rows.numpy()]
        for entry in (key, f"{name}.bias"):
            if entry in self:
                self[entry] = self[entry][rows].contiguous()

    def pack(self, metadata: Mapping[str, str]) -> bytes:
        """The packed file of these weights."""
        return pack_weights(
            self,
            self.bits,
            steps=self.steps,
            metadata=metadata,
            float_columns=self.float_columns,
            heads=self.heads,
        )


def pack_weights(
    state: Mapping[str, torch.Tensor],
    bits: Mapping[str, Bits],
    *,
    steps: Mapping[str, np.ndarray] | None = None,
    metadata: Mapping[str, str] | None = None,
    float_columns: Mapping[str, int] | None = None,
    heads: Mapping[str, HeadShape] | None = None,
) -> bytes:
    """Pack a state dict, its quantised tensors at their true widths.

    Weights that lie on a grid already (from ``fake_quantize`` or a quantiser with ``steps``) come back
    bit for bit; others are quantised as ``fake_quantize`` does.

    Args:
        state: tensor name -> tensor.
        bits: tensor name -> one width, or one per output channel (or a single one for the whole tensor).
        steps: tensor name -> float32 steps per unit; found from the weights where not given.
        metadata: further text to keep in the file's header.
        float_columns, heads: as in ``UnpackedWeights``, for a network without its dropped channels.

    Raises:
        ValueError: a name that is not in ``state``, widths that do not fit, or weights off the grid of ``steps``.
    """
    columns = float_columns or {}
    layers: list[dict[str, Any]] = []
    codes: dict[int, list[np.ndarray]] = {b: [] for b in range(1, MAX_BITS + 1)}
    all_bits: list[np.ndarray] = []
    all_steps: list[np.ndarray] = []
    # Copies: safetensors takes no two tensors that share memory.
    tensors = {
        f"plain.{name}": t.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, t in state.items()
        if name not in bits
    }
    for name, given in bits.items():
        if name not in state:
            raise ValueError(f"bits are given for {name!r}, which is not in the state")
        tensor = state[name].detach().cpu()
        bits_u = _unit_bits(name, tensor, given)
        record = {
            "name": name,
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype)[6:],
            "units": len(bits_u),
        }
        if columns.get(name):
            record["float_columns"] = columns[name]
            tensor, tensors[f"columns.{name}"] = _split_columns(tensor, bits_u, columns[name])
        layers.append(record)
        level_un, step_u = _levels(name, tensor, bits_u, None if steps is None else steps.get(name))
        for width in range(1, MAX_BITS + 1):
            rows = bits_u == width
            if rows.any():
                codes[width].append(codes_of(level_un[rows], width))
        all_bits.append(bits_u.numpy().astype(np.uint8))
        all_steps.append(step_u[bits_u > 0].numpy())
    for width, parts in codes.items():
        if parts:
            tensors[f"codes.{width}"] = torch.from_numpy(codes_to_bytes(np.concatenate(parts), width))
    tensors["bits"] = torch.from_numpy(
        pair_widths(np.concatenate(all_bits) if all_bits else np.zeros(0, np.uint8))
    )
    tensors["steps"] = torch.from_numpy(np.concatenate(all_steps) if all_steps else np.zeros(0, np.float32))
    return _to_file(tensors, layers, metadata or {}, heads or {})


def _to_file(
    tensors: dict[str, torch.Tensor],
    layers: list[dict[str, Any]],
    metadata: Mapping[str, str],
    heads: Mapping[str, HeadShape],
) -> bytes:
    is_smaller = bool(heads) or any("float_columns" in layer for layer in layers) or REMOVED in metadata
    notes = {
        **metadata,
        "format": FORMAT,
        "version": SMALLER_VERSION if is_smaller else PLAIN_VERSION,
        "layers": json.dumps(layers, separators=(",", ":")),
    }
    if heads:
        notes["heads"] = json.dumps(heads)
    return _with_sorted_header(save_tensors(tensors, metadata={**notes, CHECKSUM: _checksum(tensors, notes)}))


def _split_columns(tensor: torch.Tensor, bits_u: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The coded part of a weight, and its last columns in the rows that are not dropped."""
    in_use_r = (bits_u > 0).expand(len(tensor))
    return tensor[:, :-count], tensor[in_use_r, -count:].float().contiguous()


def _levels(
    name: str, tensor: torch.Tensor, bits_u: torch.Tensor, given: np.ndarray | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels (u, n) and steps (u,) of a weight; exact where steps are given."""
    weight_un = tensor.float().reshape(len(bits_u), -1)
    step_u = _steps_for(name, weight_un, bits_u, given)
    level_un = round_to_levels(weight_un, step_u[:, None], *limits_of(bits_u))
    if not bool(torch.isfinite(weight_un).all() & torch.isfinite(step_u).all()):
        raise ValueError(f"{name!r}: weights and steps must be finite")
    # What is read back has the tensor's own type.
    if given is not None and not torch.equal((level_un * step_u[:, None]).to(tensor.dtype).float(), weight_un):
        raise ValueError(f"{name!r}: weights do not lie on the grid of the steps given")
    return level_un, step_u


def unpack_weights(blob: bytes) -> UnpackedWeights:
    """The state dict of a packed file, with ``bits`` and ``steps`` per quantised tensor.

    Raises:
        PackedFileError: the bytes are damaged, cut short, of another format or of a later version.
    """
    blob = bytes(blob)
    metadata = read_metadata(blob)
    try:
        tensors = load_tensors(blob)
        if metadata.pop(CHECKSUM, "none") != _checksum(tensors, metadata):
            raise PackedFileError("damaged packed model: its checksum does not fit; export it again")
        state = _rebuild(tensors, json.loads(metadata["layers"]))
        heads = json.loads(metadata.get("heads", "{}"))
        state.heads = {name: HeadShape(*sizes) for name, sizes in heads.items()}
        return state
    except _DAMAGE as error:
        if isinstance(error, PackedFileError):
            raise
        raise PackedFileError(f"damaged packed model: {error}; export it again") from error


def read_metadata(blob: bytes) -> dict[str, str]:
    """The text in a packed file's header.

    Raises:
        PackedFileError: as ``unpack_weights``.
    """
    try:
        length = int.from_bytes(blob[:8], "little")
        if len(blob) < 8 or length > len(blob) - 8:
            raise ValueError("its header is cut short")
        header = json.loads(blob[8 : 8 + length])
        metadata = header.get("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("its metadata are not text")
    except (ValueError, AttributeError, RecursionError) as error:
        raise PackedFileError(f"not a packed model, or damaged: {error}") from error
    if metadata.get("format") != FORMAT:
        raise PackedFileError(f"not a packed model: its format is {metadata.get('format', 'not named')!r}")
    if metadata.get("version") not in VERSIONS:
        raise PackedFileError(
            f"packed model of version {metadata.get('version')}: this fqsweep reads {' and '.join(VERSIONS)}"
        )
    return dict(metadata)


def stored_shapes(metadata: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the quantised tensors that a packed file says it has; empty where it says none.

    Raises:
        PackedFileError: the list cannot be read.
    """
    try:
        layers = json.loads(metadata.get("layers", "[]"))
        return {str(layer["name"]): tuple(int(size) for size in layer["shape"]) for layer in layers}
    except _DAMAGE as error:
        raise PackedFileError(f"damaged packed model: {error}; export it again") from error


def _with_sorted_header(blob: bytes) -> bytes:
    """The same file with the metadata in alphabetical order: safetensors leaves it in an arbitrary one."""
    length = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + blob[8 + length :]


def _checksum(tensors: Mapping[str, torch.Tensor], notes: Mapping[str, str]) -> str:
    """CRC-32 of the metadata and of every tensor's name, type, shape and bytes, as 8 hexadecimal digits."""
    crc = zlib.crc32(json.dumps(sorted(notes.items())).encode())
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        if tensor.numel():
            crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().tobytes(), crc)
    return f"{crc:08x}"


def _rebuild(tensors: dict[str, torch.Tensor], layers: list[dict[str, Any]]) -> UnpackedWeights:
    num_units = sum(layer["units"] for layer in layers)
    bits_all = unpair_widths(tensors["bits"].numpy(), num_units)
    if len(tensors["steps"]) != int((bits_all > 0).sum()):
        raise PackedFileError("damaged packed model: steps and bits do not fit together")
    step_all = np.zeros(num_units, dtype=np.float32)
    step_all[bits_all > 0] = tensors["steps"].numpy()
    num_weights = [int(np.prod(_coded_shape(layer))) // layer["units"] for layer in layers]
    weights_all = np.repeat(np.array(num_weights, dtype=int), [layer["units"] for layer in layers])
    levels = {}
    for width in range(1, MAX_BITS + 1):
        count = int(weights_all[bits_all == width].sum())
        if count:
            levels[width] = levels_from_bytes(tensors[f"codes.{width}"].numpy(), count, width)
    state = UnpackedWeights()
    position = dict.fromkeys(levels, 0)
    start = 0
    for layer, count in zip(layers, num_weights, strict=True):
        units = slice(start, start + layer["units"])
        start += layer["units"]
        bits_u, step_u = bits_all[units], step_all[units]
        level_un = np.zeros((layer["units"], count), dtype=np.float32)
        for width, values in levels.items():
            rows = np.flatnonzero(bits_u == width)
            end = position[width] + len(rows) * count
            level_un[rows] = values[position[width] : end].reshape(len(rows), count)
            position[width] = end
        weight = (torch.from_numpy(level_un) * torch.from_numpy(step_u)[:, None]).reshape(_coded_shape(layer))
        if layer.get("float_columns"):
            weight = _join_columns(weight, bits_u, tensors[f"columns.{layer['name']}"], layer)
            state.float_columns[layer["name"]] = layer["float_columns"]
        state[layer["name"]] = weight.to(getattr(torch, layer["dtype"]))
        state.bits[layer["name"]], state.steps[layer["name"]] = bits_u, step_u
    for name, tensor in tensors.items():
        if name.startswith("plain."):
            state[name.removeprefix("plain.")] = tensor
    return state


def _coded_shape(layer: dict[str, Any]) -> list[int]:
    """Shape of the part of a weight that lies in codes."""
    shape: list[int] = layer["shape"]
    count = layer.get("float_columns", 0)
    return [shape[0], shape[1] - count, *shape[2:]] if count else shape


def _join_columns(
    coded: torch.Tensor, bits_u: np.ndarray, columns: torch.Tensor, layer: dict[str, Any]
) -> torch.Tensor:
    """The whole weight: coded columns, then the float ones, zeros in dropped rows."""
    weight = torch.zeros(layer["shape"])
    count = layer["float_columns"]
    weight[:, :-count] = coded
    in_use_r = torch.from_numpy(bits_u > 0).expand(len(weight))
    weight[in_use_r, -count:] = columns
    return weight


def _unit_bits(name: str, tensor: torch.Tensor, given: Bits) -> torch.Tensor:
    """One width per unit, int64 (u,)."""
    given_u = torch.as_tensor(np.asarray(given))
    bits_u = given_u.long()
    if not torch.equal(bits_u.to(given_u.dtype), given_u):
        raise ValueError(f"{name!r}: widths must be whole numbers of bits")
    if not tensor.is_floating_point() or tensor.ndim < 1 or not tensor.numel():
        raise ValueError(f"{name!r} is no float tensor with an output-channel axis: it cannot be quantised")
    if bits_u.ndim == 0:
        bits_u = bits_u.expand(len(tensor)).clone()
    if bits_u.ndim != 1 or len(bits_u) not in (1, len(tensor)):
        raise ValueError(f"{name!r}: {len(tensor)} widths (or 1) are needed, got shape {tuple(bits_u.shape)}")
    if len(bits_u) and (int(bits_u.min()) < 0 or int(bits_u.max()) > MAX_BITS):
        raise ValueError(f"{name!r}: widths must lie in 0..{MAX_BITS}")
    return bits_u


def _steps_for(
    name: str, weight_un: torch.Tensor, bits_u: torch.Tensor, given: np.ndarray | None
) -> torch.Tensor:
    if given is not None:
        step_u = torch.as_tensor(np.asarray(given), dtype=torch.float32)
        if step_u.shape != bits_u.shape:
            raise ValueError(f"{name!r}: {len(bits_u)} steps are needed, got shape {tuple(step_u.shape)}")
        return step_u
    step_u = absmax_steps(weight_un, bits_u)[:, 0]
    for row in range(len(bits_u)):
        exact = _grid_step(weight_un[row], int(bits_u[row]))
        if exact is not None:
            step_u[row] = exact
    return step_u


def _grid_step(weight_n: torch.Tensor, bits: int) -> float | None:
    """The step of the grid on which all of a unit's weights lie exactly, None where there is none.

    Division and multiplication in float32 do not undo each other, so neighbouring floats are tried too.
    """
    magnitude_n = weight_n.abs()
    absmax = magnitude_n.max()
    if bits == 0 or absmax == 0:
        return None
    if bits == 1:
        return float(2 * absmax) if bool((magnitude_n == absmax).all()) else None
    limit = int(LIMIT_BY_BITS[bits])
    if len(torch.unique(magnitude_n)) > limit + 1:
        return None
    up, down = torch.tensor(torch.inf), torch.tensor(0.0)
    for top_level in range(limit, 0, -1):
        near = absmax / top_level
        for step in (near, torch.nextafter(near, up), torch.nextafter(near, down)):
            level_n = (weight_n / step).round()
            if bool((level_n.abs() <= limit).all()) and torch.equal(level_n * step, weight_n):
                return float(step)
    return None
