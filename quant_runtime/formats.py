"""How a layer is stored and fed: widths as a value, written W4A8, and the packing of weights into their bits."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from quant_runtime.kernels.unpack import WIDTHS, packed_bytes, planes


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
W3A8 = QuantFormat(weight_bits=3, activation_bits=8)
W3A6 = QuantFormat(weight_bits=3, activation_bits=6)
W2A8 = QuantFormat(weight_bits=2, activation_bits=8)


def pack(weight: Tensor, bits: int) -> Tensor:
    """Whole weights int8 [N, K] as they are stored: as they are for 8 bits, else uint8 as in kernels/unpack.py."""
    check_packing(bits)
    if bits == 8:
        return weight
    below = 1 << (bits - 1)
    if int(weight.min()) < -below or int(weight.max()) >= below:
        raise ValueError(f"int{bits} holds {-below} to {below - 1}; got {int(weight.min())} to {int(weight.max())}")
    packed, low = [], 0
    for width, span in planes(weight.shape[1], bits):
        slots = 8 // width
        padded = F.pad(weight, (0, slots * span - weight.shape[1])).view(torch.uint8)
        fields = ((padded >> low) & ((1 << width) - 1)).reshape(-1, slots, span)
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=weight.device)
        packed.append((fields << shifts[:, None]).sum(dim=1, dtype=torch.uint8))
        low += width
    return torch.cat(packed, dim=1)


def packed_shape(rows: int, inputs: int, bits: int) -> tuple[int, int]:
    check_packing(bits)
    return rows, inputs if bits == 8 else packed_bytes(inputs, bits)


def check_packing(bits: int) -> None:
    if bits not in (*WIDTHS, 8):
        raise ValueError(f"weights of {bits} bits cannot be packed: those of 2 to 8 can")
