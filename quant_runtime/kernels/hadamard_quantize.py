"""quantize_rows(hadamard(x)) in one op: what a rotated layer does to its inputs, read once and written once.

x  float32, bfloat16 or float16 [M, K]      signs  int8 [K], each 1 or -1      block  a power of two that divides K
factor  float32 [K] or None: the rotated x is multiplied by it
q  int8 or float8_e4m3fn [M, K], as `dtype` says      scale  float32 [M]

Rotate first, then scale: the order of QuantVGGT (the post-local smoothing lies behind the rotation).

On a Hopper, rows of 16 bits are turned by hadamard_quantize_sm90, which is written by hand; all else by Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_runtime.kernels import _cuda, hadamard, hadamard_quantize_sm90, quantize_rows
from quant_runtime.kernels._cpu import row_chunks
from quant_runtime.kernels._triton import jit, processors, shared_kib, tl, triton
from quant_runtime.kernels._versions import Op, in_rows

HOPPER = "CUDA for sm_90a, Triton for other blocks and float32"
LARGEST_INNER = 128  # what one matrix product turns; a second one turns as many of these, at most
TILE_KIB = 160  # of shared memory, for a tile so large
LARGEST_TILE = 1 << 14  # numbers that a program holds in registers


def hadamard_quantize(
    x: Tensor,
    signs: Tensor,
    block: int,
    bits: int = 8,
    factor: Tensor | None = None,
    dtype: torch.dtype = torch.int8,
) -> tuple[Tensor, Tensor]:
    """(q, scale) of the rotated rows. Refuses what hadamard and quantize_rows refuse."""
    hadamard.check_rotation("hadamard_quantize", x, signs, block)
    quantize_rows.check_rows("hadamard_quantize", x, bits, factor, dtype)
    q, scale = _op(x, signs, block, bits, factor, dtype)
    return q, scale


def reference(
    x: Tensor, signs: Tensor, block: int, bits: int, factor: Tensor | None, dtype: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor]:
    return quantize_rows.reference(hadamard.reference(x, signs, block), bits, factor, dtype)


def on_cpu(
    x: Tensor, signs: Tensor, block: int, bits: int, factor: Tensor | None, dtype: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor]:
    q, scale = torch.empty(x.shape, dtype=dtype), torch.empty(x.shape[0])
    real_signs = signs.float()
    for rows in row_chunks(*x.shape):
        real = hadamard.rotate_chunk(x[rows], real_signs, block)
        if factor is not None:
            real.mul_(factor)
        quantize_rows.round_chunk(real, bits, q[rows], scale[rows])
    return q, scale


@jit
def _hadamard_quantize(
    x,
    signs,
    factor,
    q,
    scale,
    M,
    K,
    top,
    TINY: tl.constexpr,
    FACTOR: tl.constexpr,
    B: tl.constexpr,
    BP: tl.constexpr,
    ACROSS: tl.constexpr,
    PARTS: tl.constexpr,
    BR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BR whole rows of x at a time as [BR * PARTS, B]: H of B from the right, then H of ACROSS over neighbouring parts.

    A program makes H once, for all rows that it turns.
    """
    i, cols = tl.arange(0, BR * PARTS), tl.arange(0, BP)
    part = i % PARTS
    columns = part[:, None] * B + cols[None, :]
    in_row = (part * B < K)[:, None] & (cols < B)[None, :]
    inner = hadamard.signed_ones(BP, x.dtype.element_ty)
    flips = tl.load(signs + columns, mask=in_row, other=0).to(x.dtype.element_ty)
    if ACROSS > 1:
        near = (i // ACROSS)[:, None] == (i // ACROSS)[None, :]
        odd = (1 - 2 * _parity(i // ACROSS))[:, None].to(tl.float32)  # of the bits above, which near parts have alike
        outer = tl.where(near, hadamard.signed_ones(BR * PARTS, tl.float32) * odd, 0.0)

    for first in range(tl.program_id(0) * BR, M, tl.num_programs(0) * BR):
        row = first + i // PARTS
        inside = (row < M)[:, None] & in_row
        at = row.to(tl.int64)[:, None] * K + columns
        block = tl.load(x + at, mask=inside, other=0.0) * flips
        turned = tl.dot(block, inner, input_precision="ieee") * (1 / (B * ACROSS) ** 0.5)
        if ACROSS > 1:
            turned = tl.dot(outer, turned, input_precision=PRECISION)
        if FACTOR:
            turned *= tl.load(factor + columns, mask=in_row, other=0.0)
        turned = tl.where(inside, turned, 0.0)  # beyond B, H of the padded size goes on

        most = tl.max(tl.reshape(tl.max(tl.abs(turned), axis=1), (BR, PARTS)), axis=1)
        broken = tl.max(tl.reshape(tl.max((turned != turned).to(tl.float32), axis=1), (BR, PARTS)), axis=1)
        row_scale = tl.math.div_rn(tl.maximum(most, TINY), top + tl.zeros((BR,), tl.float32))
        row_scale = tl.where(broken > 0, float("nan"), row_scale)
        rows = first + tl.arange(0, BR)
        tl.store(scale + rows, row_scale, mask=rows < M)
        inverse = tl.math.div_rn(tl.full((BR,), 1.0, tl.float32), row_scale)
        each = tl.reshape(tl.broadcast_to(inverse[:, None], (BR, PARTS)), (BR * PARTS,))
        tl.store(q + at, quantize_rows.stored(turned * each[:, None], q), mask=inside)


@jit
def _parity(i):
    i ^= i >> 8
    i ^= i >> 4
    i ^= i >> 2
    i ^= i >> 1
    return i & 1


def launch(
    x: Tensor, signs: Tensor, block: int, bits: int, factor: Tensor | None, dtype: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor]:
    (m, k), inner = x.shape, min(block, hadamard.tile(x.dtype), LARGEST_INNER)
    parts, across = triton.next_power_of_2(k // inner), block // inner
    fits = parts * max(inner, 16) <= LARGEST_TILE and (across == 1 or parts <= LARGEST_INNER)
    fits = fits and quantize_rows.converts(dtype, x.device)
    if not fits or shared_kib(x.device) < TILE_KIB:  # a row does not fit, or its tile does not: two kernels
        return quantize_rows.launch(hadamard.launch(x, signs, block), bits, factor, dtype)
    q = torch.empty(m, k, dtype=dtype, device=x.device)
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    most_rows = LARGEST_TILE // (parts * max(inner, 16))
    rows = max(1, 16 // parts, min(most_rows, LARGEST_INNER // parts) if across > 1 else most_rows)
    sizes = {"B": inner, "BP": max(inner, 16), "ACROSS": across, "PARTS": parts, "BR": rows}
    precision = (
        "ieee" if x.dtype == torch.float32 else "tf32"
    )  # of sums of 16-bit numbers 11 bits are as good as their own
    top, tiny = quantize_rows.top(bits, dtype), quantize_rows.TINY
    programs = min(triton.cdiv(m, rows), 4 * processors(x.device))
    _hadamard_quantize[(programs,)](
        x.contiguous(), signs, factor, q, scale, m, k, top, TINY=tiny, FACTOR=factor is not None, **sizes,
        PRECISION=precision, num_warps=8 if rows * parts * max(inner, 16) > 8192 else 4,
    )  # fmt: skip
    return q, scale


def launch_hopper(
    x: Tensor, signs: Tensor, block: int, bits: int, factor: Tensor | None, dtype: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    if not hadamard_quantize_sm90.takes(x, block):
        return launch(x, signs, block, bits, factor, dtype)
    q, scale = _fake(x, signs, block, bits, factor, dtype)
    top, tiny = quantize_rows.top(bits, dtype), quantize_rows.TINY
    hadamard_quantize_sm90.launch(x, signs.contiguous(), block, top, tiny, factor, q, scale)
    return q, scale


def _fake(
    x: Tensor, signs: Tensor, block: int, bits: int, factor: Tensor | None, dtype: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[0], dtype=torch.float32)


_op = Op(
    "hadamard_quantize",
    reference,
    _fake,
    cpu={"CPU": on_cpu},
    cuda={HOPPER: launch_hopper, "Triton": launch},
    on={HOPPER: _cuda.is_hopper},
    plain=in_rows(reference),
)
