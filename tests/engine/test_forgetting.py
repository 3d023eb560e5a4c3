"""Free memory of the driver goes back to the system."""

from __future__ import annotations

import ctypes
import platform

import psutil
import pytest

from fqsweep.engine.forgetting import give_back_memory

BLOCKS, BYTES = 60_000, 1_000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has its own ways")
def test_free_pages_below_a_block_in_use_go_back() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    blocks = [libc.malloc(BYTES) for _ in range(BLOCKS)]
    for block in blocks:
        ctypes.memset(block, 1, BYTES)
    last = libc.malloc(BYTES)  # in use, above all of them: the heap cannot shrink at its end
    for block in blocks:
        libc.free(block)
    process = psutil.Process()
    before = process.memory_info().rss
    give_back_memory()
    assert before - process.memory_info().rss > BLOCKS * BYTES / 2
    libc.free(last)
