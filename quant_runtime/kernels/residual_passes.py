"""The two passes that a refresh of the second order makes over what attention has lost (quant_runtime/residual.py).

lost    float [B, H, N, D], laid out in memory as [B, N, H, D]: Delta
before  what the refresh before has cached: C in `values` [B, N, H, D], with `scale` float32 [B, H, N] where they are
        int8; left [B, N, H, R] likewise and right float32 [B, H, D, R], or None where it had no second order; and added
        float32 [], what of their product is in C. Delta before is C - added * left right^T

residual_differences    of Delta - Delta before: its Gram matrices, float32 [B, H, D, D]; and float32 [2], the sums of
                        its squares, and of those that left right^T had not foretold (zero without it)
residual_entry          of `vectors` float32 [B, H, D, r] and `adds` float32 []: the new C and left, in int8 or as lost
                        is: left = (Delta - Delta before) vectors, C = Delta + adds * left vectors^T, of left as it was
                        rounded

In float32, products over channels and tokens in tf32 on a GPU. A row of zeros has a scale that is tiny and not zero; of
what is not finite a scale is not finite either. R and r are at most D, and D is at most 128.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_runtime.kernels._triton import jit, processors, tl, triton
from quant_runtime.kernels._versions import Op
from quant_runtime.kernels.quantize_rows import TINY, step, whole

TOP = 127.0
LARGEST_D = 128
TILE = 64  # tokens

Kept = tuple[Tensor, Tensor | None]  # [B, N, H, W] in a float dtype, or in int8 with its scale float32 [B, H, N]
Before = tuple[Kept, Kept | None, Tensor | None, Tensor | None]  # dense, left, right, added


def residual_differences(lost: Tensor, before: Before) -> tuple[Tensor, Tensor]:
    _check("residual_differences", lost, before)
    grams, squares = _differences_op(lost, *_flat(before))
    return grams, squares


def residual_entry(lost: Tensor, before: Before, vectors: Tensor, adds: Tensor, bits: int) -> tuple[Kept, Kept]:
    """(dense, left). `bits` is 8, or 16 for lost's own dtype."""
    _check("residual_entry", lost, before)
    batch, heads, _, size = lost.shape
    if vectors.shape[:3] != (batch, heads, size) or not 0 < vectors.shape[3] <= size or vectors.dtype != torch.float32:
        found = f"{vectors.dtype} {list(vectors.shape)}"
        wanted = f"[{batch}, {heads}, {size}, r], r at most {size}"
        raise ValueError(f"residual_entry takes vectors float32 {wanted}; got {found}")
    if bits not in (8, 16):
        raise ValueError(f"residual_entry keeps 8 or 16 bits; got bits={bits}")
    dense, dense_scale, left, left_scale = _entry_op(lost, *_flat(before), vectors, adds, bits)
    return ((dense, dense_scale), (left, left_scale)) if bits == 8 else ((dense, None), (left, None))


def _check(op: str, lost: Tensor, before: Before) -> None:
    batch, heads, tokens, size = lost.shape
    (values, _), left, right, _ = before
    if size > LARGEST_D or not lost.is_floating_point() or not lost.transpose(1, 2).is_contiguous():
        found = f"{lost.dtype} {list(lost.shape)}, strides {lost.stride()}"
        raise ValueError(f"{op} takes lost as floats laid out as [B, N, H, D], D at most {LARGEST_D}; got {found}")
    if values.shape != (batch, tokens, heads, size) or (left is None) != (right is None):
        raise ValueError(f"{op} takes what was cached of {[batch, tokens, heads, size]}; got {list(values.shape)}")


Flat = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _flat(before: Before) -> Flat:
    (values, scale), left, right, added = before
    return values, scale, None if left is None else left[0], None if left is None else left[1], right, added


def differences_reference(
    lost: Tensor,
    values: Tensor,
    scale: Tensor | None,
    left: Tensor | None,
    left_scale: Tensor | None,
    right: Tensor | None,
    added: Tensor | None,
) -> tuple[Tensor, Tensor]:
    difference, trend = _difference(lost, values, scale, left, left_scale, right, added)
    squares = difference.new_zeros(2)
    squares[0] = difference.square().sum()
    if trend is not None:
        squares[1] = (difference - trend).square().sum()
    return difference.mT @ difference, squares


def entry_reference(
    lost: Tensor,
    values: Tensor,
    scale: Tensor | None,
    left: Tensor | None,
    left_scale: Tensor | None,
    right: Tensor | None,
    added: Tensor | None,
    vectors: Tensor,
    adds: Tensor,
    bits: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    difference, _ = _difference(lost, values, scale, left, left_scale, right, added)
    new_left, new_left_scale = _rounded(difference @ vectors, lost.dtype, bits)
    real = new_left.transpose(1, 2).float()
    if bits == 8:
        real = real * new_left_scale[..., None]
    dense, dense_scale = _rounded(lost.float() + adds * (real @ vectors.mT), lost.dtype, bits)
    return dense, dense_scale, new_left, new_left_scale


def _difference(
    lost: Tensor,
    values: Tensor,
    scale: Tensor | None,
    left: Tensor | None,
    left_scale: Tensor | None,
    right: Tensor | None,
    added: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """float32 [B, H, N, D]: Delta - Delta before, and what was foretold of it."""
    before = _real(values, scale)
    if left is None or right is None:
        return lost.float() - before, None
    trend = _real(left, left_scale) @ right.mT
    return lost.float() - (before - (1.0 if added is None else added) * trend), trend


def _real(values: Tensor, scale: Tensor | None) -> Tensor:
    real = values.transpose(1, 2).float()
    return real if scale is None else real * scale[..., None]


def _rounded(x: Tensor, dtype: torch.dtype, bits: int) -> tuple[Tensor, Tensor]:
    """[B, N, H, W] of float32 [B, H, N, W], and its scale, empty where there is none."""
    if bits == 16:
        return x.transpose(1, 2).to(dtype).contiguous(), x.new_empty(0)
    scale = step(x.abs().amax(dim=3), TOP)
    return (x * scale.reciprocal()[..., None]).round().to(torch.int8).transpose(1, 2).contiguous(), scale


@jit
def _rows(values, scale, head, b, h, n, N, H, d, W, SCALED: tl.constexpr):
    """float32 [tile, width] of rows n of [B, N, H, W]."""
    inside = (n < N)[:, None] & (d < W)[None, :]
    at = ((b * N + n)[:, None] * H + h) * W + d[None, :]
    real = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        real *= tl.load(scale + head * N + n, mask=n < N, other=0.0)[:, None]
    return real


@jit
def _differs(
    lost,
    values,
    scale,
    left,
    left_scale,
    right,
    added,
    head,
    n,
    N,
    H,
    R,
    D: tl.constexpr,
    DP: tl.constexpr,
    RP: tl.constexpr,
    SCALED: tl.constexpr,
    TREND: tl.constexpr,
):
    """What was lost, how it differs from what was lost before, and what was foretold of that: each [tile, DP]."""
    b, h, d = (head // H).to(tl.int64), head % H, tl.arange(0, DP)
    head64, n64 = head.to(tl.int64), n.to(tl.int64)
    now = _rows(lost, scale, head64, b, h, n64, N, H, d, D, False)
    before = _rows(values, scale, head64, b, h, n64, N, H, d, D, SCALED)
    trend = tl.zeros_like(now)
    if TREND:
        r = tl.arange(0, RP)
        factor = _rows(left, left_scale, head64, b, h, n64, N, H, r, R, SCALED)
        at = head64 * D * R + d[None, :] * R + r[:, None]
        across = tl.load(right + at, mask=(d < D)[None, :] & (r < R)[:, None], other=0.0)
        trend = tl.dot(factor, across, input_precision="tf32")
        before -= tl.load(added) * trend
    return now, now - before, trend


@jit
def _residual_differences(
    lost,
    values,
    scale,
    left,
    left_scale,
    right,
    added,
    grams,
    squares,
    N,
    H,
    R,
    SPLITS,
    BN: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    RP: tl.constexpr,
    SCALED: tl.constexpr,
    TREND: tl.constexpr,
):
    """One program has a head's tiles of tokens number `split`, `split` + SPLITS, ..."""
    head, split = tl.program_id(0), tl.program_id(1)
    found = tl.zeros((DP, DP), tl.float32)
    first, second = tl.zeros((DP,), tl.float32), tl.zeros((DP,), tl.float32)
    for tile in range(split, tl.cdiv(N, BN), SPLITS):
        n = tile * BN + tl.arange(0, BN)
        _, differs, trend = _differs(
            lost, values, scale, left, left_scale, right, added, head, n, N, H, R, D, DP, RP, SCALED, TREND
        )
        found += tl.dot(tl.trans(differs), differs, input_precision="tf32")
        first += tl.sum(differs * differs, axis=0)
        if TREND:
            missed = differs - trend
            second += tl.sum(missed * missed, axis=0)
    d = tl.arange(0, DP)
    mine = (head * SPLITS + split).to(tl.int64)
    inside = (d < D)[:, None] & (d < D)[None, :]
    tl.store(grams + mine * D * D + d[:, None] * D + d[None, :], found, mask=inside)
    tl.store(squares + mine * 2, tl.sum(first, axis=0))
    tl.store(squares + mine * 2 + 1, tl.sum(second, axis=0))


@jit
def _keep(values, scale, real, head, b, h, n, N, H, d, W, KEPT8: tl.constexpr, TINY: tl.constexpr):
    """Rows n of [B, N, H, W]; and float32, as they are read again."""
    inside = (n < N)[:, None] & (d < W)[None, :]
    at = ((b * N + n)[:, None] * H + h) * W + d[None, :]
    if KEPT8:
        most = tl.max(tl.abs(real), axis=1)
        broken = tl.max((real != real).to(tl.float32), axis=1)  # a GPU's maximum passes over NaN
        row_scale = tl.math.div_rn(tl.maximum(most, TINY), tl.full(most.shape, 127.0, tl.float32))
        row_scale = tl.where(broken > 0, float("nan"), row_scale)
        rounded = whole(real * tl.math.div_rn(tl.full(most.shape, 1.0, tl.float32), row_scale)[:, None])
        tl.store(scale + head * N + n, row_scale, mask=n < N)
        back = rounded.to(tl.float32) * row_scale[:, None]
    else:
        rounded = real.to(values.dtype.element_ty)
        back = rounded.to(tl.float32)
    tl.store(values + at, rounded, mask=inside)
    return back


@jit
def _residual_entry(
    lost,
    values,
    scale,
    left,
    left_scale,
    right,
    added,
    vectors,
    adds,
    dense,
    dense_scale,
    new_left,
    new_left_scale,
    N,
    H,
    R,
    RANK,
    BN: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    RP: tl.constexpr,
    RANKP: tl.constexpr,
    SCALED: tl.constexpr,
    TREND: tl.constexpr,
    KEPT8: tl.constexpr,
    TINY: tl.constexpr,
):
    tile, head = tl.program_id(0), tl.program_id(1)
    n = tile * BN + tl.arange(0, BN)
    now, differs, _ = _differs(
        lost, values, scale, left, left_scale, right, added, head, n, N, H, R, D, DP, RP, SCALED, TREND
    )
    b, h, head64, n64 = (head // H).to(tl.int64), head % H, head.to(tl.int64), n.to(tl.int64)
    d, r = tl.arange(0, DP), tl.arange(0, RANKP)
    at, inside = head64 * D * RANK + d[:, None] * RANK + r[None, :], (d < D)[:, None] & (r < RANK)[None, :]
    across = tl.load(vectors + at, mask=inside, other=0.0)
    projected = tl.dot(differs, across, input_precision="tf32")
    factor = _keep(new_left, new_left_scale, projected, head64, b, h, n64, N, H, r, RANK, KEPT8, TINY)
    trend = tl.dot(factor, tl.trans(across), input_precision="tf32")
    _keep(dense, dense_scale, now + tl.load(adds) * trend, head64, b, h, n64, N, H, d, D, KEPT8, TINY)


def launch_differences(
    lost: Tensor,
    values: Tensor,
    scale: Tensor | None,
    left: Tensor | None,
    left_scale: Tensor | None,
    right: Tensor | None,
    added: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, size = lost.shape
    every = batch * heads
    splits = max(1, min(triton.cdiv(2 * processors(lost.device), every), triton.cdiv(tokens, TILE)))
    grams = torch.empty(every, splits, size, size, dtype=torch.float32, device=lost.device)
    squares = torch.empty(every, splits, 2, dtype=torch.float32, device=lost.device)
    _residual_differences[(every, splits)](
        *_operands(lost, values, scale, left, left_scale, right, added),
        grams,
        squares,
        tokens,
        heads,
        0 if left is None else left.shape[3],
        splits,
        **_sizes(size, left, scale),
        num_warps=8,
    )
    return grams.sum(dim=1).view(batch, heads, size, size), squares.sum(dim=(0, 1))


def launch_entry(
    lost: Tensor,
    values: Tensor,
    scale: Tensor | None,
    left: Tensor | None,
    left_scale: Tensor | None,
    right: Tensor | None,
    added: Tensor | None,
    vectors: Tensor,
    adds: Tensor,
    bits: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, tokens, size = lost.shape
    rank = vectors.shape[3]
    answers = _empty(lost, rank, bits)
    _residual_entry[(triton.cdiv(tokens, TILE), batch * heads)](
        *_operands(lost, values, scale, left, left_scale, right, added),
        vectors.contiguous(),
        adds,
        *answers,
        tokens,
        heads,
        0 if left is None else left.shape[3],
        rank,
        **_sizes(size, left, scale),
        RANKP=max(16, triton.next_power_of_2(rank)),
        KEPT8=bits == 8,
        TINY=TINY,
        num_warps=8,
    )
    return answers


def _operands(
    lost: Tensor,
    values: Tensor,
    scale: Tensor | None,
    left: Tensor | None,
    left_scale: Tensor | None,
    right: Tensor | None,
    added: Tensor | None,
) -> tuple[Tensor | None, ...]:
    one = torch.ones((), device=lost.device) if added is None else added
    return lost, values, scale, left, left_scale, None if right is None else right.contiguous(), one


def _sizes(size: int, left: Tensor | None, scale: Tensor | None) -> dict[str, int | bool]:
    wide = max(16, triton.next_power_of_2(size))
    rank = 16 if left is None else max(16, triton.next_power_of_2(left.shape[3]))
    return {"BN": TILE, "D": size, "DP": wide, "RP": rank, "SCALED": scale is not None, "TREND": left is not None}


def _empty(lost: Tensor, rank: int, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, tokens, size = lost.shape
    dtype = torch.int8 if bits == 8 else lost.dtype
    dense, left = (torch.empty(batch, tokens, heads, w, dtype=dtype, device=lost.device) for w in (size, rank))
    shape = (batch, heads, tokens) if bits == 8 else (0,)
    scales = [torch.empty(shape, dtype=torch.float32, device=lost.device) for _ in range(2)]
    return dense, scales[0], left, scales[1]


def _fake_differences(lost: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    batch, heads, _, size = lost.shape
    return lost.new_empty(batch, heads, size, size, dtype=torch.float32), lost.new_empty(2, dtype=torch.float32)


def _fake_entry(lost: Tensor, *args: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, vectors, _adds, bits = args
    assert isinstance(vectors, Tensor)
    assert isinstance(bits, int)
    return _empty(lost, vectors.shape[3], bits)


_differences_op = Op(
    "residual_differences", differences_reference, _fake_differences, cuda={"Triton": launch_differences}
)
_entry_op = Op("residual_entry", entry_reference, _fake_entry, cuda={"Triton": launch_entry})
