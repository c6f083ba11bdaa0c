"""Queries, keys and values as attention_fp8 takes them, and the means that its blocks are chosen by, in one pass.

q, k, v     float [B, H, N, D], strided as they come (a fused projection's views); D even
norm        RMS norm of q and k before all else: (q's weight, k's weight) float [D] each, of every head by itself, or
            [H * D] each, of all heads of a token together; or None
others      the same for tokens that are not rotated, where these have weights of their own, or None for `norm`
bias        (q's, k's) float [D] each, or None: with it the norm is a layer norm of every head, and these its biases
rope        (cos, sin) float16 or float32 [R, D / 2], or None: neighbouring channels of tokens first .. first + R turn
            as pairs; float16 is off by 2**-12 at most, a tenth of what the rounding to int8 is off by
block       64 or 128 tokens: share a scale of k; have one mean
tokens      int32 [B, H, N], each token of a head once, perhaps expanded, or None: which token lies at place n of all
            that comes out. Norms and angles are those of the token. Without it, place n is token n

q  int8 [B, H, N, D], q_scale  float32 [B, H, N]: one scale a token
k  int8 [B, H, P, D], k_scale  float32 [B, H, P / block]: one scale a block, the centre of the keys taken away first
v  float8_e4m3fn [B, H, D, P], keys in attention_fp8.slots' order, v_scale  float32 [B, H, D]: one scale a channel
q_means, k_means  float32 [B, H, P / block, D], for block_map.choose
q_alike, k_alike  float32 [B, H, P / block]: how alike a block's tokens are, for blocks_by_mass; of centred keys

P is N up to the next multiple of block; k and v are zero beyond N. Any centre leaves the attention as it is (softmax
ignores what all scores of a row have in common): here it is the mean of some 1024 keys, evenly spread, in shorter heads
of every eighth, or of 65 to 128 where that is more. It takes the keys' outlier channels away as the mean of all
would (SageAttention, arXiv:2410.02367) and costs no pass over them. All in float32. A NaN or an infinity gets a scale,
or a value, that is not finite, so that it shows in the answer.

On a Hopper, heads of 64 and 128 in 16 bits are packed by pack_heads_sm90, which is written by hand; all else by Triton.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, pad

from quant_runtime.kernels import _cuda, pack_heads_sm90
from quant_runtime.kernels._fp8 import FP8_TOP
from quant_runtime.kernels._triton import jit, tl, triton
from quant_runtime.kernels._versions import Op
from quant_runtime.kernels.attention_fp8 import slots
from quant_runtime.kernels.blocks_by_mass import NOTHING, likeness
from quant_runtime.kernels.quantize_rows import TINY, step, whole

HOPPER = "CUDA for sm_90a, Triton for float32 and other heads"
BLOCKS = (64, 128)
TOP = 127
SAMPLES = 1024  # keys that the centre is the mean of, at most
FEW = 128  # the same of a short head: a piece of work, and the mean is known to an eighth of the keys' spread

Pair = tuple[Tensor, Tensor]


class Packed(NamedTuple):
    """Operands of attention_fp8, and what its blocks are chosen by."""

    q: Tensor
    q_scale: Tensor
    k: Tensor
    k_scale: Tensor
    v: Tensor
    v_scale: Tensor
    q_means: Tensor
    k_means: Tensor
    q_alike: Tensor
    k_alike: Tensor


def pack_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block: int = 128,
    norm: Pair | None = None,
    others: Pair | None = None,
    eps: float = 1e-6,
    rope: Pair | None = None,
    first: int = 0,
    bias: Pair | None = None,
    tokens: Tensor | None = None,
) -> Packed:
    if q.dim() != 4 or not q.shape == k.shape == v.shape or not q.dtype == k.dtype == v.dtype:
        found = [f"{t.dtype} {list(t.shape)}" for t in (q, k, v)]
        raise ValueError(f"pack_heads takes q, k and v float [B, H, N, D] of one kind; got {found}")
    count, size = q.shape[2:]
    if not q.is_floating_point() or size % 2 or block not in BLOCKS:
        raise ValueError(f"pack_heads takes floats, an even D, blocks of 64 or 128; got {q.dtype}, D={size}, {block}")
    wide = q.shape[1] * size
    for name, pair, shapes in (
        ("norm", norm, ((size,), (wide,))), ("others", others, ((size,),)), ("bias", bias, ((size,),)),
    ):  # fmt: skip
        if pair is not None and not (pair[0].shape == pair[1].shape and pair[0].shape in shapes):
            wanted, given = (" or ".join(str(list(s)) for s in these) for these in (shapes, [w.shape for w in pair]))
            raise ValueError(f"pack_heads: {name} is two weights {wanted}; got {given}")
    if bias is not None and (norm is None or others is not None or norm[0].shape != bias[0].shape):
        had = f"norm {None if norm is None else list(norm[0].shape)}, others {'not ' if others is None else ''}given"
        raise ValueError(f"pack_heads: bias is of a layer norm [{size}], that all tokens share; got {had}")
    if others is not None and (norm is None or rope is None or norm[0].shape != others[0].shape):
        had = f"norm {None if norm is None else list(norm[0].shape)}, rope {'not ' if rope is None else ''}given"
        raise ValueError(
            f"pack_heads: others are norms of tokens that rope leaves out, beside norms [{size}]; got {had}"
        )
    if rope is not None:
        shape = (rope[0].shape[0], size // 2)
        fits = all(t.shape == shape and t.dtype in (torch.float16, torch.float32) for t in rope)
        if not fits or not 0 <= first <= count - shape[0]:
            given = " and ".join(f"{t.dtype} {list(t.shape)}" for t in rope)
            wanted = f"rope as float16 or float32 [R, {size // 2}] twice, first + R up to {count}"
            raise ValueError(f"pack_heads takes {wanted}; got {given}, first={first}")
    if tokens is not None and (tokens.shape != q.shape[:3] or tokens.dtype != torch.int32):
        given = f"{tokens.dtype} {list(tokens.shape)}"
        raise ValueError(f"pack_heads takes tokens as int32 {list(q.shape[:3])}; got {given}")
    (norm_q, norm_k), (other_q, other_k) = norm or (None, None), others or (None, None)
    (cos, sin), (bias_q, bias_k) = rope or (None, None), bias or (None, None)
    return Packed(*_op(q, k, v, block, norm_q, norm_k, other_q, other_k, eps, cos, sin, first, bias_q, bias_k, tokens))


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block: int,
    norm_q: Tensor | None,
    norm_k: Tensor | None,
    other_q: Tensor | None,
    other_k: Tensor | None,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    first: int,
    bias_q: Tensor | None,
    bias_k: Tensor | None,
    tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    count = q.shape[2]
    short = -count % block
    real_q = _placed(q, norm_q, other_q, eps, cos, sin, first, bias_q)
    real_k = _placed(k, norm_k, other_k, eps, cos, sin, first, bias_k)
    center = real_k[:, :, :: _stride(count)].mean(dim=2, keepdim=True)
    v_scale = step(v.float().abs().amax(dim=2), FP8_TOP)
    if tokens is not None:
        real_q, real_k, v = (in_places(x, tokens) for x in (real_q, real_k, v))
    q_scale = step(real_q.abs().amax(dim=3), TOP)
    centred = real_k - center
    groups = pad(centred, (0, 0, 0, short)).unflatten(2, (-1, block))
    k_scale = step(groups.abs().amax(dim=(3, 4)), TOP)
    whole_k = (groups * k_scale.reciprocal()[..., None, None]).round().to(torch.int8).flatten(2, 3)
    values = pad(v.float() * v_scale.reciprocal()[:, :, None], (0, 0, 0, short))
    return (
        (real_q * q_scale.reciprocal()[..., None]).round().to(torch.int8),
        q_scale,
        whole_k,
        k_scale,
        values.mT[..., slots(count + short).to(v.device)].to(torch.float8_e4m3fn),
        v_scale,
        _means(real_q, block),
        _means(real_k, block),
        likeness(real_q, block),
        likeness(centred, block),
    )


def in_places(x: Tensor, tokens: Tensor) -> Tensor:
    """x [B, H, N, D] in the order of tokens [B, H, N]."""
    if tokens.stride()[:2] == (0, 0):  # one order for all heads
        return x.index_select(2, tokens[0, 0])
    return x.gather(2, tokens.long()[..., None].expand_as(x))


def _placed(
    x: Tensor,
    norm: Tensor | None,
    other: Tensor | None,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    first: int,
    bias: Tensor | None,
) -> Tensor:
    """float32 x, normalized and turned."""
    x = x.float()
    if norm is not None and bias is not None:
        x = layer_norm(x, x.shape[3:], norm.float(), bias.float(), eps)
    elif norm is not None and len(norm) > x.shape[3]:
        x = x * (x.square().mean(dim=(1, 3), keepdim=True) + eps).rsqrt() * norm.float().view(x.shape[1], 1, -1)
    elif norm is not None:
        x = x * (x.square().mean(dim=3, keepdim=True) + eps).rsqrt()
        weights = norm.float().expand(x.shape[2], -1).clone()
        if other is not None and cos is not None:
            weights[:first], weights[first + len(cos) :] = other.float(), other.float()
        x = x * weights
    if cos is None or sin is None:
        return x
    cos, sin = cos.float(), sin.float()
    head, middle, tail = x.tensor_split([first, first + len(cos)], dim=2)
    even, odd = middle[..., 0::2], middle[..., 1::2]
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(3)
    return torch.cat([head, turned, tail], dim=2)


def _means(x: Tensor, block: int) -> Tensor:
    tokens = x.shape[2]
    sums: Tensor = pad(x, (0, 0, 0, -tokens % block)).unflatten(2, (-1, block)).sum(dim=3)
    held = torch.full((sums.shape[2],), float(block), device=x.device)
    held[-1] -= -tokens % block
    return sums / held[:, None]


def _stride(tokens: int) -> int:
    """From one key that the centre is of to the next."""
    return max(1, tokens // SAMPLES, min(SAMPLES // FEW, -(-tokens // FEW)))


@jit
def _norm_of_heads(x, inverse, N, x_b, x_h, x_n, eps, H: tl.constexpr, D: tl.constexpr, WP: tl.constexpr):
    """One over the root mean square of a token's heads together, float32 [B, N]."""
    n, b, i = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.arange(0, WP)
    at = x + b * x_b + n * x_n + i // D * x_h + i % D
    real = tl.load(at, mask=i < H * D, other=0.0).to(tl.float32)
    tl.store(inverse + b * N + n, tl.math.rsqrt(tl.sum(real * real, axis=0) / (H * D) + eps))


@jit
def _center_of_keys(
    k,
    norm,
    bias,
    other,
    inverse,
    cos,
    sin,
    center,
    H,
    N,
    first,
    R,
    eps,
    stride,
    k_b,
    k_h,
    k_n,
    NORM: tl.constexpr,
    OTHER: tl.constexpr,
    ROPE: tl.constexpr,
    BT: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    head, d = tl.program_id(0), tl.arange(0, DP)
    x_head = k + (head // H).to(tl.int64) * k_b + (head % H).to(tl.int64) * k_h
    if NORM == 2:
        norm += head % H * D
        inverse += head // H * N
    samples = tl.cdiv(N, stride)
    sums = tl.zeros((DP,), tl.float32)
    for start in range(0, samples, BT):
        n = (start + tl.arange(0, BT)) * stride
        real = _load(
            x_head, k_n, n, N, norm, bias, other, inverse, cos, sin, first, R, eps, NORM, OTHER, ROPE, BT, D, DP
        )
        sums += tl.sum(real, axis=0)
    tl.store(center + head * D + d, sums / samples, mask=d < D)


@jit
def _largest_values(v, most, H, N, v_b, v_h, v_n, BT: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """The largest magnitude of each channel, into `most`, which is zeros. NaN passes: it stays one in FP8."""
    head, d = tl.program_id(0), tl.arange(0, DP)
    v_head = v + (head // H).to(tl.int64) * v_b + (head % H).to(tl.int64) * v_h
    found = tl.zeros((DP,), tl.float32)
    for part in range(4):
        n = (tl.program_id(1) * 4 + part) * BT + tl.arange(0, BT)
        inside = (n < N)[:, None] & (d < D)[None, :]
        real = tl.load(v_head + n.to(tl.int64)[:, None] * v_n + d[None, :], mask=inside, other=0.0).to(tl.float32)
        found = tl.maximum(found, tl.max(tl.abs(real), axis=0))
    tl.atomic_max(most + head * D + d, found, mask=d < D)


@jit
def _pack_heads(
    q,
    k,
    v,
    norm_q,
    norm_k,
    bias_q,
    bias_k,
    other_q,
    other_k,
    inverse_q,
    inverse_k,
    cos,
    sin,
    center,
    most,
    tokens,
    q_out,
    q_scale,
    k_out,
    k_scale,
    v_out,
    v_scale,
    q_means,
    k_means,
    q_alike,
    k_alike,
    H,
    N,
    P,
    BLOCKS,
    first,
    R,
    eps,
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    tokens_b,
    tokens_h,
    TINY: tl.constexpr,
    NOTHING: tl.constexpr,
    TOKENS: tl.constexpr,
    NORM: tl.constexpr,
    OTHER: tl.constexpr,
    ROPE: tl.constexpr,
    BT: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    """Three programs a block of tokens of a head: one packs q, one k, one v."""
    head, block, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h, head64 = (head // H).to(tl.int64), (head % H).to(tl.int64), head.to(tl.int64)
    t, d = tl.arange(0, BT), tl.arange(0, DP)
    n = block * BT + t
    in_n, in_d = n < N, d < D
    inside = in_n[:, None] & in_d[None, :]
    held = tl.minimum(N - block * BT, BT)
    means = (head64 * BLOCKS + block) * D + d
    who = n  # the token at each place
    if TOKENS:
        tokens += b * tokens_b + h * tokens_h
        who = tl.load(tokens + n, mask=in_n, other=N)
    if NORM == 2:
        norm_q += h * D
        norm_k += h * D
        inverse_q += b * N
        inverse_k += b * N

    if part == 0:
        mine = q + b * q_b + h * q_h
        real = _load(
            mine, q_n, who, N, norm_q, bias_q, other_q, inverse_q, cos, sin, first, R, eps, NORM, OTHER, ROPE, BT, D, DP
        )
        tl.store(q_means + means, tl.sum(real, axis=0) / held, mask=in_d)
        tl.store(q_alike + head64 * BLOCKS + block, _likeness(real, held, NOTHING))
        scale = _scale(real, 127.0, TINY, BT)
        tl.store(q_scale + head64 * N + n, scale, mask=in_n)
        real *= tl.math.div_rn(tl.full((BT,), 1.0, tl.float32), scale)[:, None]
        tl.store(q_out + (head64 * N + n)[:, None] * D + d[None, :], whole(real), mask=inside)
    elif part == 1:
        mine = k + b * k_b + h * k_h
        real = _load(
            mine, k_n, who, N, norm_k, bias_k, other_k, inverse_k, cos, sin, first, R, eps, NORM, OTHER, ROPE, BT, D, DP
        )
        tl.store(k_means + means, tl.sum(real, axis=0) / held, mask=in_d)
        real = tl.where(inside, real - tl.load(center + head * D + d, mask=in_d, other=0.0)[None, :], 0.0)
        tl.store(k_alike + head64 * BLOCKS + block, _likeness(real, held, NOTHING))
        each = _scale(real, 127.0, TINY, BT)
        broken = tl.max((each != each).to(tl.float32), axis=0)
        shared = tl.where(broken > 0, float("nan"), tl.max(each, axis=0))
        tl.store(k_scale + head64 * BLOCKS + block, shared)
        real *= tl.math.div_rn(1.0, shared)
        tl.store(k_out + (head64 * P + n)[:, None] * D + d[None, :], whole(real), mask=in_d[None, :])
    else:
        largest = tl.maximum(tl.load(most + head * D + d, mask=in_d, other=0.0), TINY)
        channel = tl.math.div_rn(largest, tl.full((DP,), 448.0, tl.float32))
        if block == 0:
            tl.store(v_scale + head * D + d, channel, mask=in_d)
        inner = t % 16  # slots 4t .. 4t + 3 of 16 hold keys 2t, 2t + 1, 8 + 2t, 8 + 2t + 1
        m = block * BT + t - inner + inner // 4 * 2 + inner % 2 + inner // 2 % 2 * 8
        if TOKENS:
            m = tl.load(tokens + m, mask=m < N, other=N)
        in_v = (m < N)[:, None] & in_d[None, :]
        mine = v + b * v_b + h * v_h
        real = tl.load(mine + m.to(tl.int64)[:, None] * v_n + d[None, :], mask=in_v, other=0.0).to(tl.float32)
        real *= tl.math.div_rn(tl.full((DP,), 1.0, tl.float32), channel)[None, :]
        at = v_out + (head64 * D + d)[:, None] * P + n[None, :]
        tl.store(at, tl.trans(real.to(tl.float8e4nv)), mask=in_d[:, None])


@jit
def _likeness(real, held, NOTHING: tl.constexpr):
    """The mean cosine of all pairs of rows of real, zeros beyond `held`: the square of the mean of their directions."""
    inverse = tl.math.rsqrt(tl.maximum(tl.sum(real * real, axis=1), NOTHING))
    together = tl.sum(real * inverse[:, None], axis=0) / held
    return tl.sum(together * together, axis=0)


@jit
def _scale(real, top, TINY: tl.constexpr, BT: tl.constexpr):
    """One a row of real; NaN where the row holds one, which a GPU's maximum passes over."""
    broken = tl.max((real != real).to(tl.float32), axis=1)
    scale = tl.math.div_rn(tl.maximum(tl.max(tl.abs(real), axis=1), TINY), tl.full((BT,), 0.0, tl.float32) + top)
    return tl.where(broken > 0, float("nan"), scale)


@jit
def _load(
    x,
    x_n,
    n,
    N,
    norm,
    bias,
    other,
    inverse,
    cos,
    sin,
    first,
    R,
    eps,
    NORM: tl.constexpr,
    OTHER: tl.constexpr,
    ROPE: tl.constexpr,
    BT: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    """float32 [BT, DP], normalized and turned; zeros beyond N and D.

    NORM: 0 for none, 1 by heads, 2 by tokens, 3 a layer norm by heads.
    """
    d = tl.arange(0, DP)
    inside = (n < N)[:, None] & (d < D)[None, :]
    real = tl.load(x + n.to(tl.int64)[:, None] * x_n + d[None, :], mask=inside, other=0.0).to(tl.float32)
    turns = (n >= first) & (n < first + R)
    if NORM == 1:
        real *= tl.math.rsqrt(tl.sum(real * real, axis=1) / D + eps)[:, None]
    if NORM == 2:
        real *= tl.load(inverse + n, mask=n < N, other=0.0)[:, None]
    if NORM == 3:
        real = tl.where(inside, real - (tl.sum(real, axis=1) / D)[:, None], 0.0)
        real *= tl.math.rsqrt(tl.sum(real * real, axis=1) / D + eps)[:, None]
    if NORM > 0:
        weight = tl.load(norm + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        if OTHER:
            weight = tl.where(turns[:, None], weight, tl.load(other + d, mask=d < D, other=0.0).to(tl.float32)[None, :])
        real *= weight
    if NORM == 3:
        real += tl.where(inside, tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :], 0.0)
    if ROPE:
        half = tl.arange(0, DP // 2)
        at = (n - first)[:, None] * (D // 2) + half[None, :]
        turning = turns[:, None] & (half < D // 2)[None, :]
        c = tl.load(cos + at, mask=turning, other=1.0).to(tl.float32)
        s = tl.load(sin + at, mask=turning, other=0.0).to(tl.float32)
        even, odd = tl.split(tl.reshape(real, (BT, DP // 2, 2)))
        real = tl.reshape(tl.join(even * c - odd * s, odd * c + even * s), (BT, DP))
    return real


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block: int,
    norm_q: Tensor | None,
    norm_k: Tensor | None,
    other_q: Tensor | None,
    other_k: Tensor | None,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    first: int,
    bias_q: Tensor | None,
    bias_k: Tensor | None,
    tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, heads, count, size = q.shape
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    outputs = _empty(q, block)
    tokens = tokens if tokens is None or tokens.stride(2) == 1 else tokens.contiguous()
    norm_q, norm_k, bias_q, bias_k, other_q, other_k, cos, sin = (
        None if t is None else t.contiguous() for t in (norm_q, norm_k, bias_q, bias_k, other_q, other_k, cos, sin)
    )
    center = torch.empty(batch, heads, size, dtype=torch.float32, device=q.device)
    most = torch.zeros(batch, heads, size, dtype=torch.float32, device=q.device)
    rotated = 0 if cos is None else len(cos)
    inverse_q, inverse_k = _inverses(q, k, norm_q, eps)
    kind = 0 if norm_q is None else 3 if bias_q is not None else 1 if inverse_q is None else 2
    kinds = {"NORM": kind, "OTHER": other_q is not None, "ROPE": cos is not None}
    sizes = {"D": size, "DP": max(16, triton.next_power_of_2(size))}
    all_heads, blocks = batch * heads, outputs[3].shape[2]
    place = (heads, count, first, rotated, eps)
    _center_of_keys[(all_heads,)](
        k,
        norm_k,
        bias_k,
        other_k,
        inverse_k,
        cos,
        sin,
        center,
        *place,
        _stride(count),
        *k.stride()[:3],
        **kinds,
        BT=64,
        **sizes,
    )
    _largest_values[(all_heads, triton.cdiv(count, 512))](v, most, heads, count, *v.stride()[:3], BT=128, **sizes)
    _pack_heads[(all_heads, blocks, 3)](
        q,
        k,
        v,
        norm_q,
        norm_k,
        bias_q,
        bias_k,
        other_q,
        other_k,
        inverse_q,
        inverse_k,
        cos,
        sin,
        center,
        most,
        tokens,
        *outputs,
        heads,
        count,
        outputs[2].shape[2],
        blocks,
        first,
        rotated,
        eps,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *((0, 0) if tokens is None else tokens.stride()[:2]),
        TINY=TINY,
        NOTHING=NOTHING,
        TOKENS=tokens is not None,
        **kinds,
        BT=block,
        **sizes,
        num_warps=8,
    )
    return outputs


def launch_hopper(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block: int,
    norm_q: Tensor | None,
    norm_k: Tensor | None,
    other_q: Tensor | None,
    other_k: Tensor | None,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    first: int,
    bias_q: Tensor | None,
    bias_k: Tensor | None,
    tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    norms = (norm_q, norm_k, other_q, other_k)
    if not pack_heads_sm90.takes(q, k, v):
        return launch(q, k, v, block, *norms, eps, cos, sin, first, bias_q, bias_k, tokens)
    outputs, stride = _empty(q, block), _stride(q.shape[2])
    weights, inverses = (*norms, bias_q, bias_k), _inverses(q, k, norm_q, eps)
    places = (eps, cos, sin, first, tokens, stride)
    pack_heads_sm90.launch(q, k, v, block, weights, inverses, *places, TINY, NOTHING, outputs)
    return outputs


def _inverses(q: Tensor, k: Tensor, norm: Tensor | None, eps: float) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Of a norm of all heads together, one over each token's root mean square, of q and of k."""
    batch, heads, count, size = q.shape
    if norm is None or len(norm) == size:
        return None, None
    inverse_q, inverse_k = torch.empty(2, batch, count, dtype=torch.float32, device=q.device)
    wide = {"H": heads, "D": size, "WP": triton.next_power_of_2(heads * size)}
    for x, inverse in ((q, inverse_q), (k, inverse_k)):
        _norm_of_heads[(count, batch)](x, inverse, count, *x.stride()[:3], eps, **wide)
    return inverse_q, inverse_k


def _empty(
    q: Tensor, block: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, heads, count, size = q.shape
    blocks = -(-count // block)

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(batch, heads, *shape, dtype=dtype, device=q.device)

    return (
        empty(torch.int8, count, size),
        empty(torch.float32, count),
        empty(torch.int8, blocks * block, size),
        empty(torch.float32, blocks),
        empty(torch.float8_e4m3fn, size, blocks * block),
        empty(torch.float32, size),
        empty(torch.float32, blocks, size),
        empty(torch.float32, blocks, size),
        empty(torch.float32, blocks),
        empty(torch.float32, blocks),
    )


def _fake(
    q: Tensor, k: Tensor, v: Tensor, block: int, *_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty(q, block)


# The reference serves a CPU as well: there the attention itself takes the time.
_op = Op(
    "pack_heads",
    reference,
    _fake,
    cuda={HOPPER: launch_hopper, "Triton": launch},
    on={HOPPER: _cuda.is_hopper},
)
