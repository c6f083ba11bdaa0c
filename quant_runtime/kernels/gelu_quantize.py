"""GELU, rounded: what an MLP's second layer is fed, in one pass.

x       float [M, K]: gelu(x), in its tanh form, or with `exact` as it is defined, by the error function
before  float [M, J] of x's dtype, or None: stands before it as it is, where a layer projects attention and MLP together
q  int8 or float8_e4m3fn [M, J + K], row_scale  float32 [M]: both, times factor float32 [J + K] or None, rounded to
        `dtype` as quantize_rows rounds, but that a GPU may fuse the product before it

All in float32, but Triton's `exact`, which is off by a millionth at most: less than rounding is, unless all of a row is
below -3.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from quant_runtime.kernels import quantize_rows as rounding
from quant_runtime.kernels._triton import jit, tl
from quant_runtime.kernels._versions import Op, in_rows
from quant_runtime.kernels.norm_quantize import COLUMNS, larger, load_part, no_parts, store_rounded, warps_of
from quant_runtime.kernels.quantize_rows import TINY

LARGEST_K = 32_768  # a row is held in registers


def gelu_quantize(
    x: Tensor,
    before: Tensor | None = None,
    bits: int = 8,
    factor: Tensor | None = None,
    exact: bool = False,
    dtype: torch.dtype = torch.int8,
) -> tuple[Tensor, Tensor]:
    """(q, row_scale). Refuses operands that do not fit, and rows of more than 32,768."""
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"gelu_quantize takes float rows [M, K]; got {x.dtype} {list(x.shape)}")
    if before is not None and (before.dim() != 2 or len(before) != len(x) or before.dtype != x.dtype):
        found = f"{before.dtype} {list(before.shape)}"
        raise ValueError(f"gelu_quantize takes before as {x.dtype} [{len(x)}, J]; got {found}")
    width = x.shape[1] + (0 if before is None else before.shape[1])
    rounding.check_target("gelu_quantize", bits, dtype)
    if width > LARGEST_K or (factor is not None and factor.shape != (width,)):
        found = f"{width}, factor={None if factor is None else list(factor.shape)}"
        raise ValueError(f"gelu_quantize takes rows up to {LARGEST_K}, and a factor as wide; got {found}")
    q, row_scale = _op(x, before, bits, factor, exact, dtype)
    return q, row_scale


def reference(
    x: Tensor,
    before: Tensor | None,
    bits: int,
    factor: Tensor | None,
    exact: bool,
    dtype: torch.dtype = torch.int8,
) -> tuple[Tensor, Tensor]:
    real = F.gelu(x.float(), approximate="none" if exact else "tanh")
    real = real if before is None else torch.cat([before.float(), real], dim=1)
    return rounding.reference(real, bits, factor, dtype)


@jit
def _gelu_quantize(
    x,
    before,
    factor,
    q,
    row_scale,
    x_m,
    before_m,
    top,
    TINY: tl.constexpr,
    BEFORE: tl.constexpr,
    FACTOR: tl.constexpr,
    EXACT: tl.constexpr,
    J: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
):
    row = (tl.program_id(0) + tl.arange(0, 1)).to(tl.int64)  # a list of one, as store_rounded takes it
    at = row[:, None]
    raw, parts, most = no_parts(), no_parts(), tl.zeros((1, BK), tl.float32)
    for start in tl.static_range(0, J + K, BK):
        raw += (load_part(x + at * x_m - J, start, J, J + K, BK),)
    for start in tl.static_range(0, J + K, BK):
        real = raw[start // BK].to(tl.float32)
        real = _exact(real) if EXACT else _tanh(real)
        if BEFORE:
            real += load_part(before + at * before_m, start, 0, J, BK).to(tl.float32)
        if FACTOR:
            real *= load_part(factor, start, 0, J + K, BK)
        parts += (real,)
        most = larger(most, tl.abs(real))
    store_rounded(parts, most, q + at * (J + K), row_scale + row, top, TINY, J + K, BK)


@jit
def _exact(x):
    """x times the share of a normal distribution below it: max(x, 0) - a * 2 ** p(a), a = |x|.

    2 ** p is the share beyond a; an exponential of a polynomial is what CUDA's erff has for it as well, with more terms
    and another near zero, twice as many instructions. These terms, of a linear program, are those whose largest error,
    of the product, is the least: 4.5e-7. Rounding adds 2e-7. Beyond 7 p falls on, and the product is nothing.
    """
    a = tl.abs(x)
    p = -0.051827170 + a * (0.0070844614 + a * -0.00047329400)
    p = -1.0000377 + a * (-1.1507878 + a * (-0.45999265 + a * p))
    return tl.maximum(x, 0.0) - a * tl.exp2(p)


@jit
def _tanh(x):
    """x * (1 + tanh(u)) / 2 = x / (1 + exp(-2 u)), u = sqrt(2 / pi) * (x + 0.044715 x^3): its factors by -2 / ln 2."""
    return x / (1.0 + tl.exp2(x * (-2.302208198 - 0.1029432397 * x * x)))


def launch(
    x: Tensor,
    before: Tensor | None,
    bits: int,
    factor: Tensor | None,
    exact: bool,
    dtype: torch.dtype = torch.int8,
) -> tuple[Tensor, Tensor]:
    if not rounding.converts(dtype, x.device):
        q, row_scale = _plain(x, before, bits, factor, exact, dtype)
        return q, row_scale
    (rows, k), j = x.shape, 0 if before is None else before.shape[1]
    x = x if x.stride(1) == 1 else x.contiguous()
    before = before if before is None or before.stride(1) == 1 else before.contiguous()
    q = torch.empty(rows, j + k, dtype=dtype, device=x.device)
    row_scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    warps = min(2 * warps_of(j + k), 16)  # numbers of fewer rows wait for exponentials
    _gelu_quantize[(rows,)](
        x,
        before,
        factor,
        q,
        row_scale,
        x.stride(0),
        0 if before is None else before.stride(0),
        rounding.top(bits, dtype),
        TINY=TINY,
        BEFORE=before is not None,
        FACTOR=factor is not None,
        EXACT=exact,
        J=j,
        K=k,
        BK=COLUMNS * warps,
        num_warps=warps,
    )
    return q, row_scale


def _fake(
    x: Tensor,
    before: Tensor | None,
    bits: int,
    factor: Tensor | None,
    exact: bool,
    dtype: torch.dtype = torch.int8,
) -> tuple[Tensor, Tensor]:
    width = x.shape[1] + (0 if before is None else before.shape[1])
    return x.new_empty(len(x), width, dtype=dtype), x.new_empty(len(x), dtype=torch.float32)


# The reference serves a CPU as well: beside a matmul this pass is little there.
_plain = in_rows(reference, 1)
_op = Op("gelu_quantize", reference, _fake, cuda={"Triton": launch}, plain=_plain)
