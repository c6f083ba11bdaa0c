"""Queries and keys to int8 for attention_blocks: one scale a token and head, or one for every `share` tokens of a head.

x  float32, bfloat16 or float16 [B, H, N, D]      center  float32 [B, H, D] or None: subtracted from every token first
q  int8 [B, H, N, D], within ±127                 scale  float32 [B, H, ceil(N / share)]

Taking the mean over all tokens from the keys changes no answer, since softmax ignores what all scores of a row have in
common; it takes away the outlier channels that keys have (SageAttention, arXiv:2410.02367). `key_center` is that mean.
As in quantize_rows: all in float32, rounding half to even, zeros get a tiny scale, a NaN or infinity gets a scale that
is not finite.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant_runtime.kernels._cpu import scratch
from quant_runtime.kernels._triton import jit, tl, triton
from quant_runtime.kernels._versions import Op
from quant_runtime.kernels.quantize_rows import TINY, step, whole

TOP = 127


def quantize_heads(x: Tensor, center: Tensor | None = None, share: int = 1) -> tuple[Tensor, Tensor]:
    """(q, scale) of x. Refuses x that is not float [B, H, N, D], and a share that is no power of two."""
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"quantize_heads takes float [B, H, N, D]; got {x.dtype} {list(x.shape)}")
    if center is not None and (center.shape != (*x.shape[:2], x.shape[3]) or center.dtype != torch.float32):
        expected = [*x.shape[:2], x.shape[3]]
        raise ValueError(f"quantize_heads: center is float32 {expected}; got {center.dtype} {list(center.shape)}")
    if share < 1 or share & (share - 1):
        raise ValueError(f"quantize_heads: share is a power of two; got {share}")
    q, scale = _op(x, center, share)
    return q, scale


def key_center(k: Tensor) -> Tensor:
    """The mean key of each head, float32 [B, H, D], of k [B, H, N, D]."""
    return k.mean(dim=2, dtype=torch.float32)


def reference(x: Tensor, center: Tensor | None, share: int) -> tuple[Tensor, Tensor]:
    x = x.float() if center is None else x.float() - center[:, :, None]
    tokens = x.shape[2]
    groups = pad(x, (0, 0, 0, -tokens % share)).unflatten(2, (-1, share))
    scale = step(groups.abs().amax(dim=(3, 4)), TOP)
    q = (groups * scale.reciprocal()[..., None, None]).round().to(torch.int8)
    return q.flatten(2, 3)[:, :, :tokens].contiguous(), scale


def on_cpu(x: Tensor, center: Tensor | None, share: int) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, size = x.shape
    groups = -(-tokens // share)
    q, scale = torch.empty(x.shape, dtype=torch.int8), torch.empty(batch, heads, groups)
    real, size_of = (scratch(slot, (groups * share, size), torch.float32) for slot in ("head", "absolute"))
    real[tokens:] = 0
    for b in range(batch):
        for h in range(heads):
            if center is None:
                real[:tokens].copy_(x[b, h])
            else:
                torch.sub(x[b, h], center[b, h], out=real[:tokens])
            most = torch.abs(real, out=size_of).view(groups, share * size)
            row_scale = torch.amax(most, dim=1, out=scale[b, h]).clamp_(min=TINY).div_(TOP)
            real.view(groups, -1).mul_(row_scale.reciprocal()[:, None]).round_()
            q[b, h].copy_(real[:tokens])
    return q, scale


@jit
def _quantize_heads(
    x,
    center,
    q,
    scale,
    H,
    N,
    stride_b,
    stride_h,
    stride_n,
    TINY: tl.constexpr,
    CENTER: tl.constexpr,
    SHARE: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BN: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)  # of B * H
    n, d = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, DP)
    inside = (n < N)[:, None] & (d < D)[None, :]
    x_head = x + head // H * stride_b + head % H * stride_h
    real = tl.load(x_head + n.to(tl.int64)[:, None] * stride_n + d[None, :], mask=inside, other=0.0).to(tl.float32)
    if CENTER:
        real -= tl.load(center + head * D + d, mask=d < D, other=0.0)[None, :]
        real = tl.where(inside, real, 0.0)

    most, broken = tl.max(tl.abs(real), axis=1), tl.max((real != real).to(tl.float32), axis=1)
    if SHARE > 1:
        most = tl.max(tl.reshape(most, (BN // SHARE, SHARE)), axis=1)
        broken = tl.max(tl.reshape(broken, (BN // SHARE, SHARE)), axis=1)
    ones = tl.full((BN // SHARE,), 1.0, tl.float32)
    group_scale = tl.math.div_rn(tl.maximum(most, TINY), ones * 127.0)
    group_scale = tl.where(broken > 0, float("nan"), group_scale)
    group = tl.program_id(0) * (BN // SHARE) + tl.arange(0, BN // SHARE)
    groups = tl.cdiv(N, SHARE)
    tl.store(scale + head * groups + group, group_scale, mask=group < groups)

    inverse = tl.math.div_rn(ones, group_scale)
    if SHARE > 1:
        inverse = tl.reshape(tl.broadcast_to(inverse[:, None], (BN // SHARE, SHARE)), (BN,))
    tl.store(q + (head * N + n)[:, None] * D + d[None, :], whole(real * inverse[:, None]), mask=inside)


def launch(x: Tensor, center: Tensor | None, share: int) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, size = x.shape
    x = x if x.stride(3) == 1 else x.contiguous()
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(batch, heads, triton.cdiv(tokens, share), dtype=torch.float32, device=x.device)
    block = max(64, share)
    _quantize_heads[(triton.cdiv(tokens, block), batch * heads)](
        x,
        None if center is None else center.contiguous(),
        q,
        scale,
        heads,
        tokens,
        *x.stride()[:3],
        TINY=TINY,
        CENTER=center is not None,
        SHARE=share,
        D=size,
        DP=triton.next_power_of_2(size),
        BN=block,
    )
    return q, scale


def _fake(x: Tensor, center: Tensor | None, share: int) -> tuple[Tensor, Tensor]:
    groups = -(-x.shape[2] // share)
    scale = x.new_empty(*x.shape[:2], groups, dtype=torch.float32)
    return torch.empty(x.shape, dtype=torch.int8, device=x.device), scale


_op = Op("quantize_heads", reference, _fake, cpu={"CPU": on_cpu}, cuda={"Triton": launch})
