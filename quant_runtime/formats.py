"""How a layer is stored and fed: widths as a value, written W4A8, and the packing of two int4 in a byte."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class QuantFormat:
    """Widths of a layer's weights and of its inputs. A value to compare and to write down, not a class per combination.

    Weights: whole numbers within ±weight_top, one scale per output channel. Activations: within ±activation_top, one
    scale per token, found at run time. 16 bits stand for "as the checkpoint has them", bf16 or fp16.
    """

    weight_bits: int
    activation_bits: int = 16
    group: int = 0  # inputs that share a weight scale; 0 is the whole row

    def __post_init__(self) -> None:
        if self.weight_bits not in (2, 3, 4, 5, 6, 7, 8, 16) or self.activation_bits not in (4, 6, 8, 16):
            raise ValueError(f"weights have 2 to 8 or 16 bits and activations 4, 6, 8 or 16; got {self}")
        if self.group < 0:
            raise ValueError(f"group is a number of inputs, or 0 for the whole row; got {self.group}")

    @classmethod
    def parse(cls, text: str) -> QuantFormat:
        """The format written as "w4a8" or "W4A8"."""
        written = re.fullmatch(r"[wW](\d{1,2})[aA](\d{1,2})", text)
        if written is None:
            raise ValueError(f"a format is written like W4A8; got {text!r}")
        return cls(weight_bits=int(written[1]), activation_bits=int(written[2]))

    def __str__(self) -> str:
        grouped = f" group={self.group}" if self.group else ""
        return f"W{self.weight_bits}A{self.activation_bits}{grouped}"

    @property
    def quantized(self) -> bool:
        return self.weight_bits < 16

    @property
    def weight_top(self) -> int:
        return (1 << (self.weight_bits - 1)) - 1

    @property
    def activation_top(self) -> int:
        return (1 << (self.activation_bits - 1)) - 1


W16A16 = QuantFormat(weight_bits=16)
W8A8 = QuantFormat(weight_bits=8, activation_bits=8)
W4A8 = QuantFormat(weight_bits=4, activation_bits=8)
W4A6 = QuantFormat(weight_bits=4, activation_bits=6)
W4A4 = QuantFormat(weight_bits=4, activation_bits=4)


def pack(weight: Tensor, bits: int) -> Tensor:
    """Whole weights int8 [N, K] as they are stored: int8 [N, K] for 8 bits, uint8 [N, ceil(K/2)] for 4."""
    check_packing(bits)
    return weight if bits == 8 else pack_int4(weight)


def packed_shape(rows: int, inputs: int, bits: int) -> tuple[int, int]:
    check_packing(bits)
    return rows, inputs if bits == 8 else (inputs + 1) // 2


def check_packing(bits: int) -> None:
    if bits not in (4, 8):
        raise ValueError(f"weights of {bits} bits cannot be packed yet: 4 and 8 can")


def pack_int4(weight: Tensor) -> Tensor:
    """int8 [N, K] within -8..7 → uint8 [N, h], h = ceil(K/2): byte j holds input j low and input j + h high.

    Halves and not neighbours: what a byte yields then lies in two unbroken runs, for a CPU's vectors and for a GPU's
    tiles. For odd K the last high half is zero.
    """
    if int(weight.min()) < -8 or int(weight.max()) > 7:
        raise ValueError(f"int4 holds -8 to 7; got {int(weight.min())} to {int(weight.max())}")
    half = (weight.shape[1] + 1) // 2
    low, high = weight[:, :half], weight[:, half:]
    high = torch.nn.functional.pad(high, (0, half - high.shape[1]))
    return ((low & 15) | (high << 4)).view(torch.uint8)
