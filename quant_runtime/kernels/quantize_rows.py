"""x ≈ q * scale: activations to int8 or FP8, one scale a row, found as the row comes in (dynamic, symmetric).

x  float32, bfloat16 or float16 [M, K]
factor  float32 [K] or None: x is multiplied by it first (SmoothQuant's 1/s)
q  int8 [M, K], whole numbers within ±(2**(bits-1) - 1), or float8_e4m3fn within ±448       scale  float32 [M]

In float32: scale = max|x * factor| / top, and q = x * factor * (1 / scale), rounded half to even to the nearest number
of `dtype`. 4 and 6 bits are stored in a byte as well: no matrix unit of Hopper takes them narrower. A row of zeros gets
a scale that is tiny and not zero. A row that holds a NaN or an infinity gets a scale that is not finite, so that it
shows in the product. A GPU without FP8 rounds to it by the reference: Triton has no conversion there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_runtime.kernels._cpu import row_chunks, scratch
from quant_runtime.kernels._fp8 import E4M3, FP8_TOP, has_fp8
from quant_runtime.kernels._triton import jit, tl, triton
from quant_runtime.kernels._versions import Op, in_rows

TINY = 1e-30  # the least row maximum: 1 / (TINY / 448) is still a float32


def quantize_rows(
    x: Tensor, bits: int = 8, factor: Tensor | None = None, dtype: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor]:
    """(q, scale) of x. Refuses x that is not float [M, K], a factor that is not float32 [K], what check_target does."""
    check_rows("quantize_rows", x, bits, factor, dtype)
    q, scale = _op(x, bits, factor, dtype)
    return q, scale


def check_rows(op: str, x: Tensor, bits: int, factor: Tensor | None, dtype: torch.dtype) -> None:
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"{op} takes float rows [M, K]; got {x.dtype} {list(x.shape)}")
    check_target(op, bits, dtype)
    if factor is not None and (factor.shape != x.shape[1:] or factor.dtype != torch.float32):
        raise ValueError(f"{op}: factor is float32 [{x.shape[1]}]; got {factor.dtype} {list(factor.shape)}")


def check_target(op: str, bits: int, dtype: torch.dtype) -> None:
    """Bits but 4, 6 and 8, and dtypes but int8 and, of 8 bits, float8_e4m3fn, are refused."""
    if bits not in (4, 6, 8):
        raise ValueError(f"{op} rounds to 4, 6 or 8 bits; got bits={bits}")
    if dtype != torch.int8 and (dtype != E4M3 or bits != 8):
        raise ValueError(f"{op} rounds to int8, or in 8 bits to {E4M3}; got {dtype} and bits={bits}")


def reference(x: Tensor, bits: int, factor: Tensor | None, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    x = x.float() if factor is None else x.float() * factor
    scale = step(x.abs().amax(dim=1), top(bits, dtype))
    return nearest(x * scale.reciprocal()[:, None], dtype), scale


def top(bits: int, dtype: torch.dtype) -> float:
    """What the largest entry of a row becomes."""
    return FP8_TOP if dtype == E4M3 else 2.0 ** (bits - 1) - 1


def nearest(real: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 within the top of `dtype`, or a rounding beyond it, as the nearest of its numbers, half to even."""
    return real.to(E4M3) if dtype == E4M3 else real.round().to(torch.int8)


def step(most: Tensor, top: float) -> Tensor:
    """The scale of what is at most `most`: most / top, rounded once. By a plain number a GPU would not divide."""
    return most.clamp(min=TINY) / torch.full_like(most, top)


def on_cpu(x: Tensor, bits: int, factor: Tensor | None, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    q, scale = torch.empty(x.shape, dtype=dtype), torch.empty(x.shape[0])
    for rows in row_chunks(*x.shape):
        chunk = x[rows]
        real = scratch("quantize_rows", tuple(chunk.shape), torch.float32)
        if factor is None:
            real.copy_(chunk)
        else:
            torch.mul(chunk, factor, out=real)
        round_chunk(real, bits, q[rows], scale[rows])
    return q, scale


def round_chunk(real: Tensor, bits: int, q: Tensor, scale: Tensor) -> None:
    """The CPU's second half: float32 rows, overwritten, to their q and scale."""
    size = scratch("absolute", tuple(real.shape), torch.float32)
    torch.amax(torch.abs(real, out=size), dim=1, out=scale)
    scale.clamp_(min=TINY).div_(top(bits, q.dtype))
    real.mul_(scale.reciprocal()[:, None])
    q.copy_(real if q.dtype == E4M3 else real.round_())


@jit
def _quantize_rows(x, factor, q, scale, K, top, TINY: tl.constexpr, FACTOR: tl.constexpr, BK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # 64 bits: M * K passes 2**31 on long videos
    most, broken = 0.0, 0.0
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        real = tl.load(x + row * K + k, mask=k < K, other=0.0).to(tl.float32)
        if FACTOR:
            real *= tl.load(factor + k, mask=k < K, other=0.0)
        most = tl.maximum(most, tl.max(tl.abs(real), axis=0))
        broken = tl.maximum(broken, tl.max((real != real).to(tl.float32), axis=0))  # a GPU's maximum passes over NaN

    row_scale = tl.math.div_rn(tl.maximum(most, TINY), top)
    row_scale = tl.where(broken > 0, float("nan"), row_scale)
    inverse = tl.math.div_rn(1.0, row_scale)
    tl.store(scale + row, row_scale)
    for start in range(0, K, BK):  # the row's second reading comes from cache
        k = start + tl.arange(0, BK)
        real = tl.load(x + row * K + k, mask=k < K, other=0.0).to(tl.float32)
        if FACTOR:
            real *= tl.load(factor + k, mask=k < K, other=0.0)
        tl.store(q + row * K + k, stored(real * inverse, q), mask=k < K)


@jit
def stored(x, q):
    """x as what q points to: int8, or e4m3, which a conversion takes no further than 448."""
    if q.dtype.element_ty == tl.int8:
        return whole(x)
    else:  # noqa: RET505  of two types only the one that is meant is compiled so
        return x.to(q.dtype.element_ty)


@jit
def whole(x):
    """x as int8, half to even, for |x| <= 127: 1.5 * 2**23 leaves no bits below one, and its own end in zeros.

    What a conversion does costs a GPU as much as an exponential.
    """
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


def launch(x: Tensor, bits: int, factor: Tensor | None, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    if not converts(dtype, x.device):
        q, scale = _plain(x, bits, factor, dtype)
        return q, scale
    m, k = x.shape
    q = torch.empty(m, k, dtype=dtype, device=x.device)
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    block, most = min(triton.next_power_of_2(k), 4096), top(bits, dtype)
    _quantize_rows[(m,)](
        x.contiguous(),
        factor,
        q,
        scale,
        k,
        most,
        TINY=TINY,
        FACTOR=factor is not None,
        BK=block,
        enable_fp_fusion=False,  # else a product and the sum that rounds it are one: a half may go astray
    )
    return q, scale


def converts(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether Triton rounds to this dtype on this device."""
    return dtype != E4M3 or has_fp8(device)


def _fake(x: Tensor, bits: int, factor: Tensor | None, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[0], dtype=torch.float32)


_plain = in_rows(reference)
_op = Op("quantize_rows", reference, _fake, cpu={"CPU": on_cpu}, cuda={"Triton": launch}, plain=_plain)
