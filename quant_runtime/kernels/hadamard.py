"""y = (x * signs) @ H, block after block: a randomized Walsh-Hadamard rotation (as in QuaRot, arXiv:2404.00456).

x  float32, bfloat16 or float16 [M, K]      signs  int8 [K], each 1 or -1      y  float32 [M, K]
block  a power of two that divides K

H is the orthonormal Sylvester matrix of block columns: H[i, j] = (-1)**popcount(i & j) / sqrt(block). It is symmetric
and its own inverse, so x @ w.T stays what it was when the rows of w are rotated alike. y is float32 whatever x is:
rounding to 16 bits between here and the quantizer would be seen at 8 bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quant_runtime.kernels._cpu import row_chunks, scratch
from quant_runtime.kernels._triton import jit, tl, triton
from quant_runtime.kernels._versions import Op, in_rows

TILE = (
    128  # the largest matrix that one pass multiplies by, in 16 bits; more passes do more, as H of ab = H of a ⊗ H of b
)
FLOAT_TILE = 32  # the same in float32, which has no matrix unit: larger ones are slow to run and slower to compile
LARGEST_BLOCK = 1 << 14
MATMUL_BLOCK = 16  # on a CPU: a matmul takes four doublings at once, each further one is a pass of sums and differences


def hadamard(x: Tensor, signs: Tensor, block: int) -> Tensor:
    """The rotated rows. Refuses a block that is no power of two, does not divide K or is above 16,384."""
    check_rotation("hadamard", x, signs, block)
    out: Tensor = _op(x, signs, block)
    return out


def check_rotation(op: str, x: Tensor, signs: Tensor, block: int) -> None:
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"{op} takes float rows [M, K]; got {x.dtype} {list(x.shape)}")
    if block < 1 or block & (block - 1) or x.shape[1] % block or block > LARGEST_BLOCK:
        fitting = f"a power of two up to {LARGEST_BLOCK} that divides K={x.shape[1]}"
        raise ValueError(f"{op}: block is {fitting}; got {block}")
    if signs.shape != x.shape[1:] or signs.dtype != torch.int8:
        raise ValueError(f"{op}: signs are int8 [{x.shape[1]}]; got {signs.dtype} {list(signs.shape)}")


def largest_block(inputs: int) -> int:
    """The largest power of two that divides `inputs`, and that this op takes."""
    return min(inputs & -inputs, LARGEST_BLOCK)


def matrix(block: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Tensor:
    """H of `block` columns with entries ±1: not yet divided by sqrt(block)."""
    h = torch.ones(1, 1, dtype=dtype, device=device)
    while h.shape[0] < block:
        h = torch.cat([torch.cat([h, h], dim=1), torch.cat([h, -h], dim=1)])
    return h


def reference(x: Tensor, signs: Tensor, block: int) -> Tensor:
    blocks = (x.double() * signs).view(-1, block)
    return (blocks @ matrix(block, device=x.device) / math.sqrt(block)).view(x.shape).float()


def on_cpu(x: Tensor, signs: Tensor, block: int) -> Tensor:
    y = torch.empty(x.shape, dtype=torch.float32)
    real_signs = signs.float()
    for rows in row_chunks(*x.shape):
        y[rows] = rotate_chunk(x[rows], real_signs, block)
    return y


def rotate_chunk(x: Tensor, signs: Tensor, block: int) -> Tensor:
    """A few rows, rotated by signs float32 [K] and H, in scratch that the next call overwrites."""
    one, two = (scratch(slot, tuple(x.shape), torch.float32) for slot in ("rotated", "turning"))
    torch.mul(x, signs, out=two)
    inner = min(block, MATMUL_BLOCK)
    h = matrix(inner, torch.float32) / math.sqrt(block)
    torch.mm(two.view(-1, inner), h, out=one.view(-1, inner))
    while inner < block:
        pairs, turned = one.view(-1, 2, inner), two.view(-1, 2, inner)
        torch.add(pairs[:, 0], pairs[:, 1], out=turned[:, 0])
        torch.sub(pairs[:, 0], pairs[:, 1], out=turned[:, 1])
        one, two, inner = two, one, 2 * inner
    return one


@jit
def _hadamard(x, signs, y, ROWS, K, B: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr):
    """The first pass: x as rows of B columns, times H of B from the right. BP is B, or a dot's least, 16."""
    rows = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    cols = tl.arange(0, BP)
    at = rows[:, None] * B + cols[None, :]
    inside = (rows < ROWS)[:, None] & (cols < B)[None, :]
    block = tl.load(x + at, mask=inside, other=0.0)
    block *= tl.load(signs + at % K, mask=inside, other=0).to(block.dtype)
    tl.store(y + at, tl.dot(block, signed_ones(BP, block.dtype), input_precision="ieee") * (1 / B**0.5), mask=inside)


@jit
def signed_ones(B: tl.constexpr, dtype: tl.constexpr):
    """H of B columns, ±1: exact in every float type, so a dot adds up x's own bits."""
    i = tl.arange(0, B)
    common = i[:, None] & i[None, :]
    common ^= common >> 4
    common ^= common >> 2
    common ^= common >> 1
    return (1 - 2 * (common & 1)).to(dtype)


@jit
def _hadamard_across(y, S: tl.constexpr, B: tl.constexpr, BP: tl.constexpr, BS: tl.constexpr):
    """A further pass, in place: y as [N, B, S], each [B, S] multiplied by H of B from the left."""
    tile, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i, s = tl.arange(0, BP), part * BS + tl.arange(0, BS)
    at = tile * (B * S) + i[:, None] * S + s[None, :]
    inside = (i < B)[:, None] & (s < S)[None, :]
    block = tl.load(y + at, mask=inside, other=0.0)
    tl.store(y + at, tl.dot(signed_ones(BP, tl.float32), block, input_precision="ieee") * (1 / B**0.5), mask=inside)


def launch(x: Tensor, signs: Tensor, block: int) -> Tensor:
    (m, k), done = x.shape, min(block, tile(x.dtype))
    y = torch.empty(m, k, dtype=torch.float32, device=x.device)
    rows = m * (k // done)
    _hadamard[(triton.cdiv(rows, 64),)](x.contiguous(), signs, y, rows, k, B=done, BP=max(done, 16), BR=64)
    while done < block:
        more = min(block // done, FLOAT_TILE)
        count, part = m * (k // (done * more)), min(done, 64)
        _hadamard_across[(count, done // part)](y, S=done, B=more, BP=max(more, 16), BS=part)
        done *= more
    return y


def tile(dtype: torch.dtype) -> int:
    """The largest block that one pass over inputs of this dtype turns."""
    return FLOAT_TILE if dtype == torch.float32 else TILE


def _fake(x: Tensor, signs: Tensor, block: int) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


_op = Op("hadamard", reference, _fake, cpu={"CPU": on_cpu}, cuda={"Triton": launch}, plain=in_rows(reference))
