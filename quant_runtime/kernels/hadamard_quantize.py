"""quantize_rows(hadamard(x)) in one op: what a rotated layer does to its inputs, read once and written once.

x  float32, bfloat16 or float16 [M, K]      signs  int8 [K], each 1 or -1      block  a power of two that divides K
factor  float32 [K] or None: the rotated x is multiplied by it       q  int8 [M, K]      scale  float32 [M]

Rotate first, then scale: the order of QuantVGGT (the post-local smoothing lies behind the rotation).
"""

from __future__ import annotations

import torch
from torch import Tensor, library

from quant_runtime.kernels import hadamard, quantize_rows
from quant_runtime.kernels._cpu import row_chunks
from quant_runtime.kernels._triton import jit, tl, triton


def hadamard_quantize(
    x: Tensor, signs: Tensor, block: int, bits: int = 8, factor: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(q, scale) of the rotated rows. Refuses what hadamard and quantize_rows refuse."""
    hadamard.check_rotation("hadamard_quantize", x, signs, block)
    quantize_rows.check_rows("hadamard_quantize", x, bits, factor)
    q, scale = _op(x, signs, block, bits, factor)
    return q, scale


def reference(x: Tensor, signs: Tensor, block: int, bits: int, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    return quantize_rows.reference(hadamard.reference(x, signs, block), bits, factor)


def on_cpu(x: Tensor, signs: Tensor, block: int, bits: int, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    q, scale = torch.empty(x.shape, dtype=torch.int8), torch.empty(x.shape[0])
    real_signs = signs.float()
    for rows in row_chunks(*x.shape):
        real = hadamard.rotate_chunk(x[rows], real_signs, block)
        if factor is not None:
            real.mul_(factor)
        quantize_rows.round_chunk(real, bits, q[rows], scale[rows])
    return q, scale


@jit
def _kernel(
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
    BR: tl.constexpr,
):
    rows, cols = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR), tl.arange(0, BP)
    inside = (rows < M)[:, None] & (cols < B)[None, :]
    at = rows[:, None] * K + cols[None, :]

    most, broken = tl.zeros((BR,), tl.float32), tl.zeros((BR,), tl.float32)
    for start in range(0, K, B):
        turned = _turned(x, signs, factor, at, cols, start, inside, FACTOR, B, BP)
        most = tl.maximum(most, tl.max(tl.abs(turned), axis=1))
        broken = tl.maximum(broken, tl.max((turned != turned).to(tl.float32), axis=1))

    row_scale = tl.math.div_rn(tl.maximum(most, TINY), top + tl.zeros((BR,), tl.float32))
    row_scale = tl.where(broken > 0, float("nan"), row_scale)
    inverse = tl.math.div_rn(tl.full((BR,), 1.0, tl.float32), row_scale)
    tl.store(scale + rows, row_scale, mask=rows < M)
    for start in range(0, K, B):  # turning twice is cheaper than writing float32 out and reading it back
        turned = _turned(x, signs, factor, at, cols, start, inside, FACTOR, B, BP)
        tl.store(q + at + start, quantize_rows.whole(turned * inverse[:, None]), mask=inside)


@jit
def _turned(x, signs, factor, at, cols, start, inside, FACTOR: tl.constexpr, B: tl.constexpr, BP: tl.constexpr):
    block = tl.load(x + at + start, mask=inside, other=0.0)
    block *= tl.load(signs + start + cols, mask=cols < B, other=0).to(block.dtype)[None, :]
    turned = tl.dot(block, hadamard.signed_ones(BP, block.dtype), input_precision="ieee") * (1 / B**0.5)
    if FACTOR:
        turned *= tl.load(factor + start + cols, mask=cols < B, other=0.0)[None, :]
    return tl.where(inside, turned, 0.0)  # beyond B, H of the padded size goes on


def launch(x: Tensor, signs: Tensor, block: int, bits: int, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    if block > hadamard.tile(x.dtype):  # a block across tiles needs all of them at once: two kernels
        return quantize_rows.launch(hadamard.launch(x, signs, block), bits, factor)
    m, k = x.shape
    q = torch.empty(m, k, dtype=torch.int8, device=x.device)
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    sizes = {"B": block, "BP": max(block, 16), "BR": 32}
    top, tiny = 2.0 ** (bits - 1) - 1, quantize_rows.TINY
    _kernel[(triton.cdiv(m, 32),)](
        x.contiguous(), signs, factor, q, scale, m, k, top, TINY=tiny, FACTOR=factor is not None, **sizes
    )
    return q, scale


def _fake(x: Tensor, signs: Tensor, block: int, bits: int, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)


_op = library.custom_op("quant_runtime::hadamard_quantize", reference, mutates_args=())
_op.register_kernel("cpu", on_cpu)
_op.register_kernel("cuda", launch)
_op.register_fake(_fake)
