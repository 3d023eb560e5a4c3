"""Quantisation: grids, quantisers on layers, learned bits, packing to disk, accounting."""

from fqsweep.quant.grid import fake_quantize
from fqsweep.quant.packing import PackedFileError, pack_weights, unpack_weights

__all__ = ["PackedFileError", "fake_quantize", "pack_weights", "unpack_weights"]
