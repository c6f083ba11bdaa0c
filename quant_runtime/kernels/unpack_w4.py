"""Packed int4 weights to int8, ahead of a matmul large enough to hide it.

packed  uint8 [N, h], h = ceil(K/2): byte j holds input j low and input j + h high, in two's complement
w  int8 [N, K], -8 to 7
"""

from __future__ import annotations

import torch
from torch import Tensor, library

from quant_runtime.kernels._triton import jit, tl, triton


def unpack_w4(packed: Tensor, inputs: int) -> Tensor:
    """The int8 [N, inputs] that `packed` holds. `inputs` is K: the packing does not tell 2h from 2h - 1."""
    check_packed("unpack_w4", packed, inputs)
    out: Tensor = _op(packed, inputs)
    return out


def check_packed(op: str, packed: Tensor, inputs: int) -> None:
    if packed.dim() != 2 or packed.dtype != torch.uint8 or packed.shape[1] != (inputs + 1) // 2:
        expected = f"uint8 [N, {(inputs + 1) // 2}] for {inputs} inputs"
        raise ValueError(f"{op} takes packed weights as {expected}; got {packed.dtype} {list(packed.shape)}")


def reference(packed: Tensor, inputs: int) -> Tensor:
    low, high = packed.int() & 15, packed.int() >> 4
    whole = torch.cat([low, high], dim=1)[:, :inputs]
    return torch.where(whole > 7, whole - 16, whole).to(torch.int8)


def on_cpu(packed: Tensor, inputs: int) -> Tensor:
    return unpack_into(torch.empty(packed.shape[0], inputs, dtype=torch.int8), packed)


def unpack_into(w: Tensor, packed: Tensor) -> Tensor:
    """Fills w int8 [N, K] and returns it. A shift to the right of int8 brings the sign along."""
    half, signed = packed.shape[1], packed.view(torch.int8)
    torch.bitwise_right_shift(torch.bitwise_left_shift(signed, 4, out=w[:, :half]), 4, out=w[:, :half])
    torch.bitwise_right_shift(signed[:, : w.shape[1] - half], 4, out=w[:, half:])
    return w


@jit
def _kernel(packed, w, K, HALF, BK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BK + tl.arange(0, BK)
    low, high = halves(tl.load(packed + row * HALF + j, mask=j < HALF, other=0))
    tl.store(w + row * K + j, low, mask=j < HALF)
    tl.store(w + row * K + HALF + j, high, mask=HALF + j < K)


@jit
def halves(byte):
    """The two int4 of a byte as int8, low and high."""
    whole = byte.to(tl.int32)
    return ((whole << 28) >> 28).to(tl.int8), ((whole << 24) >> 28).to(tl.int8)


def launch(packed: Tensor, inputs: int) -> Tensor:
    n, half = packed.shape
    w = torch.empty(n, inputs, dtype=torch.int8, device=packed.device)
    block = min(triton.next_power_of_2(half), 4096)
    _kernel[(n, triton.cdiv(half, block))](packed.contiguous(), w, inputs, half, BK=block)
    return w


def _fake(packed: Tensor, inputs: int) -> Tensor:
    return packed.new_empty(packed.shape[0], inputs, dtype=torch.int8)


_op = library.custom_op("quant_runtime::unpack_w4", reference, mutates_args=())
_op.register_kernel("cpu", on_cpu)
_op.register_kernel("cuda", launch)
_op.register_fake(_fake)
