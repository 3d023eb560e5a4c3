"""Moving images on the CPU by a small C function, compiled when it is first used.

torch has no operation that samples bytes, so that its way is a dozen passes over floating-point images; the C
function is one pass over the bytes, six times as fast. Any C compiler serves, in a fraction of a second; without one
torch's operations do the same, slower.

Axes: b images, c channels, h and w pixels.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(__file__).with_name("resample.c")
COMPILERS = ("cc", "gcc", "clang")
# Values are finite, and the sign of zero means nothing. Not -ffast-math: it changes the whole process's arithmetic.
FLAGS = (
    "-O3",
    "-march=native",
    "-ffinite-math-only",
    "-fno-math-errno",
    "-fno-signed-zeros",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
)
# Below this many bytes another thread costs more than it saves.
BYTES_PER_THREAD = 500_000


def resample(
    pixels_bhwc: torch.Tensor,
    theta_b23: torch.Tensor,
    light_b2: torch.Tensor,
    scale_c: torch.Tensor,
    shift_c: torch.Tensor,
) -> torch.Tensor | None:
    """Images moved by affine maps, lit anew and normalised; None where no compiler works.

    Args:
        pixels_bhwc: uint8, contiguous, on the CPU, at least 2 x 2 pixels.
        theta_b23, light_b2: float32, see ``fqsweep.data.augment.Moves``.
        scale_c, shift_c: float32, three values each.

    Returns:
        float32 (b, c, h, w).
    """
    function = _function()
    if function is None:
        return None
    batch, height, width, channels = pixels_bhwc.shape
    image_bchw = torch.empty((batch, channels, height, width))
    num_threads = max(1, min(torch.get_num_threads(), pixels_bhwc.numel() // BYTES_PER_THREAD))
    values = [values.contiguous() for values in (scale_c, shift_c)]
    parts = [
        tensor.contiguous().tensor_split(num_threads)
        for tensor in (pixels_bhwc, theta_b23, light_b2, image_bchw)
    ]

    def work(pixels: torch.Tensor, theta: torch.Tensor, light: torch.Tensor, image: torch.Tensor) -> None:
        pointers = [tensor.data_ptr() for tensor in (theta, light, *values, image)]
        function(pixels.data_ptr(), len(pixels), height, width, *pointers)

    if num_threads == 1:
        work(*[part[0] for part in parts])
    else:
        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(work, *parts))
    return image_bchw


@lru_cache(maxsize=1)
def _function() -> Any:
    """The C function; None where it cannot be compiled or loaded."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "resample.so"
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(library), "-lm"]
        try:
            subprocess.run(command, check=True, capture_output=True)
            function = ctypes.CDLL(str(library)).resample
        except (OSError, subprocess.CalledProcessError, AttributeError):
            return None
    function.restype = None
    function.argtypes = [ctypes.c_void_p, *[ctypes.c_int] * 3, *[ctypes.c_void_p] * 5]
    return function
