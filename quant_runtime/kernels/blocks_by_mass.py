"""Which key blocks each block of queries keeps: the fewest that hold a share of its softmax over mean keys.

q_means  float32 [B, H, rows, D], k_means  float32 [B, H, blocks, D], as block_map.choose takes them
mass     the share of a row that is to be kept, above 0 and at most 1; 1 is everything
least, most   bounds of a row's count, always-kept blocks included; these are kept beyond `most`
forced   bool [blocks] or None: key blocks that every row keeps; what they hold of a row counts first
whole    bool [rows] or None: rows that keep every key block
q_alike  float32 [B, H, rows], k_alike  float32 [B, H, blocks], or both None: `likeness` of the blocks
alike    the guard: a block whose tokens are less alike has a mean that stands for none of them. A key block is then
         left out of the softmax and kept by every row, a row of queries is whole
kept     int32 [B, H, rows, blocks], ascending, for attention_blocks; the first counts of them mean something
counts   int32 [B, H, rows]

This is SpargeAttn's choice (arXiv:2502.18137): softmax of mean query · mean key / sqrt(D), blocks from the highest
until they hold `mass`. Of equal scores the earlier block is kept; a NaN is the lowest score. The row, the threshold and
the lists stay on the device: no value is read back.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant_runtime.kernels._triton import jit, tl, triton
from quant_runtime.kernels._versions import Op

NOTHING = 1e-30  # the square of a token's length below which it has no direction


def blocks_by_mass(
    q_means: Tensor,
    k_means: Tensor,
    mass: float,
    least: int = 1,
    most: int | None = None,
    forced: Tensor | None = None,
    whole: Tensor | None = None,
    q_alike: Tensor | None = None,
    k_alike: Tensor | None = None,
    alike: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(kept, counts)."""
    if q_means.dim() != 4 or k_means.dim() != 4 or q_means.dtype != torch.float32 or k_means.dtype != torch.float32:
        found = f"{q_means.dtype} {list(q_means.shape)} and {k_means.dtype} {list(k_means.shape)}"
        raise ValueError(f"blocks_by_mass takes means as float32 [B, H, rows, D] and [B, H, blocks, D]; got {found}")
    blocks = k_means.shape[2]
    top = blocks if most is None else most
    if not 0 < mass <= 1 or not 1 <= least <= top:
        found = f"mass={mass}, least={least}, most={most}"
        raise ValueError(f"blocks_by_mass keeps a mass above 0, at most 1, in 1 <= least <= most blocks; got {found}")
    for name, mask, count in (("forced", forced, blocks), ("whole", whole, q_means.shape[2])):
        if mask is not None and (mask.shape != (count,) or mask.dtype != torch.bool):
            raise ValueError(f"blocks_by_mass: {name} is bool [{count}]; got {mask.dtype} {list(mask.shape)}")
    if (q_alike is None) != (k_alike is None):
        raise ValueError("blocks_by_mass takes q_alike and k_alike together")
    for name, value, of in (("q_alike", q_alike, q_means), ("k_alike", k_alike, k_means)):
        if value is not None and (value.shape != of.shape[:3] or value.dtype != torch.float32):
            raise ValueError(
                f"blocks_by_mass: {name} is float32 {list(of.shape[:3])}; got {value.dtype} {list(value.shape)}"
            )
    least = blocks if mass == 1 else min(least, blocks)
    kept, counts = _op(q_means, k_means, mass, least, min(top, blocks), forced, whole, q_alike, k_alike, alike)
    return kept, counts


def likeness(x: Tensor, block: int) -> Tensor:
    """float32 [B, H, ceil(N / block)] of x [B, H, N, D]: the mean cosine of all pairs of a block's tokens.

    Each token is in a pair with itself, as in SpargeAttn; one without a length is like none. It is computed as the
    square of the mean of the tokens' directions.
    """
    x, tokens = x.float(), x.shape[2]
    directions = x * x.square().sum(dim=3, keepdim=True).clamp(min=NOTHING).rsqrt()
    sums: Tensor = pad(directions, (0, 0, 0, -tokens % block)).unflatten(2, (-1, block)).sum(dim=3)
    held = torch.full((sums.shape[2],), float(block), device=x.device)
    held[-1] -= -tokens % block
    return (sums / held[:, None]).square().sum(dim=3)


def reference(
    q_means: Tensor,
    k_means: Tensor,
    mass: float,
    least: int,
    most: int,
    forced: Tensor | None,
    whole: Tensor | None,
    q_alike: Tensor | None,
    k_alike: Tensor | None,
    alike: float,
) -> tuple[Tensor, Tensor]:
    scores = (q_means @ k_means.mT * q_means.shape[3] ** -0.5).nan_to_num(nan=-math.inf)
    blocks = scores.shape[3]
    apart = torch.zeros_like(scores, dtype=torch.bool)
    if k_alike is not None:
        apart |= (k_alike < alike)[:, :, None]
    always = torch.zeros_like(apart)
    if forced is not None:
        always = forced & ~apart
    scores = scores.masked_fill(apart, -math.inf)
    weights = (scores - scores.amax(dim=3, keepdim=True)).exp().nan_to_num(nan=0.0)  # of a row without any score, zeros

    order = scores.masked_fill(always, math.inf).sort(dim=3, descending=True, stable=True).indices
    missing = mass * weights.sum(dim=3, keepdim=True)
    before = weights.gather(3, order).cumsum(dim=3) - weights.gather(3, order)  # what is kept ahead of each
    needed = (before < missing).sum(dim=3)
    beside = apart.sum(dim=3)
    needed = needed.clamp(min=(least - beside)).clamp(max=(most - beside)).maximum(always.sum(dim=3))
    needed = needed.minimum(blocks - beside)
    place = torch.empty_like(order).scatter_(3, order, torch.arange(blocks, device=order.device).expand_as(order))
    chosen = apart | (place < needed[..., None])
    if whole is not None:
        chosen |= whole[:, None]
    if q_alike is not None:
        chosen |= (q_alike < alike)[..., None]
    counts = chosen.sum(dim=3, dtype=torch.int32)
    kept = (~chosen).to(torch.int8).sort(dim=3, stable=True).indices
    listed = torch.arange(blocks, device=kept.device) < counts[..., None]
    return torch.where(listed, kept, 0).to(torch.int32), counts


@jit
def _choose_by_mass(
    scores,
    forced,
    whole,
    q_alike,
    k_alike,
    kept,
    counts,
    mass,
    least,
    most,
    alike,
    scale,
    BLOCKS,
    ROWS,
    FORCED: tl.constexpr,
    WHOLE: tl.constexpr,
    GUARD: tl.constexpr,
    BP: tl.constexpr,
):
    """One row. Scores become whole numbers of 32 bits in their order; one bisection over these bits finds the score of
    the last block that the mass needs, a second one that of the last block that the bounds let be kept.
    """
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BP)
    inside = i < BLOCKS
    score = tl.load(scores + row * BLOCKS + i, mask=inside, other=float("-inf")) * scale + 0.0  # -0.0 becomes 0.0
    score = tl.where(score == score, score, float("-inf"))
    apart = i < 0
    if GUARD:
        apart = inside & (tl.load(k_alike + row // ROWS * BLOCKS + i, mask=inside, other=float("inf")) < alike)
    score = tl.where(apart, float("-inf"), score)
    highest = tl.max(score, axis=0)
    weight = tl.exp(score - tl.where(highest > float("-inf"), highest, 0.0))
    always = i < 0
    if FORCED:
        always = (tl.load(forced + i, mask=inside, other=0) != 0) & (apart == 0)
    rank = _rank(tl.where(always, float("inf"), score))
    rank = tl.where(inside & (apart == 0), rank, -1)

    missing = mass * tl.sum(weight, axis=0)
    border = tl.full((), 0, tl.int64)  # the highest rank from which on the mass is held
    for bit in range(32):
        higher = border + (tl.full((), 1, tl.int64) << (31 - bit))
        border = tl.where(tl.sum(tl.where(rank >= higher, weight, 0.0), axis=0) >= missing, higher, border)
    above, equal = rank > border, rank == border
    before = tl.sum(tl.where(above, weight, 0.0), axis=0)
    each = tl.max(tl.where(equal, weight, 0.0), axis=0)
    ahead = tl.cumsum(equal.to(tl.int32), axis=0) - 1  # of the same score, further in front
    short = equal & (before + ahead.to(tl.float32) * each < missing)
    needed = tl.sum(above.to(tl.int32), axis=0) + tl.sum(short.to(tl.int32), axis=0)
    beside = tl.sum(apart.to(tl.int32), axis=0)
    needed = tl.minimum(tl.maximum(needed, least - beside), most - beside)
    needed = tl.minimum(tl.maximum(needed, tl.sum(always.to(tl.int32), axis=0)), BLOCKS - beside)

    lowest = tl.full((), 0, tl.int64)  # the rank of the last that is kept
    for bit in range(32):
        higher = lowest + (tl.full((), 1, tl.int64) << (31 - bit))
        lowest = tl.where(tl.sum((rank >= higher).to(tl.int32), axis=0) >= needed, higher, lowest)
    above, equal = rank > lowest, rank == lowest
    open_ = needed - tl.sum(above.to(tl.int32), axis=0)
    chosen = apart | above | (equal & (tl.cumsum(equal.to(tl.int32), axis=0) <= open_))
    if WHOLE:
        chosen = tl.where(tl.load(whole + row % ROWS).to(tl.int32) > 0, inside, chosen)
    if GUARD:
        chosen = tl.where(tl.load(q_alike + row) < alike, inside, chosen)

    place = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    count = tl.sum(chosen.to(tl.int32), axis=0)
    tl.store(kept + row * BLOCKS + place, i, mask=chosen)
    tl.store(kept + row * BLOCKS + i, 0, mask=(i >= count) & inside)
    tl.store(counts + row, count)


@jit
def _rank(score):
    """int64, 0 to 2**32 - 1, in the order of the floats."""
    bits = score.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648


def launch(
    q_means: Tensor,
    k_means: Tensor,
    mass: float,
    least: int,
    most: int,
    forced: Tensor | None,
    whole: Tensor | None,
    q_alike: Tensor | None,
    k_alike: Tensor | None,
    alike: float,
) -> tuple[Tensor, Tensor]:
    scores = torch.matmul(q_means, k_means.mT)
    rows, blocks = scores.shape[2:]
    kept = torch.empty(scores.shape, dtype=torch.int32, device=scores.device)
    counts = torch.empty(scores.shape[:3], dtype=torch.int32, device=scores.device)
    masks = (None if m is None else m.to(torch.int8) for m in (forced, whole))
    guards = (None if g is None else g.contiguous() for g in (q_alike, k_alike))
    _choose_by_mass[(counts.numel(),)](
        scores,
        *masks,
        *guards,
        kept,
        counts,
        mass,
        least,
        most,
        alike,
        q_means.shape[3] ** -0.5,
        blocks,
        rows,
        FORCED=forced is not None,
        WHOLE=whole is not None,
        GUARD=q_alike is not None,
        BP=triton.next_power_of_2(blocks),
    )
    return kept, counts


def _fake(q_means: Tensor, k_means: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    counts = q_means.new_empty(q_means.shape[:3], dtype=torch.int32)
    return counts.new_empty(*counts.shape, k_means.shape[2]), counts


# The reference is the fast version for a CPU as well: what it does is small beside the attention.
_op = Op("blocks_by_mass", reference, _fake, cuda={"Triton": launch})
