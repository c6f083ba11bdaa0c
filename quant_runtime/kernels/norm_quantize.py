"""A modulated layer norm, rounded: what AdaLN feeds a quantized linear layer, with the residual before it, in one pass.

x             float [B, N, K]; with y [B, N, K] and gate, x + gate * y stands in its place
shift, scale, gate  float [B, K]; or [B, 2, K]: [:, 0] is of the `first` tokens in front, [:, 1] of those behind them
h             norm(x) * (1 + scale) + shift, a layer norm without weights of its own
q  int8 or float8_e4m3fn [B * N, K], row_scale  float32 [B * N]: h, times factor float32 [K] or None, rounded to
              `dtype` as quantize_rows rounds, but that a GPU may fuse the product before it
x'            x, or x + gate * y in x's dtype, which is what is normalized then

norm_modulate answers h in x's dtype instead, for layers that rotate their input. All in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from quant_runtime.kernels import quantize_rows as rounding
from quant_runtime.kernels._triton import jit, tl, triton
from quant_runtime.kernels._versions import Op
from quant_runtime.kernels.quantize_rows import TINY, stored

LARGEST_K = 16_384  # a row is held in registers
COLUMNS = 256  # of a part of a row that a warp has: 16 bytes of 16-bit numbers a thread, in one load


def norm_quantize(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-6,
    bits: int = 8,
    factor: Tensor | None = None,
    first: int = 0,
    dtype: torch.dtype = torch.int8,
) -> tuple[Tensor, Tensor, Tensor]:
    """(q, row_scale, x'). Refuses operands that do not fit, and K above 16,384."""
    _check("norm_quantize", x, shift, scale, y, gate, first)
    rounding.check_target("norm_quantize", bits, dtype)
    if factor is not None and factor.shape != x.shape[2:]:
        raise ValueError(f"norm_quantize takes a factor [{x.shape[2]}] or None; got {list(factor.shape)}")
    q, row_scale, added = _op(x, shift, scale, y, gate, eps, bits, factor, first, dtype)
    return q, row_scale, x if y is None else added


def norm_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-6,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """(h, x')."""
    _check("norm_modulate", x, shift, scale, y, gate, first)
    h, added = _plain(x, shift, scale, y, gate, eps, first)
    return h, x if y is None else added


def _check(op: str, x: Tensor, shift: Tensor, scale: Tensor, y: Tensor | None, gate: Tensor | None, first: int) -> None:
    if x.dim() != 3 or not x.is_floating_point() or x.shape[2] > LARGEST_K:
        raise ValueError(f"{op} takes float [B, N, K], K up to {LARGEST_K}; got {x.dtype} {list(x.shape)}")
    batch, tokens, k = x.shape
    row = (batch, 2, k) if shift.dim() == 3 else (batch, k)
    if shift.shape != row or scale.shape != row or (y is None) != (gate is None):
        raise ValueError(f"{op} takes shift and scale {list(row)}, y and gate both or none; got {list(shift.shape)}, "
                         f"{list(scale.shape)}, y {'not ' if y is None else ''}given")  # fmt: skip
    if y is not None and gate is not None and (y.shape != x.shape or y.dtype != x.dtype or gate.shape != row):
        found = f"{y.dtype} {list(y.shape)} and {list(gate.shape)}"
        raise ValueError(f"{op} takes y as {x.dtype} {list(x.shape)} and gate {list(row)}; got {found}")
    if not 0 <= first <= (tokens if shift.dim() == 3 else 0):
        raise ValueError(
            f"{op} takes first up to {tokens}, with a shift [B, 2, K]; got {first} and {list(shift.shape)}"
        )


def reference(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    eps: float,
    bits: int,
    factor: Tensor | None,
    first: int,
    dtype: torch.dtype = torch.int8,
) -> tuple[Tensor, Tensor, Tensor]:
    h, added = _real(x, shift, scale, y, gate, eps, first)
    return *rounding.reference(h.flatten(0, 1), bits, factor, dtype), added


def plain_reference(
    x: Tensor, shift: Tensor, scale: Tensor, y: Tensor | None, gate: Tensor | None, eps: float, first: int
) -> tuple[Tensor, Tensor]:
    h, added = _real(x, shift, scale, y, gate, eps, first)
    return h.to(x.dtype), added


def _real(
    x: Tensor, shift: Tensor, scale: Tensor, y: Tensor | None, gate: Tensor | None, eps: float, first: int
) -> tuple[Tensor, Tensor]:
    """h in float32, and x' (empty where nothing was added)."""
    added = x.new_empty(0)
    if y is not None and gate is not None:
        added = (x.float() + by_token(gate.float(), x, first) * y.float()).to(x.dtype)
        x = added
    h = F.layer_norm(x.float(), (x.shape[2],), eps=eps)
    return h * (1 + by_token(scale.float(), x, first)) + by_token(shift.float(), x, first), added


def by_token(modulation: Tensor, x: Tensor, first: int) -> Tensor:
    """[B, K] or [B, 2, K] as what multiplies x [B, N, K]."""
    if modulation.dim() == 2:
        return modulation[:, None]
    front, behind = (part[:, None] for part in modulation.unbind(1))
    return torch.cat([front.expand(-1, first, -1), behind.expand(-1, x.shape[1] - first, -1)], dim=1)


def warps_of(columns: int) -> int:
    """Of a row: a thread holds up to 56 numbers. More take registers that other rows' programs would have."""
    return int(triton.next_power_of_2(triton.cdiv(columns, 56 * 32)))


@jit
def _norm_quantize(
    x,
    shift,
    scale,
    y,
    gate,
    factor,
    added,
    h,
    q,
    row_scale,
    N,
    first,
    eps,
    top,
    x_b,
    x_n,
    y_b,
    y_n,
    mod_b,
    mod_p,
    gate_b,
    gate_p,
    TINY: tl.constexpr,
    GATED: tl.constexpr,
    FACTOR: tl.constexpr,
    QUANTIZE: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    n = (tl.program_id(0) + tl.arange(0, 1)).to(tl.int64)  # a list of one, as store_rounded takes it
    part = (n >= first).to(tl.int64)[:, None]
    row, n = b * N + n, n[:, None]
    wide = row[:, None] * K
    raw, more, reals, parts = no_parts(), no_parts(), no_parts(), no_parts()
    for start in tl.static_range(0, K, BK):
        raw += (load_part(x + b * x_b + n * x_n, start, 0, K, BK),)
        if GATED:
            more += (load_part(y + b * y_b + n * y_n, start, 0, K, BK),)
    sums = tl.zeros((1, BK), tl.float32)
    for start in tl.static_range(0, K, BK):
        real = raw[start // BK].to(tl.float32)
        if GATED:
            by = load_part(gate + b * gate_b + part * gate_p, start, 0, K, BK).to(tl.float32)
            kept = (real + by * more[start // BK].to(tl.float32)).to(added.dtype.element_ty)
            store_part(added + wide, kept, start, K, BK)
            real = kept.to(tl.float32)
        reals += (real,)
        sums += real
    mean, squares = (tl.sum(sums, axis=1) / K)[:, None], tl.zeros((1, BK), tl.float32)
    for start in tl.static_range(0, K, BK):
        apart = reals[start // BK] - mean
        if start + BK > K:
            apart = tl.where(start + tl.arange(0, BK)[None, :] < K, apart, 0.0)
        squares += apart * apart
    by = tl.math.rsqrt(tl.sum(squares, axis=1) / K + eps)[:, None]
    most = tl.zeros((1, BK), tl.float32)
    for start in tl.static_range(0, K, BK):
        real = (reals[start // BK] - mean) * by
        real *= 1.0 + load_part(scale + b * mod_b + part * mod_p, start, 0, K, BK).to(tl.float32)
        real += load_part(shift + b * mod_b + part * mod_p, start, 0, K, BK).to(tl.float32)
        if FACTOR:
            real *= load_part(factor, start, 0, K, BK)
        if start + BK > K:
            real = tl.where(start + tl.arange(0, BK)[None, :] < K, real, 0.0)
        if QUANTIZE:
            parts += (real,)
            most = larger(most, tl.abs(real))
        else:
            store_part(h + wide, real.to(h.dtype.element_ty), start, K, BK)
    if QUANTIZE:
        store_rounded(parts, most, q + wide, row_scale + row, top, TINY, K, BK)


@jit
def no_parts():
    """What the parts of a row are added to, one after the other."""
    return ()


@jit
def load_part(x, start: tl.constexpr, J: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    """Columns start .. start + BK of rows at x, zeros before J and from K on. What reaches over neither has no mask."""
    k = start + tl.arange(0, BK)[None, :]
    if start >= J and start + BK <= K:
        return tl.load(x + k)
    else:  # noqa: RET505  only the one that is meant is compiled
        return tl.load(x + k, mask=(k >= J) & (k < K), other=0.0)


@jit
def store_part(to, values, start: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    k = start + tl.arange(0, BK)[None, :]
    if start + BK <= K:
        tl.store(to + k, values)
    else:
        tl.store(to + k, values, mask=k < K)


@jit
def larger(a, b):
    """Of each two numbers the larger, or NaN if one is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@jit
def store_rounded(parts, most, q, row_scale, top, TINY: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    """A row, in parts held in registers, and over these the `larger` of their sizes: its scale and its numbers, as
    quantize_rows has them."""
    broken = tl.max((most != most).to(tl.float32), axis=1)  # tl.max passes over NaN
    largest = tl.maximum(tl.max(most, axis=1), TINY)
    scale = tl.where(broken > 0, float("nan"), tl.math.div_rn(largest, top + tl.zeros_like(largest)))
    tl.store(row_scale, scale)
    inverse = tl.math.div_rn(1.0 + tl.zeros_like(scale), scale)[:, None]
    for start in tl.static_range(0, K, BK):
        store_part(q, stored(parts[start // BK] * inverse, q), start, K, BK)


def launch(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    eps: float,
    bits: int,
    factor: Tensor | None,
    first: int,
    dtype: torch.dtype = torch.int8,
) -> tuple[Tensor, Tensor, Tensor]:
    if not rounding.converts(dtype, x.device):
        return reference(x, shift, scale, y, gate, eps, bits, factor, first, dtype)
    rows = x.shape[0] * x.shape[1]
    q = torch.empty(rows, x.shape[2], dtype=dtype, device=x.device)
    row_scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    added = _launch(x, shift, scale, y, gate, eps, rounding.top(bits, dtype), factor, None, q, row_scale, first)
    return q, row_scale, added


def launch_plain(
    x: Tensor, shift: Tensor, scale: Tensor, y: Tensor | None, gate: Tensor | None, eps: float, first: int
) -> tuple[Tensor, Tensor]:
    h = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return h, _launch(x, shift, scale, y, gate, eps, 1.0, None, h, None, None, first)


def _launch(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    eps: float,
    top: float,
    factor: Tensor | None,
    h: Tensor | None,
    q: Tensor | None,
    row_scale: Tensor | None,
    first: int,
) -> Tensor:
    batch, tokens, k = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    shift, scale = (t if t.stride(-1) == 1 else t.contiguous() for t in (shift, scale))
    if shift.stride() != scale.stride():
        shift, scale = shift.contiguous(), scale.contiguous()
    added = torch.empty(batch, tokens, k, dtype=x.dtype, device=x.device) if y is not None else x.new_empty(0)
    y = y if y is None or y.stride(2) == 1 else y.contiguous()
    gate = gate if gate is None or gate.stride(-1) == 1 else gate.contiguous()
    mod_p, gate_p = (0 if t is None or t.dim() == 2 else t.stride(1) for t in (shift, gate))
    warps = warps_of(k)
    _norm_quantize[(tokens, batch)](
        x,
        shift,
        scale,
        y,
        gate,
        factor,
        added,
        h,
        q,
        row_scale,
        tokens,
        first,
        eps,
        top,
        x.stride(0),
        x.stride(1),
        0 if y is None else y.stride(0),
        0 if y is None else y.stride(1),
        shift.stride(0),
        mod_p,
        0 if gate is None else gate.stride(0),
        gate_p,
        TINY=TINY,
        GATED=y is not None,
        FACTOR=factor is not None,
        QUANTIZE=q is not None,
        K=k,
        BK=COLUMNS * warps,
        num_warps=warps,
    )
    return added


def _fake(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    eps: float,
    bits: int,
    factor: Tensor | None,
    first: int,
    dtype: torch.dtype = torch.int8,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[0] * x.shape[1]
    q, row_scale = x.new_empty(rows, x.shape[2], dtype=dtype), x.new_empty(rows, dtype=torch.float32)
    return q, row_scale, x.new_empty(0 if y is None else x.shape)


def _fake_plain(
    x: Tensor, shift: Tensor, scale: Tensor, y: Tensor | None, gate: Tensor | None, eps: float, first: int
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0 if y is None else x.shape)


# The references serve a CPU as well: beside a matmul these passes are little there.
_op = Op("norm_quantize", reference, _fake, cuda={"Triton": launch})
_plain = Op("norm_modulate", plain_reference, _fake_plain, cuda={"Triton": launch_plain})
