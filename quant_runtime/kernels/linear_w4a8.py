"""y = (x @ w.T) * x_scale * w_scale + bias with w packed, two int4 in a byte: the sums of linear_w8a8, half the bytes.

x  int8 [M, K]      packed  uint8 [N, 8 · ceil(K/16)], 4 bits as in unpack
y  [M, N] in out_dtype: float32, bfloat16 or float16
x_scale  float32 [M]      w_scale  float32 [N]      bias  any float [N], or None

Many rows: the weights are unpacked ahead, which their matmul hides. Few rows: reading the weights is the time that it
takes, so the kernel unpacks what it has read.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from quant_runtime.kernels import _cuda, linear_w8a8, unpack
from quant_runtime.kernels._cpu import product_name, scratch
from quant_runtime.kernels._triton import jit, tl, triton
from quant_runtime.kernels._versions import Op
from quant_runtime.kernels.linear_w8a8 import HOPPER, into, writing


def linear_w4a8(
    x: Tensor,
    packed: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
) -> Tensor:
    if x.dim() != 2 or x.dtype != torch.int8:
        raise ValueError(f"linear_w4a8 takes x as int8 [M, K]; got {x.dtype} {list(x.shape)}")
    unpack.check_packed("linear_w4a8", packed, x.shape[1], 4)
    linear_w8a8.check_sums("linear_w4a8", x)
    linear_w8a8.check_epilogue("linear_w4a8", x, packed.shape[0], x_scale, w_scale, bias, out_dtype, out)
    if out is None:
        y: Tensor = _op(x, packed, x_scale, w_scale, bias, out_dtype)
        return y
    _into(x, packed, x_scale, w_scale, bias, out)
    return out


def reference(
    x: Tensor, packed: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    w = unpack.reference(packed, x.shape[1], 4)
    return linear_w8a8.reference(x, w, x_scale, w_scale, bias, out_dtype)


def in_parts(
    x: Tensor, packed: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    w = unpack.reference(packed, x.shape[1], 4)
    return linear_w8a8.in_parts(x, w, x_scale, w_scale, bias, out_dtype)


def on_cpu(
    x: Tensor, packed: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    w = unpack.unpack_into(scratch("linear_w4a8", (packed.shape[0], x.shape[1]), torch.int8), packed, 4)
    return linear_w8a8.on_cpu(x, w, x_scale, w_scale, bias, out_dtype)


@jit
def _linear_w4a8(
    x,
    packed,
    x_scale,
    w_scale,
    bias,
    y,
    M,
    N,
    K,
    HALF,
    BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    in_rows, in_cols = rows < M, cols < N
    x_rows = x + rows.to(tl.int64)[:, None] * K
    w_cols = packed + cols.to(tl.int64)[None, :] * HALF

    sums = tl.zeros((BM, BN), dtype=tl.int32)
    for start in range(0, HALF, BK):
        j = start + tl.arange(0, BK)
        bytes_ = tl.load(w_cols + j[:, None], mask=in_cols[None, :] & (j < HALF)[:, None], other=0)
        low, high = _halves(bytes_)
        a = tl.load(x_rows + j[None, :], mask=in_rows[:, None] & (j < K)[None, :], other=0)
        sums = tl.dot(a, low, sums, out_dtype=tl.int32)
        j += HALF
        a = tl.load(x_rows + j[None, :], mask=in_rows[:, None] & (j < K)[None, :], other=0)
        sums = tl.dot(a, high, sums, out_dtype=tl.int32)

    linear_w8a8.store_scaled(sums, x_scale, w_scale, bias, y, rows, cols, M, N, BIAS)


@jit
def _halves(byte):
    """The two int4 of a byte as int8, low and high: of inputs j and j + HALF."""
    whole = byte.to(tl.int32)
    return ((whole << 28) >> 28).to(tl.int8), ((whole << 24) >> 28).to(tl.int8)


def launch(
    x: Tensor,
    packed: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    out: Tensor | None = None,
    *,
    multiply: Callable[..., Tensor] = linear_w8a8.launch,
) -> Tensor:
    if x.shape[0] > linear_w8a8.FEW_ROWS:
        w = unpack.launch(packed, x.shape[1], 4)
        return multiply(x, w, x_scale, w_scale, bias, out_dtype, out)
    return launch_few_rows(x, packed, x_scale, w_scale, bias, out_dtype, out)


launch_hopper = partial(launch, multiply=linear_w8a8.launch_hopper)


def launch_few_rows(
    x: Tensor,
    packed: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    (m, k), (n, half) = x.shape, packed.shape
    y = torch.empty(m, n, dtype=out_dtype, device=x.device) if out is None else out
    bm, bn, bk = 16 if m <= 16 else 32, 64, 128
    operands = (x.contiguous(), packed.contiguous(), x_scale.contiguous(), w_scale.contiguous())
    grid = (triton.cdiv(n, bn), triton.cdiv(m, bm))
    _linear_w4a8[grid](*operands, bias, y, m, n, k, half, BIAS=bias is not None, BM=bm, BN=bn, BK=bk)
    return y


def _fake(
    x: Tensor, packed: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    return x.new_empty(x.shape[0], packed.shape[0], dtype=out_dtype)


def _reference_into(
    x: Tensor, packed: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    out.copy_(reference(x, packed, x_scale, w_scale, bias, out.dtype))


_op = Op(
    "linear_w4a8",
    reference,
    _fake,
    cpu={product_name: on_cpu},
    cuda={HOPPER: launch_hopper, "Triton": launch},
    on={HOPPER: _cuda.is_hopper},
    plain=in_parts,
)
_into = Op(
    "linear_w4a8_into",
    _reference_into,
    cpu={product_name: writing(on_cpu)},
    cuda={HOPPER: into(launch_hopper), "Triton": into(launch)},
    on={HOPPER: _cuda.is_hopper},
    plain=writing(in_parts),
    mutates=("out",),
)
