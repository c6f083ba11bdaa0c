"""Which key blocks each block of queries keeps: those of the highest scores, mean query against mean key.

q_means, k_means  float32 [B, H, rows, D] and [B, H, blocks, D], as `pool` and pack_heads make them
keep    how many key blocks a row keeps, forced ones included
forced  bool [blocks] or None: key blocks that rank before all others; no more of them than `keep`
whole   bool [rows] or None: rows that keep every key block
kept    int32 [B, H, rows, L], ascending, for attention_blocks      counts  int32 [B, H, rows]

L is the number of key blocks where `whole` is given, else keep, and every count is keep. All on the device: no value is
read back. Means are over the tokens that a ragged last block has; of equal scores the earlier block is kept; a NaN is
the lowest score. This is the pooled-score choice of SpargeAttn (arXiv:2502.18137) with a fixed count in place of its
cumulative threshold, and without its guard on blocks of dissimilar tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant_runtime.kernels._triton import jit, tl, triton
from quant_runtime.kernels._versions import Op


def pool(x: Tensor, block: int) -> Tensor:
    """float32 [B, H, ceil(N / block), D] of x float [B, H, N, D]: the mean of each block's tokens."""
    if x.dim() != 4 or not x.is_floating_point() or block < 1:
        raise ValueError(f"pool takes floats [B, H, N, D] in blocks; got {x.dtype} {list(x.shape)}, block={block}")
    means: Tensor = _pool_op(x, block)
    return means


def choose(
    q_means: Tensor, k_means: Tensor, keep: int, forced: Tensor | None = None, whole: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(kept, counts). Refuses keep < 1, and masks that do not have one entry a block."""
    if q_means.dim() != 4 or k_means.dim() != 4 or q_means.dtype != torch.float32 or k_means.dtype != torch.float32:
        found = f"{q_means.dtype} {list(q_means.shape)} and {k_means.dtype} {list(k_means.shape)}"
        raise ValueError(f"choose takes means as float32 [B, H, rows, D] and [B, H, blocks, D]; got {found}")
    if keep < 1:
        raise ValueError(f"choose keeps at least 1 block; got keep={keep}")
    for name, mask, blocks in (("forced", forced, k_means.shape[2]), ("whole", whole, q_means.shape[2])):
        if mask is not None and (mask.shape != (blocks,) or mask.dtype != torch.bool):
            raise ValueError(f"choose: {name} is bool [{blocks}]; got {mask.dtype} {list(mask.shape)}")
    kept, counts = _choose_op(q_means, k_means, min(keep, k_means.shape[2]), forced, whole)
    return kept, counts


def choose_reference(
    q_means: Tensor, k_means: Tensor, keep: int, forced: Tensor | None, whole: Tensor | None
) -> tuple[Tensor, Tensor]:
    scores = (q_means @ k_means.mT).nan_to_num(nan=-math.inf)
    blocks = scores.shape[3]
    if forced is not None:
        scores = scores.masked_fill(forced, math.inf)
    best = scores.sort(dim=3, descending=True, stable=True).indices[..., :keep].sort(dim=3).values
    counts = torch.full(best.shape[:3], keep, dtype=torch.int32, device=best.device)
    if whole is not None:
        counts.masked_fill_(whole, blocks)
        every = torch.arange(blocks, device=best.device)
        best = torch.where(whole[:, None], every, pad(best, (0, blocks - keep)))
    return best.to(torch.int32), counts


def pool_reference(x: Tensor, block: int) -> Tensor:
    tokens = x.shape[2]
    blocks = -(-tokens // block)
    whole = x[:, :, : tokens - tokens % block].unflatten(2, (-1, block)) if tokens >= block else x[:, :, :0, None]
    means = whole.mean(dim=3, dtype=torch.float32)
    if whole.shape[2] < blocks:
        rest = x[:, :, tokens - tokens % block :].mean(dim=2, keepdim=True, dtype=torch.float32)
        means = torch.cat([means, rest], dim=2)
    return means


@jit
def _pool_blocks(
    x, means, H, N, BLOCKS, stride_b, stride_h, stride_n, BN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr
):
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n, d = block * BN + tl.arange(0, BN), tl.arange(0, DP)
    x_head = x + head // H * stride_b + head % H * stride_h
    inside = (n < N)[:, None] & (d < D)[None, :]
    tokens = tl.load(x_head + n.to(tl.int64)[:, None] * stride_n + d[None, :], mask=inside, other=0.0)
    mean = tl.sum(tokens.to(tl.float32), axis=0) / tl.minimum(N - block * BN, BN)
    tl.store(means + (head * BLOCKS + block) * D + d, mean, mask=d < D)


@jit
def _choose_by_density(
    scores,
    forced,
    whole,
    kept,
    counts,
    keep,
    BLOCKS,
    ROWS,
    LISTED,
    FORCED: tl.constexpr,
    WHOLE: tl.constexpr,
    BP: tl.constexpr,
):
    """One row: the keep-th highest score by bisection over its 32 bits, then the chosen blocks in order."""
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BP)
    score = tl.load(scores + row * BLOCKS + i, mask=i < BLOCKS, other=0.0) + 0.0  # -0.0 becomes 0.0
    score = tl.where(score == score, score, float("-inf"))
    if FORCED:
        score = tl.where(tl.load(forced + i, mask=i < BLOCKS, other=0) != 0, float("inf"), score)
    bits = score.to(tl.int32, bitcast=True)
    rank = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648  # whole numbers that order as the floats do
    rank = tl.where(i < BLOCKS, rank, -1)

    least = tl.full((), 0, tl.int64)
    for bit in range(32):
        higher = least + (tl.full((), 1, tl.int64) << (31 - bit))
        least = tl.where(tl.sum((rank >= higher).to(tl.int32), axis=0) >= keep, higher, least)
    above, equal = rank > least, rank == least
    needed = keep - tl.sum(above.to(tl.int32), axis=0)
    chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), axis=0) <= needed))
    count = keep
    if WHOLE:
        every = tl.load(whole + row % ROWS).to(tl.int32)
        chosen = tl.where(every > 0, i < BLOCKS, chosen)
        count = tl.where(every > 0, BLOCKS, keep)

    place = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    tl.store(kept + row * LISTED + place, i, mask=chosen)
    tl.store(kept + row * LISTED + i, 0, mask=(i >= count) & (i < LISTED))
    tl.store(counts + row, count)


def launch_choose(
    q_means: Tensor, k_means: Tensor, keep: int, forced: Tensor | None, whole: Tensor | None
) -> tuple[Tensor, Tensor]:
    scores = torch.matmul(q_means, k_means.mT)
    rows, blocks = scores.shape[2:]
    listed = keep if whole is None else blocks
    kept = torch.empty(*scores.shape[:3], listed, dtype=torch.int32, device=scores.device)
    counts = torch.empty(scores.shape[:3], dtype=torch.int32, device=scores.device)
    masks = (None if m is None else m.to(torch.int8) for m in (forced, whole))
    _choose_by_density[(counts.numel(),)](
        scores,
        *masks,
        kept,
        counts,
        keep,
        blocks,
        rows,
        listed,
        FORCED=forced is not None,
        WHOLE=whole is not None,
        BP=triton.next_power_of_2(blocks),
    )
    return kept, counts


def launch_pool(x: Tensor, block: int) -> Tensor:
    batch, heads, tokens, size = x.shape
    x = x if x.stride(3) == 1 else x.contiguous()
    blocks = triton.cdiv(tokens, block)
    means = torch.empty(batch, heads, blocks, size, dtype=torch.float32, device=x.device)
    _pool_blocks[(blocks, batch * heads)](
        x, means, heads, tokens, blocks, *x.stride()[:3], BN=block, D=size, DP=triton.next_power_of_2(size)
    )
    return means


def _fake_choose(
    q_means: Tensor, k_means: Tensor, keep: int, forced: Tensor | None, whole: Tensor | None
) -> tuple[Tensor, Tensor]:
    counts = q_means.new_empty(q_means.shape[:3], dtype=torch.int32)
    return counts.new_empty(*counts.shape, keep if whole is None else k_means.shape[2]), counts


# The reference is the fast version for a CPU as well: what it does is small beside reading q and k.
_pool_op = Op(
    "pool_blocks",
    pool_reference,
    lambda x, block: x.new_empty(*x.shape[:2], -(-x.shape[2] // block), x.shape[3], dtype=torch.float32),
    cuda={"Triton": launch_pool},
)
_choose_op = Op("choose_blocks", choose_reference, _fake_choose, cuda={"Triton": launch_choose})
