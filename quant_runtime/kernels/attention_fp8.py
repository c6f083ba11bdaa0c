"""Attention of whole numbers over the key blocks that each block of queries keeps: Q K^T in int8, P V in FP8.

q       int8 [B, H, N, D]          q_scale  float32 [B, H, N]
k       int8 [B, H, P, D]          k_scale  float32 [B, H, P / block_k]
v       float8_e4m3fn [B, H, D, P], its keys in the order of `slots`          v_scale  float32 [B, H, D]
kept    int32 [B, H, ceil(N / block_q), L], counts  int32 [B, H, ceil(N / block_q)]: as attention_blocks takes them
keys    how many of the P keys there are; P is the next multiple of block_k, and what lies beyond `keys` is zeros
tokens  int32 [B, H, N], each token of a head once, perhaps expanded, or None: which token lies at place n of q, k, v
        and the lists. Without it, place n is token n
out     bfloat16, float16 or float32 [B, H, N, D], laid out in memory as [B, N, H, D], its rows by tokens:
        out[b, h, tokens[b, h, n]] is the answer to query n
residual        None, or what is added to the answer before it is rounded: [B, H, N, D] laid out as `out` is, in
                float32, bfloat16 or float16, or int8 with residual_scale float32 [B, H, N]

attention_fp8_refresh takes lists of all key blocks, first those that are kept, `counts` of them, then the others, both
ascending. It answers in one pass what is lost by keeping only the first: (dense, lost), both as `out`, where lost =
dense - sparse, formed in float32 and zeros where nothing is left out. Of sparse answers it may have twice the bits of
out's dtype alone; in float16 it has none of those that float16 does not reach.

attention_fp8_lse answers (out, lse), lse float32 [B, H, N] by tokens: the logarithm of the sum of exp(scores) over the
kept keys, by hand of these in e4m3 as they weight the values, -inf of none, by which answers over keys in several
places become one (`merged`). pack_heads takes a centre
away from keys: scores of parts that are to be merged are of keys without the same centre.

pack_heads makes the operands. scores = softmax_scale * q @ k.T, exact sums times both scales; softmax over the kept
keys in float32; P in e4m3, as 256 times itself; sums over a block of keys in the matrix unit, over blocks in float32. D
is a multiple of 32 up to 128, block_q is 64 or 128, block_k is 32, 64 or 128.

On a Hopper, heads of 64 and 128 in blocks of 128 run by attention_fp8_sm90, which is written by hand; all else by
Triton. What makes both fast there: keys and values come through the copy engine; V lies transposed, since FP8 wants its
second operand so; its keys lie in the order in which the first product leaves its columns in registers, so that P is
used where it is. In Triton's sums start at the bits of 1.5 * 2**23, so that they are floats without being converted.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quant_runtime.kernels import _cuda, attention_blocks, attention_fp8_sm90
from quant_runtime.kernels._cpu import product_name
from quant_runtime.kernels._triton import TensorDescriptor, jit, tl, triton
from quant_runtime.kernels._versions import Op
from quant_runtime.kernels.attention_blocks import Lists

BLOCKS_Q = (64, 128)
BLOCKS_K = (32, 64, 128)
LARGEST_D = 128
GROUP = 32  # keys that are reordered among themselves
P_BITS = 8  # P, at most 1, is written as P * 2**8: its small values keep their bits, and 256 is below the top
LOG2E = math.log2(math.e)
HOPPER = "CUDA for sm_90a, Triton for other heads than 64 and 128"  # and for other blocks than 128: no plan has them


class Operands(NamedTuple):
    """What every version is given first, in this order: as above, and the answer's dtype and the scale of scores."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_scale: Tensor
    k_scale: Tensor
    v_scale: Tensor
    kept: Tensor
    counts: Tensor
    keys: int
    block_q: int
    block_k: int
    out_dtype: torch.dtype
    softmax_scale: float

    def lists(self) -> Lists:
        """What attention_blocks takes behind q, k and v."""
        sizes = (self.block_q, self.block_k)
        return Lists(self.kept, self.counts, *sizes, self.q_scale, self.k_scale, self.softmax_scale)


def attention_fp8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    kept: Tensor,
    counts: Tensor,
    keys: int,
    block_q: int = 128,
    block_k: int = 128,
    out_dtype: torch.dtype = torch.bfloat16,
    softmax_scale: float | None = None,
    tokens: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
) -> Tensor:
    _check(q, k, v, q_scale, k_scale, v_scale, kept, counts, keys, block_q, block_k, out_dtype, tokens)
    _check_residual(q, residual, residual_scale)
    scale = softmax_scale if softmax_scale is not None else q.shape[3] ** -0.5
    operands = (q, k, v, q_scale, k_scale, v_scale, kept, counts, keys, block_q, block_k, out_dtype, scale)
    out: Tensor = _op(*operands, residual, residual_scale, tokens)
    return out


def attention_fp8_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    kept: Tensor,
    counts: Tensor,
    keys: int,
    block_q: int = 128,
    block_k: int = 128,
    out_dtype: torch.dtype = torch.bfloat16,
    softmax_scale: float | None = None,
    tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, q_scale, k_scale, v_scale, kept, counts, keys, block_q, block_k, out_dtype, tokens)
    scale = softmax_scale if softmax_scale is not None else q.shape[3] ** -0.5
    operands = (q, k, v, q_scale, k_scale, v_scale, kept, counts, keys, block_q, block_k, out_dtype, scale)
    out, lse = _lse_op(*operands, tokens)
    return out, lse


def merged(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(out, lse) over all keys, of attention_fp8_lse over some and over others: of each key once, in any order.

    Formed in float32; zeros and -inf where no part has seen a key.
    """
    lse = torch.stack([one for _, one in parts])
    whole = torch.logsumexp(lse, dim=0)
    weights = torch.where(whole.isneginf(), 0.0, (lse - whole).exp())
    out = sum(weight[..., None] * answer.float() for weight, (answer, _) in zip(weights, parts, strict=True))
    assert isinstance(out, Tensor)
    return out.to(parts[0][0].dtype), whole


def attention_fp8_refresh(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    kept: Tensor,
    counts: Tensor,
    keys: int,
    block_q: int = 128,
    block_k: int = 128,
    out_dtype: torch.dtype = torch.bfloat16,
    softmax_scale: float | None = None,
    tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, q_scale, k_scale, v_scale, kept, counts, keys, block_q, block_k, out_dtype, tokens)
    if kept.shape[3] != -(-keys // block_k):
        found = f"lists of {kept.shape[3]}"
        raise ValueError(f"attention_fp8_refresh takes lists of all {-(-keys // block_k)} blocks of keys; got {found}")
    scale = softmax_scale if softmax_scale is not None else q.shape[3] ** -0.5
    operands = (q, k, v, q_scale, k_scale, v_scale, kept, counts, keys, block_q, block_k, out_dtype, scale)
    dense, lost = _refresh_op(*operands, tokens)
    return dense, lost


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    kept: Tensor,
    counts: Tensor,
    keys: int,
    block_q: int,
    block_k: int,
    out_dtype: torch.dtype,
    tokens: Tensor | None,
) -> None:
    batch, heads, count, size = q.shape
    if block_q not in BLOCKS_Q or block_k not in BLOCKS_K or not takes(size):
        found = f"block_q={block_q}, block_k={block_k}, D={size}"
        raise ValueError(
            f"attention_fp8 has block_q 64 or 128, block_k 32 to 128, D a multiple of 32 to {LARGEST_D}; {found}"
        )
    padded = -(-keys // block_k) * block_k
    rows = -(-count // block_q)
    for name, tensor, dtype, shape in (
        ("q", q, torch.int8, (batch, heads, count, size)),
        ("k", k, torch.int8, (batch, heads, padded, size)),
        ("v", v, torch.float8_e4m3fn, (batch, heads, size, padded)),
        ("q_scale", q_scale, torch.float32, (batch, heads, count)),
        ("k_scale", k_scale, torch.float32, (batch, heads, padded // block_k)),
        ("v_scale", v_scale, torch.float32, (batch, heads, size)),
        ("kept", kept, torch.int32, (batch, heads, rows, kept.shape[-1])),
        ("counts", counts, torch.int32, (batch, heads, rows)),
        ("tokens", tokens, torch.int32, (batch, heads, count)),
    ):
        if tensor is not None and (tensor.dtype != dtype or tensor.shape != shape):
            found = f"{tensor.dtype} {list(tensor.shape)}"
            raise ValueError(f"attention_fp8 takes {name} as {dtype} {list(shape)}; got {found}")
    if out_dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"attention_fp8 answers in bfloat16, float16 or float32; got out_dtype={out_dtype}")


def _check_residual(q: Tensor, residual: Tensor | None, residual_scale: Tensor | None) -> None:
    whole = residual is not None and residual.dtype == torch.int8
    floats = (torch.float32, torch.bfloat16, torch.float16)
    if whole != (residual_scale is not None):
        found = "none" if residual is None else residual.dtype
        raise ValueError(f"attention_fp8 takes residual_scale with an int8 residual, and only then; it is {found}")
    if residual is not None and (residual.shape != q.shape or not (whole or residual.dtype in floats)):
        found = f"{residual.dtype} {list(residual.shape)}"
        wanted = f"int8, float32, bfloat16 or float16 {list(q.shape)}"
        raise ValueError(f"attention_fp8 takes residual as {wanted}; got {found}")
    if residual_scale is not None and (residual_scale.shape, residual_scale.dtype) != (q.shape[:3], torch.float32):
        found = f"{residual_scale.dtype} {list(residual_scale.shape)}"
        raise ValueError(f"attention_fp8 takes residual_scale as float32 {list(q.shape[:3])}; got {found}")


def takes(size: int) -> bool:
    """Whether there is a kernel for heads of this size."""
    return size % 32 == 0 and 32 <= size <= LARGEST_D


def slots(keys: int) -> Tensor:
    """int64 [keys]: which key lies in each slot of v, for a multiple of 32.

    The int8 product leaves columns 8g + 2t and 8g + 2t + 1 with thread t of four; the FP8 product wants its inputs
    4t to 4t + 3 there. So of every 16 keys, slots 4t .. 4t + 3 hold keys 2t, 2t + 1, 8 + 2t, 8 + 2t + 1.
    """
    order = torch.arange(GROUP).view(2, 2, 4, 2).transpose(1, 2).flatten()
    return (torch.arange(0, keys, GROUP)[:, None] + order).flatten()


def unpacked_values(v: Tensor, v_scale: Tensor, keys: int) -> Tensor:
    """float32 [B, H, keys, D]: what v and v_scale stand for."""
    return (v.float()[..., _slot_of(v.shape[3], v.device)[:keys]] * v_scale[..., None]).mT


@functools.lru_cache(maxsize=32)
def _slot_of(keys: int, device: torch.device) -> Tensor:
    """int64 [keys]: in which slot each key lies."""
    return slots(keys).argsort().to(device)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    kept: Tensor,
    counts: Tensor,
    keys: int,
    block_q: int,
    block_k: int,
    out_dtype: torch.dtype,
    softmax_scale: float,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    tokens: Tensor | None = None,
) -> Tensor:
    """P is not rounded here: its rounding is the kernel's error."""
    values = unpacked_values(v, v_scale, keys)
    lists = Lists(kept, counts, block_q, block_k, q_scale, k_scale, softmax_scale)
    out = by_tokens(attention_blocks.reference(q, k[:, :, :keys], values, *lists), tokens)
    return (out if residual is None else out + unpacked_residual(residual, residual_scale)).to(out_dtype)


def refresh_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    kept: Tensor,
    counts: Tensor,
    keys: int,
    block_q: int,
    block_k: int,
    out_dtype: torch.dtype,
    softmax_scale: float,
    tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    its = Operands(q, k, v, q_scale, k_scale, v_scale, kept, counts, keys, block_q, block_k, out_dtype, softmax_scale)
    return _both(attention_blocks.reference, its, tokens)


def lse_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    kept: Tensor,
    counts: Tensor,
    keys: int,
    block_q: int,
    block_k: int,
    out_dtype: torch.dtype,
    softmax_scale: float,
    tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    lists = Lists(kept, counts, block_q, block_k, q_scale, k_scale, softmax_scale)
    lse = attention_blocks.lse_reference(q, k[:, :, :keys], lists).float()
    out = reference(q, k, v, q_scale, k_scale, v_scale, kept, counts, keys, block_q, block_k, out_dtype, softmax_scale,
                    None, None, tokens)  # fmt: skip
    return out, by_tokens(lse[..., None], tokens)[..., 0]


def by_tokens(x: Tensor, tokens: Tensor | None) -> Tensor:
    """x [B, H, N, D], whose rows lie in the order of `tokens`, with each where its token is: in x's layout."""
    if tokens is None:
        return x
    if tokens.stride()[:2] == (0, 0):  # one order for all heads
        return torch.empty_like(x).index_copy_(2, tokens[0, 0].long(), x)
    return torch.empty_like(x).scatter_(2, tokens.long()[..., None].expand_as(x), x)


def unpacked_residual(residual: Tensor, scale: Tensor | None) -> Tensor:
    """float32, in the same place: what both stand for."""
    return residual.float() if scale is None else residual * scale[..., None]


def _told(
    given: tuple[Any, ...], residual: bool = True
) -> tuple[Operands, Tensor | None, Tensor | None, Tensor | None]:
    """(operands, residual, residual_scale, tokens) of what an op was given; `residual` says whether it takes one."""
    count = len(Operands._fields)
    more = given[count:] if residual else (None, None, *given[count:])
    added, scale, tokens = (*more, None)[:3]
    return Operands(*given[:count]), added, scale, tokens


def in_parts(*given: Any) -> Tensor:
    its, residual, residual_scale, tokens = _told(given)
    values = unpacked_values(its.v, its.v_scale, its.keys)
    out = by_tokens(attention_blocks.in_parts(its.q, its.k[:, :, : its.keys], values, *its.lists()), tokens)
    return (out if residual is None else out + unpacked_residual(residual, residual_scale)).to(its.out_dtype)


def lse_in_parts(*given: Any) -> tuple[Tensor, Tensor]:
    its, _, _, tokens = _told(given, residual=False)
    lse = attention_blocks.lse_in_parts(its.q, its.k[:, :, : its.keys], its.lists())
    return in_parts(*its, None, None, tokens), by_tokens(lse[..., None], tokens)[..., 0]


def refresh_in_parts(*given: Any) -> tuple[Tensor, Tensor]:
    its, _, _, tokens = _told(given, residual=False)
    return _both(attention_blocks.in_parts, its, tokens)


def on_cpu(*given: Any) -> Tensor:
    its, residual, residual_scale, tokens = _told(given)
    values = unpacked_values(its.v, its.v_scale, its.keys).to(its.out_dtype if residual is None else torch.float32)
    out = by_tokens(attention_blocks.on_cpu(its.q, its.k[:, :, : its.keys], values, *its.lists()), tokens)
    return out if residual is None else out.add_(unpacked_residual(residual, residual_scale)).to(its.out_dtype)


def refresh_on_cpu(*given: Any) -> tuple[Tensor, Tensor]:
    its, _, _, tokens = _told(given, residual=False)
    return _both(attention_blocks.on_cpu, its, tokens)


def _both(attention: Callable[..., Tensor], its: Operands, tokens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Dense, and what it is more than the first `counts` of each list, by a version of attention_blocks."""
    kept, counts = its.kept, its.counts
    operands = (its.q, its.k[:, :, : its.keys], unpacked_values(its.v, its.v_scale, its.keys))
    every = torch.arange(kept.shape[3], dtype=torch.int32, device=kept.device).expand(kept.shape)
    all_of_them = its._replace(kept=every, counts=torch.full_like(counts, kept.shape[3]))
    dense = attention(*operands, *all_of_them.lists())
    lost = dense - attention(*operands, *its.lists())
    whole = (counts == kept.shape[3]).repeat_interleave(its.block_q, dim=2)[:, :, : its.q.shape[2], None]
    lost.masked_fill_(whole, 0.0)
    return by_tokens(dense.to(its.out_dtype), tokens), by_tokens(lost.to(its.out_dtype), tokens)


@jit
def _attention_fp8(
    q,
    k,
    v,
    q_scale,
    k_scale,
    v_scale,
    kept,
    counts,
    tokens,
    out,
    lost,
    lse,
    residual,
    residual_scale,
    H,
    N,
    M,
    P,
    softmax_scale,
    list_b,
    list_h,
    list_r,
    count_b,
    count_h,
    count_r,
    tokens_b,
    tokens_h,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    SHARE: tl.constexpr,
    P_BITS: tl.constexpr,
    REFRESH: tl.constexpr,
    ADDS: tl.constexpr,
    TOKENS: tl.constexpr,
    LSE: tl.constexpr,
):
    """k and v are descriptors of [B * H * P, D] and [B * H * D, P]. SHARE: how many programs follow one list.

    REFRESH goes on to the blocks that are not kept, and writes `lost`. ADDS: 0 for no residual, 1 for one of floats, 2
    for one in int8. LSE writes `lse`.
    """
    program, head = tl.program_id(0), tl.program_id(1)
    b, h = head // H, head % H
    n, d = program * BQ + tl.arange(0, BQ), tl.arange(0, DP)
    in_d = (d < D)[None, :]
    queries = q + (head.to(tl.int64) * N + n)[:, None] * D + d[None, :]
    mine = tl.load(queries, mask=(n < N)[:, None] & in_d, other=0)
    row_scale = tl.load(q_scale + head.to(tl.int64) * N + n, mask=n < N, other=1.0) * softmax_scale

    row, b64, h64 = (program // SHARE).to(tl.int64), b.to(tl.int64), h.to(tl.int64)
    list_ = kept + b64 * list_b + h64 * list_h + row * list_r
    count = tl.load(counts + b64 * count_b + h64 * count_h + row * count_r)
    scales = k_scale + head * (P // BK)
    last = tl.load(list_ + count - 1, mask=count > 0, other=0)
    ragged = tl.where((count > 0) & ((last + 1) * BK > M), 1, 0)  # the block that the keys end in, if it is kept

    most, total = tl.full((BQ,), float("-inf"), tl.float32), tl.zeros((BQ,), tl.float32)
    found = tl.zeros((BQ, DP), tl.float32)
    for index in tl.range(0, count - ragged):
        j = tl.load(list_ + index)
        most, total, found = _visit(
            mine, k, v, scales, row_scale, j, head, P, M, most, total, found, False, BQ, BK, D, P_BITS
        )
    if ragged > 0:
        most, total, found = _visit(
            mine, k, v, scales, row_scale, last, head, P, M, most, total, found, True, BQ, BK, D, P_BITS
        )

    v_scales = tl.load(v_scale + head * D + d, mask=d < D, other=0.0)[None, :]
    who = n  # the token at each place
    if TOKENS:
        who = tl.load(tokens + b64 * tokens_b + h64 * tokens_h + n, mask=n < N, other=0)
    where = ((b64 * N + who)[:, None] * H + h) * D + d[None, :]
    inside = (n < N)[:, None] & in_d
    if LSE:  # weights are 2**P_BITS too large, and of none there is none
        mass = (tl.math.log2(tl.where(count > 0, total, 1.0)) + most - P_BITS) / 1.4426950408889634  # of none -inf
        tl.store(lse + head.to(tl.int64) * N + who, mass, mask=n < N)
    if REFRESH:
        # The sparse answer waits in the two answers' own memory, as two 16-bit halves of itself: registers are full.
        sparse = found * v_scales / tl.where(count > 0, total, 1.0)[:, None]
        upper = sparse.to(out.dtype.element_ty)
        tl.store(lost + where, upper, mask=inside)
        tl.store(out + where, (sparse - upper.to(tl.float32)).to(out.dtype.element_ty), mask=inside)
        blocks = P // BK
        left = tl.where((ragged == 0) & (count < blocks) & (P > M), 1, 0)  # the keys' last block, if it was not kept
        for index in tl.range(count, blocks - left):
            j = tl.load(list_ + index)
            most, total, found = _visit(
                mine, k, v, scales, row_scale, j, head, P, M, most, total, found, False, BQ, BK, D, P_BITS
            )
        if left > 0:
            most, total, found = _visit(
                mine, k, v, scales, row_scale, blocks - 1, head, P, M, most, total, found, True, BQ, BK, D, P_BITS
            )
        found = found * v_scales / total[:, None]
        tl.debug_barrier()  # another thread may read what this one has written
        sparse = tl.load(lost + where, mask=inside, other=0.0).to(tl.float32)
        sparse += tl.load(out + where, mask=inside, other=0.0).to(tl.float32)
        tl.debug_barrier()
        gone = tl.where(count < blocks, found - sparse, 0.0)
        tl.store(lost + where, gone.to(out.dtype.element_ty), mask=inside)
    else:
        found *= v_scales
        found /= tl.where(count > 0, total, 1.0)[:, None]
    if ADDS > 0:
        more = tl.load(residual + where, mask=inside, other=0).to(tl.float32)
        if ADDS > 1:
            more *= tl.load(residual_scale + head.to(tl.int64) * N + who, mask=n < N, other=0.0)[:, None]
        found += more
    tl.store(out + where, found.to(out.dtype.element_ty), mask=inside)


@jit
def _visit(
    mine,
    k,
    v,
    scales,
    row_scale,
    j,
    head,
    P,
    M,
    most,
    total,
    found,
    RAGGED: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    D: tl.constexpr,
    P_BITS: tl.constexpr,
):
    """One block of keys. 0x4B400000 are the bits of 12582912.0 = 1.5 * 2**23: whole numbers below 2**22 that are added
    to them are added to that float.
    """
    keys = tl.trans(k.load([head * P + j * BK, 0]))
    sums = tl.dot(mine, keys, tl.full((BQ, BK), 0x4B400000, tl.int32), out_dtype=tl.int32)
    real = sums.to(tl.float32, bitcast=True)  # the sums, 12582912 too large
    if RAGGED:
        real = tl.where((j * BK + tl.arange(0, BK) < M)[None, :], real, float("-inf"))
    scale = row_scale * tl.load(scales + j)
    if RAGGED:
        scale = tl.where(scale < 1e-37, 1e-37, scale)  # of zeros it may be zero, and what is masked must stay far below
    higher = tl.maximum(most, (tl.max(real, axis=1) - 12582912.0) * scale)
    weights = tl.exp2(real * scale[:, None] - (higher + 12582912.0 * scale - P_BITS)[:, None])
    fade = tl.exp2(most - higher)
    total = total * fade + tl.sum(weights, axis=1)

    values = tl.trans(v.load([head * D, j * BK]))
    short = weights.to(tl.float8e4nv)
    in_slots = tl.permute(tl.reshape(short, (BQ, BK // 32, 2, 2, 4, 2)), (0, 1, 2, 4, 3, 5))
    found = found * fade[:, None] + tl.dot(tl.reshape(in_slots, (BQ, BK)), values, out_dtype=tl.float32)
    return higher, total, found


def launch(*given: Any) -> Tensor:
    its, residual, residual_scale, tokens = _told(given)
    out = _answer(its.q, its.out_dtype)
    _launch(its, out, tokens, residual=residual, residual_scale=residual_scale)
    return out


def lse_launch(*given: Any) -> tuple[Tensor, Tensor]:
    its, _, _, tokens = _told(given, residual=False)
    out, lse = _answer(its.q, its.out_dtype), _sums(its.q)
    _launch(its, out, tokens, lse=lse)
    return out, lse


def launch_hopper(*given: Any) -> Tensor:
    """On a Hopper: by hand where that takes the shapes, else by Triton."""
    its, residual, residual_scale, tokens = _told(given)
    if not attention_fp8_sm90.takes(its.q, its.block_q, its.block_k):
        return launch(*given)
    return attention_fp8_sm90.launch(*its[:9], its.out_dtype, its.softmax_scale, residual, residual_scale, tokens)


def lse_launch_hopper(*given: Any) -> tuple[Tensor, Tensor]:
    its, _, _, tokens = _told(given, residual=False)
    if not attention_fp8_sm90.takes(its.q, its.block_q, its.block_k):
        return lse_launch(*given)
    lse = _sums(its.q)
    return attention_fp8_sm90.launch(*its[:9], its.out_dtype, its.softmax_scale, None, None, tokens, lse=lse), lse


def refresh_launch_hopper(*given: Any) -> tuple[Tensor, Tensor]:
    its, _, _, tokens = _told(given, residual=False)
    if not attention_fp8_sm90.takes(its.q, its.block_q, its.block_k):
        return refresh_launch(*given)
    lost = _answer(its.q, its.out_dtype)
    return attention_fp8_sm90.launch(*its[:9], its.out_dtype, its.softmax_scale, None, None, tokens, lost=lost), lost


def refresh_launch(*given: Any) -> tuple[Tensor, Tensor]:
    its, _, _, tokens = _told(given, residual=False)
    dense, lost = _answer(its.q, its.out_dtype), _answer(its.q, its.out_dtype)
    _launch(its, dense, tokens, lost=lost)
    return dense, lost


def _launch(
    its: Operands,
    out: Tensor,
    tokens: Tensor | None,
    *,
    lost: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    lse: Tensor | None = None,
) -> None:
    q, k, v, q_scale, k_scale, v_scale, kept, counts, keys, block_q, block_k, _, softmax_scale = its
    batch, heads, count, size = q.shape
    padded, tile = k.shape[2], 64
    q, k, v, q_scale, k_scale, v_scale = (t.contiguous() for t in (q, k, v, q_scale, k_scale, v_scale))
    kept = kept if kept.stride(3) == 1 else kept.contiguous()
    tokens = tokens if tokens is None or tokens.stride(2) == 1 else tokens.contiguous()
    wide = triton.next_power_of_2(size)
    described_k = TensorDescriptor.from_tensor(k.view(-1, size), [block_k, wide])
    described_v = TensorDescriptor.from_tensor(v.view(-1, padded), [wide, block_k])
    _attention_fp8[(triton.cdiv(count, tile), batch * heads)](
        q,
        described_k,
        described_v,
        q_scale,
        k_scale,
        v_scale,
        kept,
        counts,
        tokens,
        out,
        lost,
        lse,
        None if residual is None else residual.transpose(1, 2).contiguous(),  # a copy where it is laid out otherwise
        None if residual_scale is None else residual_scale.contiguous(),
        heads,
        count,
        keys,
        padded,
        softmax_scale * LOG2E,
        *kept.stride()[:3],
        *counts.stride(),
        *((0, 0) if tokens is None else tokens.stride()[:2]),
        BQ=tile,
        BK=block_k,
        D=size,
        DP=wide,
        SHARE=block_q // tile,
        P_BITS=P_BITS,
        REFRESH=lost is not None,
        ADDS=0 if residual is None else 1 if residual_scale is None else 2,
        TOKENS=tokens is not None,
        LSE=lse is not None,
        num_warps=4,
        num_stages=2,
    )


def _sums(q: Tensor) -> Tensor:
    return torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


def _answer(q: Tensor, dtype: torch.dtype) -> Tensor:
    batch, heads, count, size = q.shape
    return torch.empty(batch, count, heads, size, dtype=dtype, device=q.device).transpose(1, 2)


def _fake(q: Tensor, *args: object) -> Tensor:
    dtype = args[10]
    assert isinstance(dtype, torch.dtype)
    return _answer(q, dtype)


def _fake_refresh(q: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    return _fake(q, *args), _fake(q, *args)


def _fake_lse(q: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    return _fake(q, *args), q.new_empty(q.shape[:3], dtype=torch.float32)


_op = Op(
    "attention_fp8",
    reference,
    _fake,
    cpu={product_name: on_cpu},
    cuda={HOPPER: launch_hopper, "Triton": launch},
    on={HOPPER: _cuda.is_hopper},
    plain=in_parts,
)
_refresh_op = Op(
    "attention_fp8_refresh",
    refresh_reference,
    _fake_refresh,
    cpu={product_name: refresh_on_cpu},
    cuda={HOPPER: refresh_launch_hopper, "Triton": refresh_launch},
    on={HOPPER: _cuda.is_hopper},
    plain=refresh_in_parts,
)
_lse_op = Op(
    "attention_fp8_lse",
    lse_reference,
    _fake_lse,
    cpu={"in parts": lse_in_parts},
    cuda={HOPPER: lse_launch_hopper, "Triton": lse_launch},
    on={HOPPER: _cuda.is_hopper},
    plain=lse_in_parts,
)
