"""GELU, rounded: what an MLP's second layer is fed, in one pass.

x       float [M, K]: gelu(x), in its tanh form, or with `exact` as it is defined, by the error function
before  float [M, J] of x's dtype, or None: stands before it as it is, where a layer projects attention and MLP together
q  int8 or float8_e4m3fn [M, J + K], row_scale  float32 [M]: both, times factor float32 [J + K] or None, rounded to
        `dtype` as quantize_rows rounds

All in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from quant_runtime.kernels import quantize_rows as rounding
from quant_runtime.kernels._triton import jit, tl, triton
from quant_runtime.kernels._versions import Op, in_rows
from quant_runtime.kernels.norm_quantize import store_rounded
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
    J,
    K,
    x_m,
    before_m,
    top,
    TINY: tl.constexpr,
    BEFORE: tl.constexpr,
    FACTOR: tl.constexpr,
    EXACT: tl.constexpr,
    KP: tl.constexpr,
):
    row, k = tl.program_id(0).to(tl.int64), tl.arange(0, KP)
    inside = k < J + K
    real = tl.load(x + row * x_m + k - J, mask=inside & (k >= J), other=0.0).to(tl.float32)
    if EXACT:
        real *= 0.5 + 0.5 * tl.math.erf(real * 0.7071067812)
    else:
        # x * (1 + tanh(u)) / 2 = x / (1 + exp(-2 u)), u = sqrt(2 / pi) * (x + 0.044715 x^3): its factors by -2 / ln 2
        real /= 1.0 + tl.exp2(real * (-2.302208198 - 0.1029432397 * real * real))
    if BEFORE:
        real += tl.load(before + row * before_m + k, mask=k < J, other=0.0).to(tl.float32)
    if FACTOR:
        real *= tl.load(factor + k, mask=inside, other=0.0)
    store_rounded(real, k, inside, q + row * (J + K), row_scale + row, top, TINY)


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
    wide = triton.next_power_of_2(j + k)
    _gelu_quantize[(rows,)](
        x,
        before,
        factor,
        q,
        row_scale,
        j,
        k,
        x.stride(0),
        0 if before is None else before.stride(0),
        rounding.top(bits, dtype),
        TINY=TINY,
        BEFORE=before is not None,
        FACTOR=factor is not None,
        EXACT=exact,
        KP=wide,
        num_warps=16 if j + k > 12_288 else 8 if wide > 4096 else 4,
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
