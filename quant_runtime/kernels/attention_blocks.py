"""Attention over kept blocks: each block of queries sees only the blocks of keys on its list.

q  [B, H, N, D], k  [B, H, M, D], v  [B, H, M, D]: float32, bfloat16 or float16, or q and k as int8 with their scales
kept   int32 [B, H, ceil(N / block_q), L]: numbers of key blocks, ascending; the first counts[...] of each list are read
counts int32 [B, H, ceil(N / block_q)]: a row of blocks with count 0 answers zero
q_scale  float32 [B, H, N] or [B, H, ceil(N / block_q)], k_scale  float32 [B, H, M] or [B, H, ceil(M / block_k)]: one a
         token or one a block, as quantize_heads finds them; both None for float q and k
out  v's dtype, [B, H, N, D], laid out in memory as [B, N, H, D]: heads merge without a copy

scores = softmax_scale * q @ k.T (int8: exact sums, times both scales), softmax over the kept keys in float32, then
times v in v's dtype with float32 sums. softmax_scale is 1 / sqrt(D) unless given. With all blocks kept it is dense
attention. The last block may be ragged. block_q and block_k are powers of two, 16 to 128.

On a Hopper, heads of 64 or 128 in blocks of 128, all of it in bfloat16 or all in float16, run by
attention_blocks_sm90, which is written by hand; all else by Triton.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from quant_runtime.kernels import _cuda, attention_blocks_sm90
from quant_runtime.kernels._cpu import operand_dtype, product_name, products, scratch
from quant_runtime.kernels._triton import jit, tl, triton
from quant_runtime.kernels._versions import PART_ELEMENTS, Op

BLOCKS = (16, 32, 64, 128)
LARGEST_D = 256
LOG2E = math.log2(math.e)
HOPPER = "CUDA for sm_90a, Triton for int8 and for blocks other than 128"  # and for heads that few have
SCORES_AT_ONCE = 1 << 20  # on a CPU: fewer leave it too little to do at a time, more leave the cache between passes


class Lists(NamedTuple):
    """What every version is given behind q, k and v, in this order."""

    kept: Tensor
    counts: Tensor
    block_q: int
    block_k: int
    q_scale: Tensor | None
    k_scale: Tensor | None
    softmax_scale: float


def attention_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    counts: Tensor,
    block_q: int = 64,
    block_k: int = 64,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    softmax_scale: float | None = None,
) -> Tensor:
    _check_operands(q, k, v, q_scale, k_scale, block_q, block_k)
    rows = (*q.shape[:2], -(-q.shape[2] // block_q))
    if kept.dim() != 4 or kept.shape[:3] != rows or counts.shape != rows:
        found = f"{list(kept.shape)} and {list(counts.shape)}"
        raise ValueError(f"attention_blocks takes kept {[*rows, 'L']} and counts {list(rows)}; got {found}")
    if kept.dtype != torch.int32 or counts.dtype != torch.int32:
        raise ValueError(f"attention_blocks takes kept and counts as int32; got {kept.dtype} and {counts.dtype}")
    scale = softmax_scale if softmax_scale is not None else q.shape[3] ** -0.5
    out: Tensor = _op(q, k, v, kept, counts, block_q, block_k, q_scale, k_scale, scale)
    return out


def _check_operands(
    q: Tensor, k: Tensor, v: Tensor, q_scale: Tensor | None, k_scale: Tensor | None, block_q: int, block_k: int
) -> None:
    shapes = [list(t.shape) for t in (q, k, v)]
    if q.dim() != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"attention_blocks takes q [B, H, N, D], k and v [B, H, M, D]; got {shapes}")
    if block_q not in BLOCKS or block_k not in BLOCKS or q.shape[3] > LARGEST_D:
        sizes = f"block_q={block_q}, block_k={block_k}, D={q.shape[3]}"
        raise ValueError(f"attention_blocks has blocks of 16, 32, 64 or 128 and D up to {LARGEST_D}; got {sizes}")
    quantized = q.dtype == torch.int8
    if not v.is_floating_point() or q.dtype != k.dtype or not (quantized or q.is_floating_point()):
        found = f"{q.dtype}, {k.dtype}, {v.dtype}"
        raise ValueError(f"attention_blocks takes q and k both float or both int8, and v float; got {found}")
    if quantized != (q_scale is not None) or quantized != (k_scale is not None):
        raise ValueError(f"attention_blocks takes q_scale and k_scale with int8 q and k, and only then; q is {q.dtype}")
    for name, scale, of, block in (("q_scale", q_scale, q, block_q), ("k_scale", k_scale, k, block_k)):
        shapes = [[*of.shape[:2], of.shape[2]], [*of.shape[:2], -(-of.shape[2] // block)]]
        if scale is not None and (list(scale.shape) not in shapes or scale.dtype != torch.float32):
            raise ValueError(f"{name} is float32 {shapes[0]} or {shapes[1]}; got {scale.dtype} {list(scale.shape)}")


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    counts: Tensor,
    block_q: int,
    block_k: int,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    softmax_scale: float,
) -> Tensor:
    scores = _kept_scores(q, k, Lists(kept, counts, block_q, block_k, q_scale, k_scale, softmax_scale))
    unseen = scores.isneginf()
    return _answer(q, v).copy_(scores.softmax(dim=-1).masked_fill(unseen, 0.0) @ v.double())


def lse_reference(q: Tensor, k: Tensor, its: Lists) -> Tensor:
    """float64 [B, H, N]: the logarithm of the sum of exp(scores) over the kept keys; -inf of none."""
    return _kept_scores(q, k, its).logsumexp(dim=-1)


def _kept_scores(q: Tensor, k: Tensor, its: Lists) -> Tensor:
    """float64 [B, H, N, M], -inf of keys that are not kept."""
    scores = q.double() @ k.double().mT * its.softmax_scale
    if its.q_scale is not None and its.k_scale is not None:
        scores = scores * _per_token(its.q_scale, q.shape[2], its.block_q)[..., :, None]
        scores = scores * _per_token(its.k_scale, k.shape[2], its.block_k)[..., None, :]
    seen = key_mask(its.kept, its.counts, -(-k.shape[2] // its.block_k))
    seen = seen.repeat_interleave(its.block_q, dim=2)[:, :, : q.shape[2]]
    seen = seen.repeat_interleave(its.block_k, dim=3)[..., : k.shape[2]]
    return scores.masked_fill(~seen, -math.inf)


def key_mask(kept: Tensor, counts: Tensor, blocks: int) -> Tensor:
    """The lists as a mask: bool [B, H, rows, blocks], true where a row of blocks sees a key block."""
    listed = torch.arange(kept.shape[3], device=kept.device) < counts[..., None]
    mask = torch.zeros(*kept.shape[:3], blocks + 1, dtype=torch.bool, device=kept.device)
    return mask.scatter_(3, torch.where(listed, kept, blocks).long(), True)[..., :blocks]


def _per_token(scale: Tensor, tokens: int, block: int) -> Tensor:
    return scale if scale.shape[2] == tokens else scale.repeat_interleave(block, dim=2)[:, :, :tokens]


def _answer(q: Tensor, v: Tensor) -> Tensor:
    batch, heads, tokens, size = q.shape
    return torch.empty(batch, tokens, heads, size, dtype=v.dtype, device=v.device).transpose(1, 2)


def in_parts(q: Tensor, k: Tensor, v: Tensor, *given: Any) -> Tensor:
    """Plain torch in float32, where the reference's scores would not fit: a few rows of blocks of a head at a time."""
    out = _answer(q, v)
    for b, h, rows, scores in _parts(q, k, Lists(*given)):
        unseen = scores.isneginf()
        shares = scores.softmax(dim=1).masked_fill_(unseen, 0.0)
        out[b, h, rows] = (shares @ v[b, h].float()).to(v.dtype)
    return out


def lse_in_parts(q: Tensor, k: Tensor, its: Lists) -> Tensor:
    """float32 [B, H, N]."""
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    for b, h, rows, scores in _parts(q, k, its):
        lse[b, h, rows] = scores.logsumexp(dim=1)
    return lse


def _parts(q: Tensor, k: Tensor, its: Lists) -> Iterator[tuple[int, int, slice, Tensor]]:
    """Some rows of a head at a time: where they are, and their scores float32, -inf of keys that are not kept."""
    (batch, heads, tokens, _), keys = q.shape, k.shape[2]
    kept, counts, block_q, block_k, q_scale, k_scale, softmax_scale = its
    row_scale = torch.full((batch, heads, tokens), softmax_scale, dtype=torch.float32, device=q.device)
    if q_scale is not None:
        row_scale *= _per_token(q_scale, tokens, block_q)
    key_scale = None if k_scale is None else _per_token(k_scale, keys, block_k)
    rows_at_once = max(1, PART_ELEMENTS // (block_q * keys))
    for b in range(batch):
        for h in range(heads):
            real_k = k[b, h].float()
            for row in range(0, kept.shape[2], rows_at_once):
                rows = slice(row, row + rows_at_once)
                mine = slice(row * block_q, min((row + rows_at_once) * block_q, tokens))
                scores = q[b, h, mine].float() @ real_k.T  # of int8: exact, D is small
                if key_scale is not None:
                    scores *= key_scale[b, h]
                scores *= row_scale[b, h, mine, None]
                seen = key_mask(
                    kept[b : b + 1, h : h + 1, rows], counts[b : b + 1, h : h + 1, rows], -(-keys // block_k)
                )
                seen = seen[0, 0].repeat_interleave(block_q, dim=0)[: len(scores)]
                unseen = ~seen.repeat_interleave(block_k, dim=1)[:, :keys]
                yield b, h, mine, scores.masked_fill_(unseen, -math.inf)


def on_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    counts: Tensor,
    block_q: int,
    block_k: int,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    softmax_scale: float,
) -> Tensor:
    (batch, heads, tokens, _), out = q.shape, _answer(q, v)
    every_block = bool((counts == -(-k.shape[2] // block_k)).all())  # lists hold none twice
    if every_block and q_scale is not None and k_scale is not None and operand_dtype() == torch.float32:
        real_q = q * _per_token(q_scale, tokens, block_q)[..., None]
        real_k = k * _per_token(k_scale, k.shape[2], block_k)[..., None]
        return out.copy_(F.scaled_dot_product_attention(real_q, real_k, v.float(), scale=softmax_scale))
    row_scale = torch.full((batch, heads, tokens), softmax_scale * LOG2E)
    if q_scale is not None:
        row_scale *= _per_token(q_scale, tokens, block_q)
    key_scale = None if k_scale is None else _per_token(k_scale, k.shape[2], block_k)
    for b in range(batch):
        for h in range(heads):
            scales = row_scale[b, h, :, None], None if key_scale is None else key_scale[b, h, :, None]
            answer = _one_head(q[b, h], k[b, h], v[b, h], kept[b, h], counts[b, h], block_q, block_k, *scales)
            out[b, h].copy_(answer[:tokens])
    return out


def _one_head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    counts: Tensor,
    block_q: int,
    block_k: int,
    row_scale: Tensor,
    key_scale: Tensor | None,
) -> Tensor:
    """float32 [ceil(N / block_q) * block_q, D], in scratch. Rows of blocks that see equally many keys go together."""
    keys_total, size = k.shape
    operand = operand_dtype() if q.dtype == torch.int8 else torch.float32
    value = torch.bfloat16 if v.dtype == torch.bfloat16 else torch.float32  # float16 has no matmul of its own on a CPU
    queries, row_scales = _blocks(q, block_q, operand, "q"), _blocks(row_scale, block_q, torch.float32, "q_scale")
    seen = [_blocks(k, block_k, operand, "k"), _blocks(v, block_k, value, "v")]
    if key_scale is not None:
        seen.append(_blocks(key_scale, block_k, torch.float32, "k_scale"))
    answer = scratch("answer", (queries.shape[0], block_q, size), torch.float32).zero_()

    for length, rows in _rows_by_length(kept, counts, keys_total, block_k).items():
        for chunk in rows.split(max(1, SCORES_AT_ONCE // (block_q * length))):
            if length == keys_total:  # all keys, in place: one matmul serves all these rows
                groups, shown = 1, [x.view(1, -1, x.shape[2]) for x in seen]
            else:
                groups, lists = len(chunk), kept[chunk, : -(-length // block_k)].flatten()
                shown = [_gather(x, lists, groups, f"seen {number}") for number, x in enumerate(seen)]
            my_keys, my_values, *my_key_scales = (x[:, :length] for x in shown)

            scores = _scores(_gather(queries, chunk, groups, "queries"), my_keys)
            for scale in my_key_scales:
                scores.mul_(scale.mT)
            scores.mul_(_gather(row_scales, chunk, groups, "row scales"))
            scores.sub_(scores.amax(dim=2, keepdim=True)).exp2_()
            total = scores.sum(dim=2, keepdim=True)
            if value != torch.float32:
                scores = scratch("scores", tuple(scores.shape), value).copy_(scores)
            found = torch.bmm(scores, my_values, out=scratch("found", (*scores.shape[:2], size), value))
            answer.index_copy_(0, chunk, (found / total).view(len(chunk), block_q, size))
    return answer.flatten(0, 1)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """q @ k.mT of [G, n, D] and [G, m, D], both int8 or both float32: float32 [G, n, m], in scratch."""
    scores = scratch("scores", (q.shape[0], q.shape[1], k.shape[1]), torch.float32)
    if q.dtype == torch.float32:
        return torch.bmm(q, k.mT, out=scores)  # D <= 256: float32 counts int8 products exactly
    for one, other, into in zip(q.unbind(), k.unbind(), scores.unbind(), strict=True):
        products(one, other, into)
    return scores


def _blocks(x: Tensor, block: int, dtype: torch.dtype, slot: str) -> Tensor:
    """[N, C] as [ceil(N / block), block, C] in scratch, zeros at the end."""
    blocks = scratch(slot, (-(-x.shape[0] // block), block, x.shape[1]), dtype)
    flat = blocks.view(-1, x.shape[1])
    flat[: x.shape[0]].copy_(x)
    flat[x.shape[0] :].zero_()
    return blocks


def _gather(blocks: Tensor, index: Tensor, groups: int, slot: str) -> Tensor:
    """The blocks of `index`, [groups, tokens of a group, C], in scratch."""
    chosen = scratch(slot, (len(index), *blocks.shape[1:]), blocks.dtype)
    return torch.index_select(blocks, 0, index, out=chosen).view(groups, -1, blocks.shape[2])


def _rows_by_length(kept: Tensor, counts: Tensor, keys: int, block_k: int) -> dict[int, Tensor]:
    """How many keys a row of blocks sees → the rows that see so many. A ragged last block, if listed, stands last."""
    blocks = -(-keys // block_k)
    last_kept = kept.gather(1, (counts[:, None].long() - 1).clamp(min=0))[:, 0]
    lengths = counts * block_k - (last_kept == blocks - 1) * (blocks * block_k - keys)
    groups = {}
    for length in lengths[counts > 0].unique().tolist():
        groups[length] = ((lengths == length) & (counts > 0)).nonzero()[:, 0]
    return groups


@jit
def _attention_blocks(
    q,
    k,
    v,
    kept,
    counts,
    q_scale,
    k_scale,
    out,
    H,
    N,
    M,
    ROWS,
    softmax_scale,
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    list_b,
    list_h,
    list_r,
    QS: tl.constexpr,
    KS: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    TQ: tl.constexpr,
    TK: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    """QS and KS: 0 for float operands, else how many tokens share a scale. TQ and TK: how many of a block at a time."""
    row, head = tl.program_id(0) // (BQ // TQ), tl.program_id(1).to(tl.int64)
    b, h = head // H, head % H
    n, d = tl.program_id(0) * TQ + tl.arange(0, TQ), tl.arange(0, DP)
    n64, in_d = n.to(tl.int64), d < D

    my_q = tl.load(q + b * q_b + h * q_h + n64[:, None] * q_n + d[None, :], mask=(n < N)[:, None] & in_d, other=0)
    row_scale = tl.full((TQ,), 1.0, tl.float32) * softmax_scale
    if QS > 0:
        row_scale *= tl.load(q_scale + head * tl.cdiv(N, QS) + n // QS, mask=n < N, other=0.0)

    k_head, v_head = k + b * k_b + h * k_h, v + b * v_b + h * v_h
    list_ = kept + b * list_b + h * list_h + row.to(tl.int64) * list_r
    count = tl.load(counts + head * ROWS + row)
    most, total = tl.full((TQ,), float("-inf"), tl.float32), tl.zeros((TQ,), tl.float32)
    found = tl.zeros((TQ, DP), tl.float32)
    for index in range(count * (BK // TK)):
        m = tl.load(list_ + index // (BK // TK)) * BK + index % (BK // TK) * TK + tl.arange(0, TK)
        m64, in_m = m.to(tl.int64), m < M
        keys = tl.load(k_head + m64[None, :] * k_n + d[:, None], mask=in_m[None, :] & in_d[:, None], other=0)
        if QS > 0:
            scores = tl.dot(my_q, keys, out_dtype=tl.int32).to(tl.float32)
        else:
            scores = tl.dot(my_q, keys, input_precision="ieee")
        if KS > 0:
            scores *= tl.load(k_scale + head * tl.cdiv(M, KS) + m // KS, mask=in_m, other=0.0)[None, :]
        scores = tl.where(in_m[None, :], scores * row_scale[:, None], float("-inf"))

        higher = tl.maximum(most, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(most - higher)
        total = total * fade + tl.sum(weights, axis=1)
        values = tl.load(v_head + m64[:, None] * v_n + d[None, :], mask=in_m[:, None] & in_d, other=0.0)
        found = found * fade[:, None]
        found += tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        most = higher

    found /= tl.where(count > 0, total, 1.0)[:, None]
    at = out + ((b * N + n64[:, None]) * H + h) * D + d[None, :]
    tl.store(at, found.to(out.dtype.element_ty), mask=(n < N)[:, None] & in_d)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    counts: Tensor,
    block_q: int,
    block_k: int,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    softmax_scale: float,
) -> Tensor:
    (batch, heads, tokens, size), keys, out = q.shape, k.shape[2], _answer(q, v)
    q, k, v, kept = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v, kept))
    rows = triton.cdiv(tokens, block_q)
    tile_q, tile_k = (_tile(block, size, q.dtype) for block in (block_q, block_k))
    _attention_blocks[(triton.cdiv(tokens, tile_q), batch * heads)](
        q,
        k,
        v,
        kept,
        counts.contiguous(),
        None if q_scale is None else q_scale.contiguous(),
        None if k_scale is None else k_scale.contiguous(),
        out,
        heads,
        tokens,
        keys,
        rows,
        softmax_scale * LOG2E,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *kept.stride()[:3],
        QS=_sharing(q_scale, tokens, block_q),
        KS=_sharing(k_scale, keys, block_k),
        BQ=block_q,
        BK=block_k,
        TQ=tile_q,
        TK=tile_k,
        D=size,
        DP=max(32 if q.dtype == torch.int8 else 16, triton.next_power_of_2(size)),  # a matrix unit's least
        num_warps=8 if tile_q == 128 else 4,
    )
    return out


def _tile(block: int, size: int, dtype: torch.dtype) -> int:
    """How many of a block's tokens go at a time: float32 ones lie in shared memory, of which some GPUs have 99 KiB."""
    return min(block, 64 if size <= 64 else 32 if size <= 128 else 16) if dtype == torch.float32 else block


def launch_hopper(q: Tensor, k: Tensor, v: Tensor, *given: Any) -> Tensor:
    """On a Hopper: by hand where that takes the operands, else by Triton."""
    its = Lists(*given)
    if attention_blocks_sm90.takes(q, k, v, its.block_q, its.block_k, its.softmax_scale):
        return attention_blocks_sm90.launch(q, k, v, its.kept, its.counts, its.softmax_scale)
    return launch(q, k, v, *its)


def _sharing(scale: Tensor | None, tokens: int, block: int) -> int:
    return 0 if scale is None else 1 if scale.shape[2] == tokens else block


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    return _answer(q, v)


_op = Op(
    "attention_blocks",
    reference,
    _fake,
    cpu={product_name: on_cpu},
    cuda={HOPPER: launch_hopper, "Triton": launch},
    on={HOPPER: _cuda.is_hopper},
    plain=in_parts,
)
