"""What the CPU versions share: exact int8 products on any CPU, and scratch memory that is used again.

oneDNN's int8 matmul is exact where the CPU adds products in 32 bits (AVX512-VNNI, AVX-VNNI, AMX). On older CPUs it adds
pairs in 16 bits, saturates, and returns wrong sums without an error; or torch does not call it at all, and its own loop
takes many times as long as float32. So it is tried once against int64, and the CPU is asked what it has; where int8 is
wrong or slow, float32 products over at most 1024 inputs take its place: 1024 · 128² = 2²⁴, up to which float32 counts
exactly.

glibc gives large temporaries back to the kernel, and to fault them in again costs more than the matmul that they serve.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Int8Path = Literal["onednn", "float32"]

EXACT_INPUTS = 1024  # that many products of two int8 stay below 2**24
CHUNK_ELEMENTS = 1 << 19  # of float32: what one pass over rows works on; 2 MiB stay in cache between passes
SCRATCH_ELEMENTS = 1 << 22  # a larger buffer is not kept: some twenty slots of 16 MiB are the most that a thread holds

log = logging.getLogger(__name__)
_local = threading.local()


def products(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a [M, K], b [N, K], as `operand` gives them: the exact a @ b.T, rounded once, into out float32 [M, N]."""
    inputs = a.shape[1]
    if a.dtype == torch.float32 and inputs <= EXACT_INPUTS:
        return torch.mm(a, b.t(), out=out)
    sums = scratch("sums", tuple(out.shape), torch.int32)
    if a.dtype == torch.int8:
        return out.copy_(torch._int_mm(a, b.t(), out=sums))
    sums.zero_()
    for start in range(0, inputs, EXACT_INPUTS):
        some = slice(start, start + EXACT_INPUTS)
        sums += torch.mm(a[:, some], b[:, some].t(), out=out).to(torch.int32)
    return out.copy_(sums)


def operand(x: Tensor, slot: str) -> Tensor:
    """int8 x as this CPU multiplies it: itself, or float32 in scratch."""
    if operand_dtype() == torch.int8:
        return x
    return scratch(slot, tuple(x.shape), torch.float32).copy_(x)


def operand_dtype() -> torch.dtype:
    return torch.int8 if cpu_int8_path() == "onednn" else torch.float32


@functools.cache
def cpu_int8_path() -> Int8Path:
    """Which exact int8 product this CPU runs. Found out once, and said once where it is float32's."""
    why = _why_not_onednn()
    if why:
        log.warning("%s: int8 products run in float32, exact and slower than int8 can be", why)
    return "float32" if why else "onednn"


def product_name() -> str:
    """What multiplies int8 on this CPU, in a word or two."""
    return "oneDNN" if cpu_int8_path() == "onednn" else "float32 products"


def _why_not_onednn() -> str:
    """Empty where torch's int8 matmul is exact, and fast. Asked of the CPU: a clock would make two runs differ."""
    if not torch.backends.mkldnn.is_available():
        return "this torch has no oneDNN"
    if not _int_mm_is_exact():
        return "oneDNN's int8 matmul is not exact on this CPU"
    if not _cpu_has("_is_vnni_supported", "_is_amx_tile_supported"):
        return "this CPU has neither VNNI nor AMX, and torch no fast int8 matmul for it"
    return ""


def _int_mm_is_exact() -> bool:
    drawn = torch.Generator().manual_seed(0)
    a = torch.randint(-127, 128, (64, 256), dtype=torch.int8, generator=drawn)
    b = torch.randint(-127, 128, (64, 256), dtype=torch.int8, generator=drawn)
    return torch.equal(torch._int_mm(a, b.t()).long(), a.long() @ b.long().t())


def _cpu_has(*asked: str) -> bool:
    return any(getattr(torch.cpu, name, lambda: False)() for name in asked)


@functools.cache
def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself: there, and only there, it is faster than float32."""
    return _cpu_has("_is_avx512_bf16_supported", "_is_amx_tile_supported")


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
    mallopt = _libc("mallopt")
    if mallopt is None:
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    return bool(mallopt(mmap_threshold, 1 << 30)) and bool(mallopt(trim_threshold, (1 << 31) - 1))


def give_back_freed_memory() -> bool:
    """Give back what keep_freed_memory kept, between two pieces of work: what is kept too long is kept in pieces.

    A few hundredths of a second. True where there was some; elsewhere than on glibc it does nothing.
    """
    malloc_trim = _libc("malloc_trim")
    return malloc_trim is not None and bool(malloc_trim(0))


def _libc(name: str) -> Callable[..., int] | None:
    try:
        found: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None
    return found
