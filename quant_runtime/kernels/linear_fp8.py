"""y = (x @ w.T) * x_scale * w_scale + bias: e4m3 operands, whose products are exact, sums in float32.

x  float8_e4m3fn [M, K]     w  float8_e4m3fn [N, K]     y  [M, N] in out_dtype: float32, bfloat16 or float16
x_scale  float32 [M], one per row       w_scale  float32 [N], one per output channel       bias  any float [N], or None

`out`, where it is given, is written to and returned, as linear_w8a8 has it.

On a GPU the matmul is torch._scaled_mm, which a kernel of our own has not beaten throughout: its rows and columns have
a scale each, and answers in bfloat16 leave it whole, the bias, rounded to bfloat16, inside. For other answers it gives
its float32 sums, and the scales are a pass of their own. It takes K and N in multiples of 16: zeros are put behind
others. Hopper adds FP8 products up in fewer bits than float32 has, as everybody's FP8 does there. A GPU without FP8
multiplies the same numbers in bfloat16, which holds them all: right, and no faster than bfloat16 is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from quant_runtime.kernels import linear_w8a8
from quant_runtime.kernels._cpu import row_chunks, scratch
from quant_runtime.kernels._fp8 import E4M3, has_fp8
from quant_runtime.kernels._versions import PART_ELEMENTS, Op
from quant_runtime.kernels.linear_w8a8 import check_epilogue, finish, into, writing

UNIT = 16  # of K and N, and bytes that operands begin at multiples of


def linear_fp8(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
) -> Tensor:
    if x.dim() != 2 or w.dim() != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"linear_fp8 takes x [M, K] and w [N, K]; got {list(x.shape)} and {list(w.shape)}")
    if x.dtype != E4M3 or w.dtype != E4M3:
        raise ValueError(f"linear_fp8 takes x and w as {E4M3}; got {x.dtype} and {w.dtype}")
    check_epilogue("linear_fp8", x, w.shape[0], x_scale, w_scale, bias, out_dtype, out)
    if out is None:
        y: Tensor = _op(x, w, x_scale, w_scale, bias, out_dtype)
        return y
    _into(x, w, x_scale, w_scale, bias, out)
    return out


def reference(
    x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    return linear_w8a8.reference(x, w, x_scale, w_scale, bias, out_dtype)


def on_cpu(
    x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    y = torch.empty(x.shape[0], w.shape[0], dtype=out_dtype)
    offset = None if bias is None else bias.float()
    weights = scratch("linear weights", tuple(w.shape), torch.float32).copy_(w)
    for rows in row_chunks(x.shape[0], max(w.shape)):
        out = y[rows]
        real = out if out_dtype == torch.float32 else scratch("linear", tuple(out.shape), torch.float32)
        some = scratch("linear rows", (len(out), x.shape[1]), torch.float32).copy_(x[rows])
        finish(torch.mm(some, weights.t(), out=real), x_scale[rows], w_scale, offset, out)
    return y


def launch(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    m, n = x.shape[0], w.shape[0]
    y = torch.empty(m, n, dtype=out_dtype, device=x.device) if out is None else out
    if not m or out_dtype != torch.bfloat16:
        return _by_sums(_fp8_sums, x, w, x_scale, w_scale, bias, y)
    short = -n % UNIT
    x, w = _padded(x, 0), _padded(w, short)
    w_scale = F.pad(w_scale, (0, short)) if short else w_scale.contiguous()
    inner = None if bias is None else F.pad(bias.to(torch.bfloat16), (0, short))
    scales = (x_scale.contiguous()[:, None], w_scale[None])
    multiply = partial(torch._scaled_mm, x, w.t(), *scales, bias=inner, out_dtype=out_dtype, use_fast_accum=True)
    return y.copy_(multiply()[:, :n]) if short or y.data_ptr() % UNIT else multiply(out=y)


def in_bfloat16(
    x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """For a GPU without FP8."""
    y = torch.empty(x.shape[0], w.shape[0], dtype=out_dtype, device=x.device)
    return _by_sums(_bfloat16_sums, x, w.to(torch.bfloat16), x_scale, w_scale, bias, y)


def in_parts(
    x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """Plain torch: float32 products and sums, some rows at a time."""
    y = torch.empty(x.shape[0], w.shape[0], dtype=out_dtype, device=x.device)
    return _by_sums(_float32_sums, x, w.float(), x_scale, w_scale, bias, y)


def _by_sums(
    sums_of: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    y: Tensor,
) -> Tensor:
    """y, from its float32 sums, some rows at a time."""
    offset, step = None if bias is None else bias.float(), max(1, PART_ELEMENTS // max(w.shape))
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        finish(sums_of(x[rows], w), x_scale[rows], w_scale, offset, y[rows])
    return y


def _fp8_sums(x: Tensor, w: Tensor) -> Tensor:
    one, n = torch.ones((), device=x.device), len(w)
    x, w = _padded(x, 0), _padded(w, -n % UNIT)
    return torch._scaled_mm(x, w.t(), one, one, out_dtype=torch.float32, use_fast_accum=True)[:, :n]


def _bfloat16_sums(x: Tensor, w: Tensor) -> Tensor:
    return torch.mm(x.to(torch.bfloat16), w.t(), out_dtype=torch.float32)


def _float32_sums(x: Tensor, w: Tensor) -> Tensor:
    return x.float() @ w.t()


def _padded(operand: Tensor, rows: int) -> Tensor:
    """As the library takes it: with zeros behind its columns to a multiple of 16, and so many rows of zeros."""
    columns = -operand.shape[1] % UNIT
    if rows or columns:
        return F.pad(operand.view(torch.uint8), (0, columns, 0, rows)).view(E4M3)
    operand = operand.contiguous()
    return operand.clone() if operand.data_ptr() % UNIT else operand


def _fake(
    x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[0], dtype=out_dtype)


def _reference_into(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, out: Tensor) -> None:
    out.copy_(reference(x, w, x_scale, w_scale, bias, out.dtype))


FP8, BFLOAT16 = "FP8, torch", "bfloat16, torch"  # the versions of a GPU
_op = Op(
    "linear_fp8",
    reference,
    _fake,
    cpu={"float32": on_cpu},
    cuda={FP8: launch, BFLOAT16: in_bfloat16},
    on={FP8: has_fp8},
    plain=in_parts,
)
_into = Op(
    "linear_fp8_into",
    _reference_into,
    cpu={"float32": writing(on_cpu)},
    cuda={FP8: into(launch), BFLOAT16: writing(in_bfloat16)},
    on={FP8: has_fp8},
    plain=writing(in_parts),
    mutates=("out",),
)
