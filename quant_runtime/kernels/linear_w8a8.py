"""y = (x @ w.T) * x_scale * w_scale + bias: int8 operands, exact integer sums, one rounding at the end.

x  int8 [M, K]      w  int8 [N, K]      y  [M, N] in out_dtype: float32, bfloat16 or float16
x_scale  float32 [M], one per row       w_scale  float32 [N], one per output channel       bias  any float [N], or None

`out`, where it is given, is written to and returned: a contiguous [M, N] of out_dtype, such as some rows of what
several layers fill together. The sums are int32: K is at most 131,072, whatever the operands hold.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quant_runtime.kernels import _cuda, linear_w8a8_sm90
from quant_runtime.kernels._cpu import EXACT_INPUTS, operand, product_name, products, row_chunks, scratch
from quant_runtime.kernels._triton import TensorDescriptor, jit, processors, shared_kib, tl, triton
from quant_runtime.kernels._versions import PART_ELEMENTS, Op

LARGEST_K = 131_072  # 2**17 products of at most 2**14 fill an int32
OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEW_ROWS = 64  # up to here a small tile; the rest of the card waits for weights anyway
PERSISTENT_KIB = 215  # of shared memory: three tiles of each operand, and one of y
HOPPER = "CUDA for sm_90a, Triton for few rows"  # and for answers in float32, and rows at odd places
WIDE = 1 << 24  # weights of more bytes are shared by more rows at a time, while half of a Hopper's cache holds them


def linear_w8a8(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
) -> Tensor:
    if x.dim() != 2 or w.dim() != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"linear_w8a8 takes x [M, K] and w [N, K]; got {list(x.shape)} and {list(w.shape)}")
    if x.dtype != torch.int8 or w.dtype != torch.int8:
        raise ValueError(f"linear_w8a8 takes x and w as int8; got {x.dtype} and {w.dtype}")
    check_sums("linear_w8a8", x)
    check_epilogue("linear_w8a8", x, w.shape[0], x_scale, w_scale, bias, out_dtype, out)
    if out is None:
        y: Tensor = _op(x, w, x_scale, w_scale, bias, out_dtype)
        return y
    _into(x, w, x_scale, w_scale, bias, out)
    return out


def check_sums(op: str, x: Tensor) -> None:
    if x.shape[1] > LARGEST_K:
        raise ValueError(f"{op} adds up at most {LARGEST_K} products in int32; got K={x.shape[1]}")


def check_epilogue(
    op: str,
    x: Tensor,
    n: int,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    out: Tensor | None,
) -> None:
    if x_scale.shape != x.shape[:1] or w_scale.shape != (n,) or (bias is not None and bias.shape != (n,)):
        shapes = [None if t is None else list(t.shape) for t in (x_scale, w_scale, bias)]
        raise ValueError(f"{op} takes x_scale [{x.shape[0]}], w_scale [{n}] and bias [{n}] or None; got {shapes}")
    if x_scale.dtype != torch.float32 or w_scale.dtype != torch.float32:
        raise ValueError(f"{op} takes its scales as float32; got {x_scale.dtype} and {w_scale.dtype}")
    if out_dtype not in OUT_DTYPES:
        raise ValueError(f"{op} answers in float32, bfloat16 or float16; got out_dtype={out_dtype}")
    if out is not None and (out.shape != (x.shape[0], n) or out.dtype != out_dtype or not out.is_contiguous()):
        found = f"{out.dtype} {list(out.shape)}, strides {out.stride()}"
        raise ValueError(f"{op}: out is a contiguous {out_dtype} [{x.shape[0]}, {n}]; got {found}")


def reference(
    x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    sums = x.double() @ w.double().T  # float64 holds every dot product of int8, and of e4m3, exactly
    out = sums * x_scale[:, None] * w_scale
    return (out if bias is None else out + bias).to(out_dtype)


def in_parts(
    x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """Plain torch: float32 products over few enough inputs to count exactly, some rows at a time."""
    y = torch.empty(x.shape[0], w.shape[0], dtype=out_dtype, device=x.device)
    step = max(1, PART_ELEMENTS // max(w.shape))
    for start in range(0, x.shape[0], step):
        rows = slice(start, start + step)
        sums = torch.zeros(y[rows].shape, dtype=torch.int32, device=x.device)
        for k in range(0, x.shape[1], EXACT_INPUTS):
            some = slice(k, k + EXACT_INPUTS)
            sums += (x[rows, some].float() @ w[:, some].float().T).to(torch.int32)
        real = sums * w_scale * x_scale[rows, None]
        y[rows] = (real if bias is None else real + bias).to(out_dtype)
    return y


def on_cpu(
    x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    y = torch.empty(x.shape[0], w.shape[0], dtype=out_dtype)
    offset = None if bias is None else bias.float()
    weights = operand(w, "linear weights")
    for rows in row_chunks(x.shape[0], max(w.shape)):
        out = y[rows]
        real = out if out_dtype == torch.float32 else scratch("linear", tuple(out.shape), torch.float32)
        products(operand(x[rows], "linear rows"), weights, real)
        finish(real, x_scale[rows], w_scale, offset, out)
    return y


def finish(sums: Tensor, x_scale: Tensor, w_scale: Tensor, offset: Tensor | None, out: Tensor) -> None:
    """Some rows of y from their float32 sums, which are overwritten and may be `out`; offset is the bias in float32."""
    sums.mul_(w_scale)
    if offset is None:
        sums.mul_(x_scale[:, None])
    else:
        torch.addcmul(offset, sums, x_scale[:, None], out=sums)
    if sums is not out:
        out.copy_(sums)


@jit
def _linear_w8a8(
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
def _linear_w8a8_persistent(
    x,
    w,
    x_scale,
    w_scale,
    bias,
    y,
    M,
    N,
    K,
    PROGRAMS,
    BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One program a processor, block after block of y. x, w and y are descriptors: the copy engine reads and writes."""
    row_blocks, col_blocks = tl.cdiv(M, BM), tl.cdiv(N, BN)
    for block in tl.range(tl.program_id(0), row_blocks * col_blocks, PROGRAMS, flatten=True):
        row_block, col_block = neighbours(block, row_blocks, col_blocks, GROUP)
        sums = tl.zeros((BM, BN), dtype=tl.int32)
        for start in tl.range(0, K, BK):  # beyond an edge the copy engine reads zeros
            a, b = x.load([row_block * BM, start]), w.load([col_block * BN, start])
            sums = tl.dot(a, tl.trans(b), sums, out_dtype=tl.int32)
        rows, cols = row_block * BM + tl.arange(0, BM), col_block * BN + tl.arange(0, BN)
        out = scaled(sums, x_scale, w_scale, bias, rows, cols, M, N, BIAS)
        y.store([row_block * BM, col_block * BN], out.to(y.dtype))


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
    out = scaled(sums, x_scale, w_scale, bias, rows, cols, M, N, BIAS)
    y_block = y + rows.to(tl.int64)[:, None] * N + cols[None, :]
    tl.store(y_block, out.to(y.dtype.element_ty), mask=(rows < M)[:, None] & (cols < N)[None, :])


@jit
def scaled(sums, x_scale, w_scale, bias, rows, cols, M, N, BIAS: tl.constexpr):
    out = sums.to(tl.float32) * tl.load(w_scale + cols, mask=cols < N, other=0.0)[None, :]
    out *= tl.load(x_scale + rows, mask=rows < M, other=0.0)[:, None]
    if BIAS:
        out += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    return out


def launch(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    (m, k), n = x.shape, w.shape[0]
    y = torch.empty(m, n, dtype=out_dtype, device=x.device) if out is None else out
    x, w, x_scale, w_scale = (t.contiguous() for t in (x, w, x_scale, w_scale))
    bias = None if bias is None else bias.contiguous()
    if m > FEW_ROWS and _described(x, w, y) and shared_kib(x.device) >= PERSISTENT_KIB:
        bm, bn, bk = (128, 256, 128) if y.element_size() == 2 else (128, 128, 128)  # two tiles of y fill the memory
        blocks = ((x, [bm, bk]), (w, [bn, bk]), (y, [bm, bn]))
        dx, dw, dy = (TensorDescriptor.from_tensor(t, block) for t, block in blocks)
        programs = min(processors(x.device), triton.cdiv(m, bm) * triton.cdiv(n, bn))
        group = 16 if n * k > WIDE else 8
        sizes = {"BM": bm, "BN": bn, "BK": bk, "GROUP": group, "num_warps": 8, "num_stages": 3}
        _linear_w8a8_persistent[(programs,)](
            dx, dw, x_scale, w_scale, bias, dy, m, n, k, programs, BIAS=bias is not None, **sizes
        )
        return y
    bm, bn, bk, warps = (128, 128, 128, 8) if m > FEW_ROWS else (32, 64, 128, 4)
    grid = (triton.cdiv(m, bm) * triton.cdiv(n, bn),)
    sizes = {"BM": bm, "BN": bn, "BK": bk, "GROUP": 8, "num_warps": warps}
    _linear_w8a8[grid](x, w, x_scale, w_scale, bias, y, m, n, k, BIAS=bias is not None, **sizes)
    return y


def launch_hopper(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """On a Hopper: by hand where that takes the operands, else by Triton."""
    y = torch.empty(x.shape[0], w.shape[0], dtype=out_dtype, device=x.device) if out is None else out
    x, w, x_scale, w_scale = (t.contiguous() for t in (x, w, x_scale, w_scale))
    bias = None if bias is None else bias.contiguous()
    if not linear_w8a8_sm90.takes(x, w, y, bias):
        return launch(x, w, x_scale, w_scale, bias, out_dtype, y)
    linear_w8a8_sm90.launch(x, w, x_scale, w_scale, bias, y)
    return y


def _described(*tensors: Tensor) -> bool:
    """Whether the copy engine takes them: rows and beginnings at multiples of 16 bytes."""
    return all(t.data_ptr() % 16 == 0 and t.shape[1] * t.element_size() % 16 == 0 for t in tensors)


def _fake(
    x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[0], dtype=out_dtype)


def writing(version: Callable[..., Tensor]) -> Callable[..., None]:
    """The version that writes its answer into its last argument, in that one's dtype."""

    def write(*args: object) -> None:
        *operands, out = args
        assert isinstance(out, Tensor)
        out.copy_(version(*operands, out.dtype))

    return write


def _reference_into(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, out: Tensor) -> None:
    out.copy_(reference(x, w, x_scale, w_scale, bias, out.dtype))


def into(version: Callable[..., Tensor]) -> Callable[..., None]:
    """The version that is given its last argument to write its answer to, in that one's dtype."""

    def write(*args: object) -> None:
        *operands, out = args
        assert isinstance(out, Tensor)
        version(*operands, out.dtype, out)

    return write


# _versions.py has the table: the CPU's exact products there, ours on CUDA, and behind either what is plain torch.
_op = Op(
    "linear_w8a8",
    reference,
    _fake,
    cpu={product_name: on_cpu},
    cuda={HOPPER: launch_hopper, "Triton": launch},
    on={HOPPER: _cuda.is_hopper},
    plain=in_parts,
)
_into = Op(
    "linear_w8a8_into",
    _reference_into,
    cpu={product_name: writing(on_cpu)},
    cuda={HOPPER: into(launch_hopper), "Triton": into(launch)},
    on={HOPPER: _cuda.is_hopper},
    plain=writing(in_parts),
    mutates=("out",),
)
