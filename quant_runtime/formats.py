"""How a layer is stored and fed: widths as a value, written W4A8 or FP8, and the packing of weights into their bits."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from quant_runtime.kernels._fp8 import E4M3, FP8_TOP, FP8_WHOLE
from quant_runtime.kernels.unpack import WIDTHS, packed_bytes, planes

Kind = Literal["int", "fp8"]


@dataclass(frozen=True)
class QuantFormat:
    """Widths of a layer's weights and of its inputs. A value to compare and to write down, not a class per combination.

    Weights: whole numbers within ±weight_top, one scale per output channel. Activations: within ±activation_top, one
    scale per token, found at run time. 16 bits stand for "as the checkpoint has them", bf16 or fp16.

    Of the kind "fp8" they are numbers of e4m3, which has 8 bits, and their top is 448: W4AFP8 has whole weights, which
    e4m3 holds as they are, and FP8 activations; FP8 has both so.
    """

    weight_bits: int
    activation_bits: int = 16
    group: int = 0  # inputs that share a weight scale; 0 is the whole row
    weight_kind: Kind = "int"
    activation_kind: Kind = "int"

    def __post_init__(self) -> None:
        if self.weight_bits not in (2, 3, 4, 5, 6, 7, 8, 16) or self.activation_bits not in (4, 6, 8, 16):
            raise ValueError(f"weights have 2 to 8 or 16 bits and activations 4, 6, 8 or 16; got {self}")
        if self.group < 0:
            raise ValueError(f"group is a number of inputs, or 0 for the whole row; got {self.group}")
        kinds = ((self.weight_kind, self.weight_bits), (self.activation_kind, self.activation_bits))
        if any(kind not in ("int", "fp8") or (kind == "fp8" and bits != 8) for kind, bits in kinds):
            raise ValueError(f"weights and activations are int, or fp8 of 8 bits; got {self!r}")
        whole = self.weight_kind == "int"
        if (self.activation_kind == "fp8" and whole and self.weight_top >= FP8_WHOLE) or (
            self.activation_kind == "int" and not whole
        ):
            held = "weights of 2 to 5 bits, whose whole numbers e4m3 holds, W2AFP8 to W5AFP8"
            raise ValueError(f"FP8 activations go with FP8 weights, FP8, or with {held}; got {self}")

    @classmethod
    def parse(cls, text: str) -> QuantFormat:
        """The format written as "w4a8" or "W4A8", "w4afp8" or "fp8"."""
        if text.upper() == "FP8":
            return cls(8, 8, weight_kind="fp8", activation_kind="fp8")
        written = re.fullmatch(r"W(\d{1,2})A(\d{1,2}|FP8)", text.upper())
        if written is None:
            raise ValueError(f"a format is written like W4A8, W4AFP8 or FP8; got {text!r}")
        if written[2] == "FP8":
            return cls(int(written[1]), 8, activation_kind="fp8")
        return cls(weight_bits=int(written[1]), activation_bits=int(written[2]))

    def __str__(self) -> str:
        weights, activations = (
            "FP8" if kind == "fp8" else str(bits)
            for kind, bits in ((self.weight_kind, self.weight_bits), (self.activation_kind, self.activation_bits))
        )
        grouped = f" group={self.group}" if self.group else ""
        return ("FP8" if weights == activations == "FP8" else f"W{weights}A{activations}") + grouped

    @property
    def quantized(self) -> bool:
        return self.weight_bits < 16

    @property
    def weight_top(self) -> float:
        return FP8_TOP if self.weight_kind == "fp8" else (1 << (self.weight_bits - 1)) - 1

    @property
    def activation_top(self) -> float:
        return FP8_TOP if self.activation_kind == "fp8" else (1 << (self.activation_bits - 1)) - 1

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of weights as a method rounds them, before they are packed."""
        return E4M3 if self.weight_kind == "fp8" else torch.int8

    @property
    def activation_dtype(self) -> torch.dtype:
        """Of both operands of the layer's matmul."""
        return E4M3 if self.activation_kind == "fp8" else torch.int8


W16A16 = QuantFormat(weight_bits=16)
W8A8 = QuantFormat(weight_bits=8, activation_bits=8)
W4A8 = QuantFormat(weight_bits=4, activation_bits=8)
W4A6 = QuantFormat(weight_bits=4, activation_bits=6)
W4A4 = QuantFormat(weight_bits=4, activation_bits=4)
W3A8 = QuantFormat(weight_bits=3, activation_bits=8)
W3A6 = QuantFormat(weight_bits=3, activation_bits=6)
W2A8 = QuantFormat(weight_bits=2, activation_bits=8)
FP8 = QuantFormat(weight_bits=8, activation_bits=8, weight_kind="fp8", activation_kind="fp8")
W4AFP8 = QuantFormat(weight_bits=4, activation_bits=8, activation_kind="fp8")


def pack(weight: Tensor, bits: int) -> Tensor:
    """Whole weights int8 [N, K] as they are stored: as they are for 8 bits, else uint8 as in kernels/unpack.py.

    FP8 weights are stored as their bits, uint8: what casts every float that it finds leaves them alone.
    """
    check_packing(bits)
    if weight.dtype == E4M3:
        return weight.view(torch.uint8)
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
