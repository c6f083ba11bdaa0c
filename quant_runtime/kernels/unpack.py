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
PROGRAM = 4096  # bytes of a plane that one program reads: 32 a thread, 16 at a time


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
def _unpack(
    packed, w, N, K, UNIT,
    REPEAT: tl.constexpr, BITS: tl.constexpr, NARROWEST: tl.constexpr, WIDEST: tl.constexpr,
    BR: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """A row is 8 / NARROWEST parts of UNIT weights; this makes some columns of all its parts, of some rows.

    Weights, and K and UNIT, are counted in what `packed` and `w` point to: bytes (REPEAT is 1), or four of them in a
    word, alike and at once (REPEAT has a one in each). No sum or shift below reaches from one into the next.
    """
    row = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)[:, None]
    j = tl.program_id(1) * BJ + tl.arange(0, BJ)[None, :]
    there = (row < N) & (j < UNIT)
    planes = packed + row * UNIT * (BITS // NARROWEST) + j
    units: tl.constexpr = WIDEST // NARROWEST
    for unit in tl.static_range(units):
        held = planes_of(planes, there, unit, UNIT, BITS, NARROWEST, WIDEST)
        for turn in tl.static_range(8 // WIDEST):
            part = unit + turn * units
            whole = whole_of(held, part, REPEAT, BITS, NARROWEST, WIDEST)
            if w.dtype.element_ty != tl.int8 and w.dtype.element_ty != tl.int32:
                whole = whole.to(tl.float32).to(w.dtype.element_ty)
            tl.store(w + row * K + part * UNIT + j, whole, mask=there & (part * UNIT + j < K))


@jit
def planes_of(
    planes, there, unit, UNIT, BITS: tl.constexpr, NARROWEST: tl.constexpr, WIDEST: tl.constexpr
):  # fmt: skip
    """What parts unit, unit + WIDEST / NARROWEST and so on have of each plane; of one that is not there, anything."""
    held = _plane(planes, there, unit, UNIT, BITS, NARROWEST, WIDEST)
    middle, last = held, held
    if BITS & 2 and WIDEST > 2:
        middle = _plane(planes, there, unit, UNIT, BITS, NARROWEST, 2)
    if BITS & 1:
        last = _plane(planes, there, unit, UNIT, BITS, NARROWEST, 1)
    return held, middle, last


@jit
def _plane(planes, there, unit, UNIT, BITS: tl.constexpr, NARROWEST: tl.constexpr, WIDTH: tl.constexpr):
    before: tl.constexpr = BITS // (2 * WIDTH) * (2 * WIDTH)  # the bits of the wider planes, which lie before it
    return tl.load(planes + (before // NARROWEST + unit % (WIDTH // NARROWEST)) * UNIT, mask=there, other=0)


@jit
def whole_of(held, part, REPEAT: tl.constexpr, BITS: tl.constexpr, NARROWEST: tl.constexpr, WIDEST: tl.constexpr):
    """A part's weights, out of what planes_of gave for it, in bytes (REPEAT is 1) or in words of four of them."""
    whole = _field(held[0], part, REPEAT, BITS, NARROWEST, WIDEST)
    if BITS & 2 and WIDEST > 2:
        whole |= _field(held[1], part, REPEAT, BITS, NARROWEST, 2)
    if BITS & 1:
        whole |= _field(held[2], part, REPEAT, BITS, NARROWEST, 1)
    sign: tl.constexpr = REPEAT << (BITS - 1)
    return whole | ((whole & sign) * ((2 << (8 - BITS)) - 2)).to(whole.dtype)  # and the bits above the sign


@jit
def _field(plane, part, REPEAT: tl.constexpr, BITS: tl.constexpr, NARROWEST: tl.constexpr, WIDTH: tl.constexpr):
    low: tl.constexpr = BITS // (2 * WIDTH) * (2 * WIDTH)
    return (((plane >> (part // (WIDTH // NARROWEST) * WIDTH)) & (REPEAT * ((1 << WIDTH) - 1))) << low).to(plane.dtype)


def launch(packed: Tensor, inputs: int, bits: int, dtype: torch.dtype = torch.int8) -> Tensor:
    if dtype == E4M3 and not has_fp8(packed.device):  # Triton has no conversion there, torch has
        return launch(packed, inputs, bits).to(dtype)
    n, narrowest = packed.shape[0], bits & -bits
    packed, w = packed.contiguous(), torch.empty(packed.shape[0], inputs, dtype=dtype, device=packed.device)
    at_once = 4 if dtype == torch.int8 and inputs % 4 == 0 and packed.data_ptr() % 4 == 0 else 1
    kind = torch.int32 if at_once == 4 else torch.int8
    unit = packed.shape[1] * narrowest // bits // at_once
    columns = max(32, min(128, unit & -unit)) * 4 // at_once
    rows = PROGRAM // at_once // columns
    _unpack[(triton.cdiv(n, rows), triton.cdiv(unit, columns))](
        packed.view(kind), w.view(kind) if dtype == torch.int8 else w, n, inputs // at_once, unit,
        REPEAT=0x01010101 if at_once == 4 else 1, BITS=bits, NARROWEST=narrowest, WIDEST=planes(inputs, bits)[0][0],
        BR=rows, BJ=columns,
    )  # fmt: skip
    return w


def _fake(packed: Tensor, inputs: int, bits: int, dtype: torch.dtype = torch.int8) -> Tensor:
    return packed.new_empty(packed.shape[0], inputs, dtype=dtype)


_op = Op("unpack", reference, _fake, cpu={"CPU": on_cpu}, cuda={"Triton": launch})
