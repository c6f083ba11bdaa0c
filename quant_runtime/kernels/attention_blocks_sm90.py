"""attention_blocks by hand for Hopper (sm_90a): 16 bits throughout, heads of 64 or 128, blocks of 128.

The operands, and what is answered, are attention_blocks'; the source beside this file says how. Other shapes, int8
queries and keys, and other cards run by Triton.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from quant_runtime.kernels import _cuda
from quant_runtime.kernels._triton import processors

SIZES = (64, 128)
BLOCK = 128
THREADS = 3 * 128  # one group of warps brings the tiles, two multiply
SLOTS, STAGES = 2, 2  # how many tiles of Q, and blocks of K and of V, are there at once
DTYPES = (torch.bfloat16, torch.float16)


def takes(q: Tensor, k: Tensor, v: Tensor, block_q: int, block_k: int, softmax_scale: float) -> bool:
    """Not every scale: the largest score is looked for before it is scaled."""
    fits = q.dtype in DTYPES and q.dtype == k.dtype == v.dtype and q.shape[3] in SIZES
    fits = fits and q.numel() > 0 and k.numel() > 0
    return fits and block_q == block_k == BLOCK and 0 < softmax_scale < math.inf


def launch(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, counts: Tensor, softmax_scale: float) -> Tensor:
    (batch, heads, tokens, size), keys = q.shape, k.shape[2]
    rows = -(-tokens // BLOCK)
    tiles = batch * heads * rows
    q, k, v = (t if _cuda.tiled(t) else _cuda.aligned(t) for t in (q, k, v))
    kept = kept if kept.stride(3) == 1 else kept.contiguous()
    out = torch.empty(batch, tokens, heads, size, dtype=v.dtype, device=v.device)
    with torch.cuda.device(q.device):
        _kernel(q.device, size, q.dtype)(
            min(processors(q.device), tiles),
            THREADS,
            *(_cuda.head_tiles(t, BLOCK) for t in (q, k, v)),
            kept,
            counts,
            out,
            torch.zeros(1, dtype=torch.int32, device=q.device),  # the next tile
            heads,
            tokens,
            keys,
            rows,
            tiles,
            softmax_scale * math.log2(math.e),
            [*kept.stride()[:3], *counts.stride()],
        )
    return out.transpose(1, 2)


@functools.cache
def _kernel(device: torch.device, size: int, dtype: torch.dtype) -> _cuda.Kernel:
    tile = 2 * BLOCK * size
    shared = 1024 + (SLOTS + 2 * STAGES) * tile + 1024  # alignment, Q, K and V, the rest
    defines = (("D", size), ("HALF", int(dtype == torch.float16)), ("SLOTS", SLOTS), ("STAGES", STAGES))
    return _cuda.Kernel("attention_blocks_sm90.cu", "attention_blocks_sm90", shared, defines)
