"""y = (x @ w.T) * x_scale * w_scale + bias: int8 operands, exact integer sums, one rounding at the end.

x  int8 [M, K]      w  int8 [N, K]      y  [M, N] in out_dtype: float32, bfloat16 or float16
x_scale  float32 [M], one per row       w_scale  float32 [N], one per output channel       bias  any float [N], or None

The sums are int32: K is at most 131,072, whatever the operands hold.
"""

from __future__ import annotations

import torch
from torch import Tensor, library

from quant_runtime.kernels._cpu import operand, products, row_chunks, scratch
from quant_runtime.kernels._triton import jit, tl, triton

LARGEST_K = 131_072  # 2**17 products of at most 2**14 fill an int32
OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def linear_w8a8(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    if x.dim() != 2 or w.dim() != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"linear_w8a8 takes x [M, K] and w [N, K]; got {list(x.shape)} and {list(w.shape)}")
    if x.dtype != torch.int8 or w.dtype != torch.int8:
        raise ValueError(f"linear_w8a8 takes x and w as int8; got {x.dtype} and {w.dtype}")
    check_epilogue("linear_w8a8", x, w.shape[0], x_scale, w_scale, bias, out_dtype)
    out: Tensor = _op(x, w, x_scale, w_scale, bias, out_dtype)
    return out


def check_epilogue(
    op: str, x: Tensor, n: int, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> None:
    if x_scale.shape != x.shape[:1] or w_scale.shape != (n,) or (bias is not None and bias.shape != (n,)):
        shapes = [None if t is None else list(t.shape) for t in (x_scale, w_scale, bias)]
        raise ValueError(f"{op} takes x_scale [{x.shape[0]}], w_scale [{n}] and bias [{n}] or None; got {shapes}")
    if x_scale.dtype != torch.float32 or w_scale.dtype != torch.float32:
        raise ValueError(f"{op} takes its scales as float32; got {x_scale.dtype} and {w_scale.dtype}")
    if out_dtype not in OUT_DTYPES:
        raise ValueError(f"{op} answers in float32, bfloat16 or float16; got out_dtype={out_dtype}")
    if x.shape[1] > LARGEST_K:
        raise ValueError(f"{op} adds up at most {LARGEST_K} products in int32; got K={x.shape[1]}")


def reference(
    x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    sums = x.double() @ w.double().T  # float64 holds every int8 dot product exactly
    out = sums * x_scale[:, None] * w_scale
    return (out if bias is None else out + bias).to(out_dtype)


def on_cpu(
    x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    y = torch.empty(x.shape[0], w.shape[0], dtype=out_dtype)
    offset = None if bias is None else bias.float()
    weights = operand(w, "linear weights")
    for rows in row_chunks(x.shape[0], max(w.shape)):
        out = y[rows]
        real = out if out_dtype == torch.float32 else scratch("linear", tuple(out.shape), torch.float32)
        products(operand(x[rows], "linear rows"), weights, real).mul_(w_scale)
        if offset is None:
            real.mul_(x_scale[rows, None])
        else:
            torch.addcmul(offset, real, x_scale[rows, None], out=real)
        if real is not out:
            out.copy_(real)
    return y


@jit
def _kernel(
    x,
    w,
    x_scale,
    w_scale,
    bias,
    y,
    M,
    N,
    K,
    BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_block, col_block = neighbours(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    rows = row_block * BM + tl.arange(0, BM)
    cols = col_block * BN + tl.arange(0, BN)
    in_rows, in_cols = rows < M, cols < N
    x_rows = x + rows.to(tl.int64)[:, None] * K  # 64 bits: M * K passes 2**31 on long videos
    w_cols = w + cols.to(tl.int64)[None, :] * K

    sums = tl.zeros((BM, BN), dtype=tl.int32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(x_rows + k[None, :], mask=in_rows[:, None] & (k < K)[None, :], other=0)
        b = tl.load(w_cols + k[:, None], mask=in_cols[None, :] & (k < K)[:, None], other=0)
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)

    store_scaled(sums, x_scale, w_scale, bias, y, rows, cols, M, N, BIAS)


@jit
def neighbours(program, row_blocks, col_blocks, GROUP: tl.constexpr):
    """Which block of y a program makes: GROUP row blocks share their columns' weights while these are in cache."""
    per_group = GROUP * col_blocks
    first = program // per_group * GROUP
    rows_here = tl.minimum(row_blocks - first, GROUP)
    return first + program % per_group % rows_here, program % per_group // rows_here


@jit
def store_scaled(sums, x_scale, w_scale, bias, y, rows, cols, M, N, BIAS: tl.constexpr):
    """One block of y: the scales of its rows and columns, the bias, one rounding."""
    in_rows, in_cols = rows < M, cols < N
    out = sums.to(tl.float32) * tl.load(w_scale + cols, mask=in_cols, other=0.0)[None, :]
    out *= tl.load(x_scale + rows, mask=in_rows, other=0.0)[:, None]
    if BIAS:
        out += tl.load(bias + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    y_block = y + rows.to(tl.int64)[:, None] * N + cols[None, :]
    tl.store(y_block, out.to(y.dtype.element_ty), mask=in_rows[:, None] & in_cols[None, :])


def launch(
    x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    (m, k), n = x.shape, w.shape[0]
    y = torch.empty(m, n, dtype=out_dtype, device=x.device)
    bm, bn, bk, warps = (128, 128, 128, 8) if m > 64 else (32, 64, 128, 4)
    grid = (triton.cdiv(m, bm) * triton.cdiv(n, bn),)
    operands = (x.contiguous(), w.contiguous(), x_scale.contiguous(), w_scale.contiguous())
    _kernel[grid](*operands, bias, y, m, n, k, BIAS=bias is not None, BM=bm, BN=bn, BK=bk, GROUP=8, num_warps=warps)
    return y


def _fake(
    x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[0], dtype=out_dtype)


# PyTorch's dispatcher is the registry: the reference everywhere, the CPU's exact products there, Triton on CUDA.
_op = library.custom_op("quant_runtime::linear_w8a8", reference, mutates_args=())
_op.register_kernel("cpu", on_cpu)
_op.register_kernel("cuda", launch)
_op.register_fake(_fake)
