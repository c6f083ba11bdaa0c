"""Packed weights of 2 to 7 bits to int8 or FP8, ahead of a matmul large enough to hide it.

packed  uint8 [N, packed_bytes(K, bits)], whole numbers in two's complement
w  int8 or, of up to 5 bits, float8_e4m3fn [N, K], as `dtype` says: -2^(bits - 1) to 2^(bits - 1) - 1, exactly

A width is a sum of 4, 2 and 1, and a row lies in as many planes, the one of most bits first and with the lowest bits
of each weight: 3 bits are a plane of 2 and then a plane of 1. A plane of p bits and `span` bytes holds 8/p weights a
byte: byte j those of inputs j, j + span, j + 2 · span, from the byte's low end up. No plane's bits cross a byte, and
what one shift yields lies in an unbroken run, for a CPU's vectors and for a GPU's tiles.

Rows end in zeros, such that the narrowest plane is whole words of 8 bytes: every plane then holds as many weights, and
a CPU shifts eight bytes at a time however long the row is. 2 bits take 8 · ceil(K/32) bytes a row, 3 bits
24 · ceil(K/64), 4 bits 8 · ceil(K/16).
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_runtime.kernels._cpu import row_chunks, scratch
from quant_runtime.kernels._fp8 import E4M3, FP8_WHOLE, has_fp8
from quant_runtime.kernels._triton import jit, tl, triton
from quant_runtime.kernels._versions import Op

WIDTHS = (2, 3, 4, 5, 6, 7)


def unpack(packed: Tensor, inputs: int, bits: int, dtype: torch.dtype = torch.int8) -> Tensor:
    """What `packed` holds, [N, inputs]. `inputs` is K: the packing does not tell it from its padding."""
    check_packed("unpack", packed, inputs, bits)
    if dtype != torch.int8 and (dtype != E4M3 or 1 << (bits - 1) > FP8_WHOLE):
        raise ValueError(f"unpack answers in int8, or of up to 5 bits in {E4M3}; got {dtype} and {bits} bits")
    out: Tensor = _op(packed, inputs, bits, dtype)
    return out


def check_packed(op: str, packed: Tensor, inputs: int, bits: int) -> None:
    if bits not in WIDTHS:
        raise ValueError(f"{op} takes weights of 2 to 7 bits; got {bits}")
    width = packed_bytes(inputs, bits)
    if packed.dim() != 2 or packed.dtype != torch.uint8 or packed.shape[1] != width:
        expected = f"uint8 [N, {width}] for {inputs} inputs of {bits} bits"
        raise ValueError(f"{op} takes packed weights as {expected}; got {packed.dtype} {list(packed.shape)}")


def packed_bytes(inputs: int, bits: int) -> int:
    """Of one row of `inputs` weights."""
    return sum(span for _, span in planes(inputs, bits))


def planes(inputs: int, bits: int) -> list[tuple[int, int]]:
    """(bits, bytes a row) of each plane, in their order."""
    narrowest = bits & -bits
    unit = 8 * -(-inputs * narrowest // 64)  # bytes of the narrowest plane
    return [(width, unit * width // narrowest) for width in (4, 2, 1) if bits & width]


def reference(packed: Tensor, inputs: int, bits: int, dtype: torch.dtype = torch.int8) -> Tensor:
    k = torch.arange(inputs, device=packed.device)
    whole = torch.zeros(packed.shape[0], inputs, dtype=torch.int32, device=packed.device)
    start, low = 0, 0
    for width, span in planes(inputs, bits):
        field = (packed[:, start + k % span].int() >> (k // span * width)) & ((1 << width) - 1)
        whole += field << low
        start, low = start + span, low + width
    return torch.where(whole < 1 << (bits - 1), whole, whole - (1 << bits)).float().to(dtype)


def on_cpu(packed: Tensor, inputs: int, bits: int, dtype: torch.dtype = torch.int8) -> Tensor:
    return unpack_into(torch.empty(packed.shape[0], inputs, dtype=torch.int8), packed, bits).to(dtype)


def unpack_into(w: Tensor, packed: Tensor, bits: int) -> Tensor:
    """Fills w int8 [N, K] and returns it."""
    for rows in row_chunks(*w.shape):
        _unpack_rows(w[rows], packed[rows], bits)
    return w


def _unpack_rows(w: Tensor, packed: Tensor, bits: int) -> None:
    if bits == 4:
        _unpack_nibbles(w, packed.view(torch.int8))
        return
    n, inputs = w.shape
    words = scratch("packed words", (n, packed.shape[1] // 8), torch.int64)  # a view of `packed` might not be aligned
    words.view(torch.uint8).copy_(packed)
    first, *others = planes(inputs, bits)
    whole, start, low = _fields(words, 0, *first), first[1], first[0]
    for width, span in others:
        whole.add_(_fields(words, start, width, span), alpha=1 << low)
        start, low = start + span, low + width
    sign = 1 << (bits - 1)
    torch.sub(whole.bitwise_xor_(sign)[:, :inputs], sign, out=w)


def _unpack_nibbles(w: Tensor, packed: Tensor) -> None:
    """One plane, whose shifts bring the sign along: a third of the time, for the width that most layers have."""
    span = packed.shape[1]
    low, high = w[:, :span], w[:, span:]
    torch.bitwise_right_shift(torch.bitwise_left_shift(packed[:, : low.shape[1]], 4, out=low), 4, out=low)
    torch.bitwise_right_shift(packed[:, : high.shape[1]], 4, out=high)


def _fields(words: Tensor, start: int, width: int, span: int) -> Tensor:
    """What the plane that starts at byte `start` holds of each weight, int8 [n, K and the padding], in scratch.

    A shift of a word also moves bits from byte to byte; the mask takes them out.
    """
    plane = words[:, None, start // 8 : (start + span) // 8]
    shifts = torch.arange(0, 8, width)[:, None]
    fields = scratch(f"plane of {width}", (words.shape[0], 8 // width, span // 8), torch.int64)
    torch.bitwise_right_shift(plane, shifts, out=fields).bitwise_and_(0x0101010101010101 * ((1 << width) - 1))
    return fields.view(words.shape[0], -1).view(torch.int8)


@jit
def _unpack(packed, w, K, UNIT, BITS: tl.constexpr, NARROWEST: tl.constexpr, BJ: tl.constexpr):
    """A row is 8 / NARROWEST parts of UNIT weights; this makes column block j of all its parts."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, 8 // NARROWEST)[:, None]
    j = tl.program_id(1) * BJ + tl.arange(0, BJ)[None, :]
    k = part * UNIT + j
    inside = (j < UNIT) & (k < K)
    bytes_ = packed + row * UNIT * (BITS // NARROWEST) + j
    whole = tl.zeros_like(k)
    if BITS & 4:
        whole |= _field(bytes_, part, inside, UNIT, BITS, NARROWEST, 4)
    if BITS & 2:
        whole |= _field(bytes_, part, inside, UNIT, BITS, NARROWEST, 2)
    if BITS & 1:
        whole |= _field(bytes_, part, inside, UNIT, BITS, NARROWEST, 1)
    whole = (whole << (32 - BITS)) >> (32 - BITS)
    if w.dtype.element_ty != tl.int8:
        whole = whole.to(tl.float32)
    tl.store(w + row * K + k, whole.to(w.dtype.element_ty), mask=inside)


@jit
def _field(bytes_, part, inside, UNIT, BITS: tl.constexpr, NARROWEST: tl.constexpr, WIDTH: tl.constexpr):
    """What the plane of WIDTH bits holds, in its place."""
    low: tl.constexpr = BITS // (2 * WIDTH) * (2 * WIDTH)  # the bits of the wider planes, which lie before it
    units: tl.constexpr = WIDTH // NARROWEST  # of its span
    byte = tl.load(bytes_ + (low // NARROWEST + part % units) * UNIT, mask=inside, other=0).to(tl.int32)
    return ((byte >> (part // units * WIDTH)) & ((1 << WIDTH) - 1)) << low


def launch(packed: Tensor, inputs: int, bits: int, dtype: torch.dtype = torch.int8) -> Tensor:
    if dtype == E4M3 and not has_fp8(packed.device):  # Triton has no conversion there, torch has
        return launch(packed, inputs, bits).to(dtype)
    n, narrowest = packed.shape[0], bits & -bits
    unit = packed.shape[1] * narrowest // bits
    w = torch.empty(n, inputs, dtype=dtype, device=packed.device)
    block = min(triton.next_power_of_2(unit), 512 * narrowest)  # of 8 / narrowest parts: 4096 weights at most
    grid = (n, triton.cdiv(unit, block))
    _unpack[grid](packed.contiguous(), w, inputs, unit, BITS=bits, NARROWEST=narrowest, BJ=block)
    return w


def _fake(packed: Tensor, inputs: int, bits: int, dtype: torch.dtype = torch.int8) -> Tensor:
    return packed.new_empty(packed.shape[0], inputs, dtype=dtype)


_op = Op("unpack", reference, _fake, cpu={"CPU": on_cpu}, cuda={"Triton": launch})
