"""y = (x @ w.T) * x_scale * w_scale + bias with w packed in 2 to 7 bits: the sums of linear_w8a8, fewer bytes.

x  int8 [M, K]      packed  uint8 [N, packed_bytes(K, bits)], as in unpack
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


def linear_packed(
    x: Tensor,
    packed: Tensor,
    bits: int,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
) -> Tensor:
    if x.dim() != 2 or x.dtype != torch.int8:
        raise ValueError(f"linear_packed takes x as int8 [M, K]; got {x.dtype} {list(x.shape)}")
    unpack.check_packed("linear_packed", packed, x.shape[1], bits)
    linear_w8a8.check_sums("linear_packed", x)
    linear_w8a8.check_epilogue("linear_packed", x, packed.shape[0], x_scale, w_scale, bias, out_dtype, out)
    if out is None:
        y: Tensor = _op(x, packed, bits, x_scale, w_scale, bias, out_dtype)
        return y
    _into(x, packed, bits, x_scale, w_scale, bias, out)
    return out


def reference(
    x: Tensor, packed: Tensor, bits: int, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    w = unpack.reference(packed, x.shape[1], bits)
    return linear_w8a8.reference(x, w, x_scale, w_scale, bias, out_dtype)


def in_parts(
    x: Tensor, packed: Tensor, bits: int, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    w = unpack.reference(packed, x.shape[1], bits)
    return linear_w8a8.in_parts(x, w, x_scale, w_scale, bias, out_dtype)


def on_cpu(
    x: Tensor, packed: Tensor, bits: int, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    w = unpack.unpack_into(scratch("linear_packed", (packed.shape[0], x.shape[1]), torch.int8), packed, bits)
    return linear_w8a8.on_cpu(x, w, x_scale, w_scale, bias, out_dtype)


@jit
def _linear_packed(
    x,
    packed,
    x_scale,
    w_scale,
    bias,
    y,
    M,
    N,
    K,
    UNIT,
    BITS: tl.constexpr,
    NARROWEST: tl.constexpr,
    WIDEST: tl.constexpr,
    BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Each part of a row (unpack._unpack says what that is) is multiplied by the inputs that it is for."""
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    in_rows, in_cols = rows < M, cols < N
    x_rows = x + rows.to(tl.int64)[:, None] * K
    w_cols = packed + cols.to(tl.int64)[None, :] * UNIT * (BITS // NARROWEST)
    units: tl.constexpr = WIDEST // NARROWEST

    sums = tl.zeros((BM, BN), dtype=tl.int32)
    for start in range(0, UNIT, BK):
        j = start + tl.arange(0, BK)
        there = in_cols[None, :] & (j < UNIT)[:, None]
        for unit in tl.static_range(units):
            planes = unpack.planes_of(w_cols + j[:, None], there, unit, UNIT, BITS, NARROWEST, WIDEST)
            for turn in tl.static_range(8 // WIDEST):
                part = unit + turn * units
                k = part * UNIT + j
                a = tl.load(x_rows + k[None, :], mask=in_rows[:, None] & ((j < UNIT) & (k < K))[None, :], other=0)
                b = unpack.whole_of(planes, part, 1, BITS, NARROWEST, WIDEST)
                sums = tl.dot(a, b, sums, out_dtype=tl.int32)

    linear_w8a8.store_scaled(sums, x_scale, w_scale, bias, y, rows, cols, M, N, BIAS)


def launch(
    x: Tensor,
    packed: Tensor,
    bits: int,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    out: Tensor | None = None,
    *,
    multiply: Callable[..., Tensor] = linear_w8a8.launch,
) -> Tensor:
    if x.shape[0] > linear_w8a8.FEW_ROWS:
        w = unpack.launch(packed, x.shape[1], bits)
        return multiply(x, w, x_scale, w_scale, bias, out_dtype, out)
    return launch_few_rows(x, packed, bits, x_scale, w_scale, bias, out_dtype, out)


launch_hopper = partial(launch, multiply=linear_w8a8.launch_hopper)


def launch_few_rows(
    x: Tensor,
    packed: Tensor,
    bits: int,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    (m, k), n, narrowest = x.shape, packed.shape[0], bits & -bits
    bias = None if bias is None else bias.contiguous()
    y = torch.empty(m, n, dtype=out_dtype, device=x.device) if out is None else out
    bm, bn, bk = (16, 32, 128) if m <= 16 else (64, 32, 128 if bits in (2, 4) else 64)  # of several planes more is held
    operands = (x.contiguous(), packed.contiguous().view(torch.int8), x_scale.contiguous(), w_scale.contiguous())
    sizes = {"BITS": bits, "NARROWEST": narrowest, "WIDEST": unpack.planes(k, bits)[0][0]}
    grid = (triton.cdiv(n, bn), triton.cdiv(m, bm))
    _linear_packed[grid](
        *operands, bias, y, m, n, k, packed.shape[1] * narrowest // bits, **sizes, BIAS=bias is not None,
        BM=bm, BN=bn, BK=bk,
    )  # fmt: skip
    return y


def _fake(
    x: Tensor, packed: Tensor, bits: int, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    return x.new_empty(x.shape[0], packed.shape[0], dtype=out_dtype)


def _reference_into(
    x: Tensor, packed: Tensor, bits: int, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    out.copy_(reference(x, packed, bits, x_scale, w_scale, bias, out.dtype))


_op = Op(
    "linear_packed",
    reference,
    _fake,
    cpu={product_name: on_cpu},
    cuda={HOPPER: launch_hopper, "Triton": launch},
    on={HOPPER: _cuda.is_hopper},
    plain=in_parts,
)
_into = Op(
    "linear_packed_into",
    _reference_into,
    cpu={product_name: writing(on_cpu)},
    cuda={HOPPER: into(launch_hopper), "Triton": into(launch)},
    on={HOPPER: _cuda.is_hopper},
    plain=writing(in_parts),
    mutates=("out",),
)
