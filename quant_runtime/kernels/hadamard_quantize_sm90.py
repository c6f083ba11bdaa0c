"""hadamard_quantize by hand for Hopper (sm_90a): rows of 16 bits, blocks of 32 to 4096 columns.

The operands, and what is answered, are hadamard_quantize's; the source beside this file says how. Others run by Triton.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from quant_runtime.kernels import _cuda
from quant_runtime.kernels._triton import processors

TILE = 2048  # columns that a warp turns, of one row or of several
MOST_TILES = 16  # of a program, and all that a processor has room for
UNIT = 256  # columns of a thread, which are of one row
BLOCKS = (32, 2 * TILE)
KINDS = {torch.bfloat16: 0, torch.float16: 1}  # of x


def takes(x: Tensor, block: int) -> bool:
    columns = x.shape[1]
    fits = columns % UNIT == 0 and columns <= MOST_TILES * TILE and (block <= TILE or columns % block == 0)
    return (
        x.dtype in KINDS and BLOCKS[0] <= block <= BLOCKS[1] and fits and x.is_contiguous() and x.data_ptr() % 16 == 0
    )


def launch(
    x: Tensor, signs: Tensor, block: int, top: float, tiny: float, factor: Tensor | None, q: Tensor, scale: Tensor
) -> None:
    """Fills q and scale."""
    m, k = x.shape
    rows, tiles = shape_of(k)
    programs = min(_programs(tiles) * processors(x.device), -(-m // rows))
    if not programs:
        return
    factor = None if factor is None else _cuda.aligned(factor)
    with torch.cuda.device(x.device):
        kernel = _kernel(x.device, k, block, rows, tiles, KINDS[x.dtype], factor is not None, q.dtype != torch.int8)
        kernel(programs, 32 * tiles, x, signs, factor, q, scale, m, top, tiny, 1 / math.sqrt(block))


def shape_of(columns: int) -> tuple[int, int]:
    """(rows that a program turns at a time, tiles that they are)."""
    whole = (r for r in (1, 2, 4, 8) if r * columns % TILE == 0 and r * columns <= MOST_TILES * TILE)
    rows = next(whole, 1)
    return rows, -(-rows * columns // TILE)


def _programs(tiles: int) -> int:
    """Of a processor."""
    return MOST_TILES // tiles


@functools.cache
def _kernel(
    device: torch.device, k: int, block: int, rows: int, tiles: int, half: int, factor: bool, fp8: bool
) -> _cuda.Kernel:
    shared = 32 * tiles * (128 + (128 if block > TILE else 0)) + 12 * rows
    defines = (
        ("K", k), ("B", block), ("ROWS", rows), ("HALF", half), ("FACTOR", int(factor)), ("FP8", int(fp8)),
        ("PROGRAMS", _programs(tiles)),
    )  # fmt: skip
    return _cuda.Kernel("hadamard_quantize_sm90.cu", "hadamard_quantize_sm90", shared, defines)
