"""What the CPU versions share: exact int8 products on any CPU, and scratch memory that is used again.

oneDNN's int8 matmul is exact where the CPU adds products in 32 bits (AVX512-VNNI, AVX-VNNI, AMX). On older CPUs it adds
pairs in 16 bits, saturates, and returns wrong sums without an error. So it is tried once against int64; where it is
wrong, float32 products over at most 1024 inputs take its place: 1024 · 128² = 2²⁴, up to which float32 counts exactly.

glibc gives large temporaries back to the kernel, and to fault them in again costs more than the matmul that they serve.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from typing import Literal

import torch
from torch import Tensor

Int8Path = Literal["onednn", "float32"]

EXACT_INPUTS = 1024  # that many products of two int8 stay below 2**24
CHUNK_ELEMENTS = 1 << 19  # of float32: what one pass over rows works on; 2 MiB stay in cache between passes
SCRATCH_ELEMENTS = 1 << 22  # a larger buffer is not kept: some twenty slots of 16 MiB are the most that a thread holds

log = logging.getLogger(__name__)
_local = threading.local()


def int_matmul(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a int8 [M, K], b int8 [N, K]: the exact a @ b.T into out int32 [M, N], which is returned."""
    if cpu_int8_path() == "onednn":
        return torch._int_mm(a, b.t(), out=out)
    out.zero_()
    for start in range(0, a.shape[1], EXACT_INPUTS):
        inputs = slice(start, start + EXACT_INPUTS)
        out += (a[:, inputs].float() @ b[:, inputs].float().t()).to(torch.int32)
    return out


@functools.cache
def cpu_int8_path() -> Int8Path:
    """Which exact int8 product this CPU runs: "float32" where oneDNN's sums are wrong. Tried once, and said once."""
    path: Int8Path = "onednn" if torch.backends.mkldnn.is_available() and _onednn_is_exact() else "float32"
    if path == "float32":
        log.warning("oneDNN's int8 matmul is not exact on this CPU: int8 products run in float32, exact and slower")
    return path


def _onednn_is_exact() -> bool:
    drawn = torch.Generator().manual_seed(0)
    a = torch.randint(-127, 128, (64, 256), dtype=torch.int8, generator=drawn)
    b = torch.randint(-127, 128, (64, 256), dtype=torch.int8, generator=drawn)
    return torch.equal(torch._int_mm(a, b.t()).long(), a.long() @ b.long().t())


@functools.cache
def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself: there, and only there, it is faster than float32."""
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in asked)


def scratch(slot: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialized CPU tensor of this shape, in memory that this thread keeps under (slot, dtype) for later calls.

    Its values hold until then. So it never leaves the op that asked for it.
    """
    count = 1
    for size in shape:
        count *= size
    kept: dict[tuple[str, torch.dtype], Tensor] = _local.__dict__.setdefault("kept", {})
    buffer = kept.get((slot, dtype))
    if buffer is None or buffer.numel() < count:
        with torch.inference_mode(False):  # else the buffer could not be written to outside of inference mode later
            buffer = torch.empty(count, dtype=dtype)
        if count <= SCRATCH_ELEMENTS:
            kept[slot, dtype] = buffer
    return buffer[:count].view(shape)


def row_chunks(rows: int, width: int) -> list[slice]:
    """Slices over `rows` such that a float32 chunk of `width` columns stays in cache."""
    size = max(1, CHUNK_ELEMENTS // max(1, width))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def keep_freed_memory() -> bool:
    """Ask glibc to keep large freed blocks for the next allocation instead of giving them back. True if it agreed.

    For the start of a program that computes on the CPU; it concerns every large tensor, outputs included. Elsewhere
    than on glibc it does nothing and says False.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    return bool(mallopt(mmap_threshold, 1 << 30)) and bool(mallopt(trim_threshold, (1 << 31) - 1))
