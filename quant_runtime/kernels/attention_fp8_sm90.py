"""attention_fp8 and its kin by hand for Hopper (sm_90a): heads of 64 or 128, in blocks of 128 queries and 128 keys.

The operands, and what is answered, are attention_fp8's; the source beside this file says how. Other shapes, and other
cards, run by Triton.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from quant_runtime.kernels import _cuda
from quant_runtime.kernels._triton import processors

BLOCK = 128
THREADS = 3 * 128  # one group of warps brings the tiles, two multiply
PROGRAMS = {64: 2, 128: 1}  # of a processor at once, by the size of a head
SLOTS = {64: 2, 128: 1}  # tiles of Q in a program's memory
STAGES = {64: 4, 128: 4}  # blocks of K and V there
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # of the answer
ADDED = {torch.int8: 1, torch.float32: 2, torch.bfloat16: 3, torch.float16: 4}  # of the residual; 0 is none


def takes(q: Tensor, block_q: int, block_k: int) -> bool:
    return q.shape[3] in PROGRAMS and block_q == block_k == BLOCK and q.numel() > 0


def tiles_at_once(size: int) -> int:
    """That a processor has under way, of heads of this size: those of each of its programs, and 1 of other heads."""
    return PROGRAMS.get(size, 1) * SLOTS.get(size, 1)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    kept: Tensor,
    counts: Tensor,
    keys: int,
    out_dtype: torch.dtype,
    softmax_scale: float,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    tokens: Tensor | None,
    *,
    lse: Tensor | None = None,
    lost: Tensor | None = None,
) -> Tensor:
    """`lse` or `lost`, where one is given, is written to: lse float32 [B, H, N], contiguous; lost as the answer is.

    With `lost`, lists go on to all other blocks, and the answer is dense.
    """
    assert lse is None or lost is None, "one second answer"
    if lost is not None:
        assert lost.dtype == out_dtype, "as the answer"
        assert lost.transpose(1, 2).is_contiguous(), "as the answer"
        assert kept.shape[3] * BLOCK == k.shape[2], "attention_fp8_refresh lists all blocks"
    batch, heads, count, size = q.shape
    padded, rows, every = k.shape[2], -(-count // BLOCK), batch * heads
    q, k, v, q_scale, k_scale, v_scale = (t.contiguous() for t in (q, k, v, q_scale, k_scale, v_scale))
    kept = kept if kept.stride(3) == 1 else kept.contiguous()
    tokens = tokens if tokens is None or tokens.stride(2) == 1 else tokens.contiguous()
    out = torch.empty(batch, count, heads, size, dtype=out_dtype, device=q.device)
    with torch.cuda.device(q.device):
        added = 0 if residual is None else ADDED[residual.dtype]
        _kernel(q.device, size, KINDS[out_dtype], added, tokens is not None, lse is not None, lost is not None)(
            min(PROGRAMS[size] * processors(q.device), every * rows),
            THREADS,
            _cuda.tiles(q.view(-1, size), BLOCK, size),
            _cuda.tiles(k.view(-1, size), BLOCK, size),
            _cuda.tiles(v.view(torch.uint8).view(-1, padded), size, BLOCK),
            q_scale,
            k_scale,
            v_scale,
            kept,
            counts,
            tokens,
            None if residual is None else residual.transpose(1, 2).contiguous(),
            None if residual_scale is None else residual_scale.contiguous(),
            out,
            lse if lost is None else lost,
            torch.zeros(1, dtype=torch.int32, device=q.device),  # the next tile
            heads,
            count,
            keys,
            padded,
            rows,
            every * rows,
            softmax_scale * math.log2(math.e),
            [*kept.stride()[:3], *counts.stride(), *((0, 0) if tokens is None else tokens.stride()[:2])],
        )
    return out.transpose(1, 2)


@functools.cache
def _kernel(
    device: torch.device, size: int, out: int, residual: int, tokens: bool, lse: bool, refresh: bool
) -> _cuda.Kernel:
    tile, slots, stages = BLOCK * size, SLOTS[size], STAGES[size]
    shared = 1024 + slots * tile + stages * (2 * tile + 1024) + 1024  # alignment, Q, K and V with its ones, the rest
    shape = (("SIZE", size), ("PROGRAMS", PROGRAMS[size]), ("SLOTS", slots), ("STAGES", stages))
    answers = (("OUT", out), ("RESIDUAL", residual), ("LSE", int(lse)), ("REFRESH", int(refresh)))
    return _cuda.Kernel(
        "attention_fp8_sm90.cu", "attention_fp8_sm90", shared, (*shape, *answers, ("TOKENS", int(tokens)))
    )
