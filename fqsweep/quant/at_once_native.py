"""The quantisers of all layers in one call on a CPU: ``at_once_native.cpp``, built once a machine and loaded.

Compiling takes a second and a C++ compiler; the library then lies in the user's cache, under a name that says of
which source, for which processor and by which compiler it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch

from fqsweep.files import cache_folder
from fqsweep.quant.blocks import Blocks

SOURCE = Path(__file__).with_name("at_once_native.cpp")
COMPILERS = ("g++", "clang++", "c++")
LIBRARY = "-std=c++17 -O3 -shared -fPIC -pthread"
# Without contraction, as levels would not be those of the eager kernels.
ARITHMETIC = "-ffp-contract=off -fno-math-errno -fno-trapping-math -fopenmp-simd"
FLAGS = f"{LIBRARY} {ARITHMETIC}"
FOR_THIS_PROCESSOR = "-march=native"  # tried first; not every compiler knows it of every processor
BUILD_SECONDS = 120


class NativeBuildError(Exception):
    """The library cannot be had on this machine; the message says why."""


@lru_cache(maxsize=1)
def load_library() -> ctypes.CDLL:
    """The library, built if this machine has not built it before.

    Raises:
        NativeBuildError: no C++ compiler, or what it made cannot be used.
    """
    compiler = find_compiler()
    if compiler is None:
        raise NativeBuildError("no C++ compiler found")
    # No home (RuntimeError), or a cache that cannot be written or from which nothing can be loaded.
    with contextlib.suppress(OSError, RuntimeError):
        return ctypes.CDLL(str(_built(compiler, cache_folder())))
    try:
        with tempfile.TemporaryDirectory() as folder:
            return ctypes.CDLL(str(_built(compiler, Path(folder))))
    except OSError as error:
        raise NativeBuildError(f"what {compiler} makes cannot be kept or loaded: {error}") from error


def find_compiler() -> str | None:
    """The C++ compiler of this machine; None where there is none."""
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)


def _built(compiler: str, folder: Path) -> Path:
    """The library in this folder."""
    version = _ask(compiler, "--version").stdout.encode()
    named = hashlib.sha256(b"\0".join((SOURCE.read_bytes(), FLAGS.encode(), version, _processor().encode())))
    target = folder / f"at_once_native-{named.hexdigest()[:20]}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, made = tempfile.mkstemp(dir=folder, suffix=".so")  # its own name: processes may build side by side
    os.close(handle)
    try:
        for flags in (f"{FLAGS} {FOR_THIS_PROCESSOR}", FLAGS):
            ended = _ask(compiler, *flags.split(), str(SOURCE), "-o", made)
            if ended.returncode == 0:
                os.replace(made, target)
                return target
        reason = ended.stderr.strip().splitlines()[0] if ended.stderr.strip() else f"exit {ended.returncode}"
        raise NativeBuildError(f"{compiler} does not compile {SOURCE.name}: {reason}")
    finally:
        Path(made).unlink(missing_ok=True)


def _ask(compiler: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [compiler, *options]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, timeout=BUILD_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise NativeBuildError(f"{compiler} takes longer than {BUILD_SECONDS} s") from error


def _processor() -> str:
    """What this processor can do: a home folder may serve machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return f"{platform.machine()} {platform.processor()}"
    told = ("flags", "Features", "model name", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(told)}))


def run(
    name: str, blocks: Blocks, layers: Sequence[Sequence[torch.Tensor]], rows: Sequence[torch.Tensor]
) -> None:
    """Call one function of the library on all units; sums do not depend on the number of threads.

    Args:
        name: of the function, without its prefix.
        layers: lists of a float32 tensor a layer, all laid out as ``blocks`` say: weights first, results last.
        rows: float32 (u, 1), contiguous; the last ones are written where the function gives rows.
    """
    function = getattr(load_library(), f"fqsweep_{name}")
    numbers = (blocks.num_units, torch.get_num_threads())
    pointers = [blocks.layer_u, blocks.start_u, blocks.num_u, *blocks.addresses(layers), *rows]
    function(*map(ctypes.c_int64, numbers), *[ctypes.c_void_p(pointer.data_ptr()) for pointer in pointers])
