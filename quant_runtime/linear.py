"""QuantLinear: a linear layer of packed low-bit weights, fed with activations that it rounds as they come in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quant_runtime.formats import QuantFormat, pack, packed_shape
from quant_runtime.kernels import quantize_rows as rounding
from quant_runtime.kernels._fp8 import E4M3
from quant_runtime.kernels.hadamard import hadamard
from quant_runtime.kernels.hadamard_quantize import hadamard_quantize
from quant_runtime.kernels.linear_fp8 import linear_fp8
from quant_runtime.kernels.linear_packed import linear_packed
from quant_runtime.kernels.linear_w8a8 import linear_w8a8
from quant_runtime.kernels.unpack import unpack

Rounded = tuple[Tensor, Tensor]  # q int8 or float8_e4m3fn [M, K], as the format has it, and scale float32 [M]


@dataclass(frozen=True)
class LinearSpec:
    """What is known of a QuantLinear without its tensors: enough to make an empty one and to load it."""

    format: QuantFormat
    scaled: bool = False  # the input is multiplied by a factor per channel
    rotation: int = 0  # the block of the online Hadamard rotation; 0 is none

    def __post_init__(self) -> None:
        if not self.format.quantized or self.format.activation_bits == 16 or self.format.group:
            known = "W2 to W8 with A8, A6 and A4, for W2 to W5 with AFP8, and for FP8"
            raise ValueError(f"there are kernels for {known}, one scale a row; got {self.format}")


class QuantLinear(nn.Module):
    """y = x @ w.T + bias: w as low-bit numbers times a scale per output channel, x rounded per token at run time.

    Before it is rounded, x [..., in_features] is rotated (`input_signs`, `spec.rotation`; see kernels/hadamard.py) and
    then multiplied by `input_factor`, where the layer has them; its weights have been changed to match. x is float32,
    bfloat16 or float16, and so is y. Nothing here learns: there is no backward.

    Scales are buffers of integers that hold the bits of floats: `module.to(torch.bfloat16)`, and a loader told to load
    in bfloat16, cast every float that they find.

        qweight        int8 [N, K]; below 8 bits uint8 as kernels/unpack.py has them; of FP8 uint8 [N, K], its bits
        weight_scale   int16 [N], the bits of bfloat16
        input_factor   int16 [K], the bits of bfloat16, or None
        input_signs    int8 [K], 1 and -1, or None
        bias           a float parameter [N], or None

        held_scale, held_factor  int32, the bits of float32, behind hold_floats; never written to a file
    """

    qweight: Tensor
    weight_scale: Tensor
    input_factor: Tensor | None
    input_signs: Tensor | None
    bias: nn.Parameter | None
    held_scale: Tensor | None
    held_factor: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: LinearSpec,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """An empty layer, to be loaded into. `dtype` is the bias'."""
        super().__init__()
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        bits = spec.format.weight_bits
        weight_type = torch.int8 if bits == 8 and spec.format.weight_dtype == torch.int8 else torch.uint8
        empty = torch.empty(packed_shape(out_features, in_features, bits), dtype=weight_type, device=device)
        self.register_buffer("qweight", empty)
        self.register_buffer("weight_scale", torch.empty(out_features, dtype=torch.int16, device=device))
        factor = torch.empty(in_features, dtype=torch.int16, device=device) if spec.scaled else None
        self.register_buffer("input_factor", factor)
        signs = torch.empty(in_features, dtype=torch.int8, device=device) if spec.rotation else None
        self.register_buffer("input_signs", signs)
        for name in ("held_scale", "held_factor"):
            self.register_buffer(name, None, persistent=False)
        held = (
            nn.Parameter(torch.empty(out_features, device=device, dtype=dtype), requires_grad=False) if bias else None
        )
        self.register_parameter("bias", held)

    @classmethod
    def of(
        cls,
        whole: Tensor,
        scale: Tensor,
        spec: LinearSpec,
        bias: Tensor | None = None,
        factor: Tensor | None = None,
        signs: Tensor | None = None,
    ) -> QuantLinear:
        """The layer of weights in the format's weight_dtype [N, K] and scale bfloat16 [N].

        factor is bfloat16 [K], signs int8 [K].
        """
        if (factor is not None) != spec.scaled or (signs is not None) != bool(spec.rotation):
            raise ValueError(f"factor and signs come with the spec that asks for them; got {spec}")
        if whole.dtype != spec.format.weight_dtype:
            raise ValueError(f"weights of {spec.format} are {spec.format.weight_dtype}; got {whole.dtype}")
        for name, tensor in (("scale", scale), ("factor", factor)):
            if tensor is not None and tensor.dtype != torch.bfloat16:
                raise ValueError(f"{name} is bfloat16, so that it is stored as it was applied; got {tensor.dtype}")
        layer = cls(whole.shape[1], whole.shape[0], spec, bias=bias is not None, device="meta")
        layer.qweight = pack(whole, spec.format.weight_bits)
        layer.weight_scale = scale.contiguous().view(torch.int16)
        layer.input_factor = None if factor is None else factor.contiguous().view(torch.int16)
        layer.input_signs = signs
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(self.rounded(x.reshape(-1, self.in_features)), x.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def rounded(self, rows: Tensor) -> Rounded:
        """float [M, K] as this layer's matmul takes it: rotated, scaled, rounded."""
        its = self.spec.format
        to = (its.activation_bits, self.factor(), its.activation_dtype)
        if self.input_signs is not None:
            return hadamard_quantize(rows, self.input_signs, self.spec.rotation, *to)
        return rounding.quantize_rows(rows, *to)

    def product(self, rows: Rounded, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """What the layer answers to such rows: [M, N] of dtype, or `out`, a contiguous one that is written to."""
        (q, scale), bits = rows, self.spec.format.weight_bits
        if q.dtype == E4M3:
            return linear_fp8(q, self._whole(), scale, self._scale(), self.bias, dtype, out)
        if bits < 8:
            return linear_packed(q, self.qweight, bits, scale, self._scale(), self.bias, dtype, out)
        return linear_w8a8(q, self.qweight, scale, self._scale(), self.bias, dtype, out)

    def rounds_like(self, other: QuantLinear) -> bool:
        """Whether both round the same input to the same numbers."""
        its, others = self.spec.format, other.spec.format
        alike = self.in_features == other.in_features and self.spec.rotation == other.spec.rotation
        alike = alike and its.activation_bits == others.activation_bits
        alike = alike and its.activation_dtype == others.activation_dtype
        alike = alike and _same(self.input_factor, other.input_factor)
        return alike and _same(self.input_signs, other.input_signs)

    def fake_quant_forward(self, x: Tensor) -> Tensor:
        """What forward means, in floats: both operands rounded, then an ordinary matmul, in float64."""
        real, its = x.reshape(-1, self.in_features), self.spec.format
        real = real.float() if self.input_signs is None else hadamard(real, self.input_signs, self.spec.rotation)
        factor = self.factor()
        if factor is not None:
            real = real * factor
        step = rounding.step(real.abs().amax(dim=1, keepdim=True), its.activation_top)
        rounded = rounding.nearest(real * step.reciprocal(), its.activation_dtype).float() * step
        y = F.linear(rounded.double(), self.dequantized().double(), None if self.bias is None else self.bias.double())
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def dequantized(self) -> Tensor:
        """The stored weights as float32 [N, K]: of the rotated and scaled input."""
        return self._whole().float() * self._scale()[:, None]

    def effective_weight(self) -> Tensor:
        """The stored weights as float32 [N, K], as they would stand in the layer that this one replaced."""
        w, factor = self.dequantized(), self.factor()
        if factor is not None:
            w = w * factor
        if self.input_signs is None:
            return w
        return hadamard(w, torch.ones_like(self.input_signs), self.spec.rotation) * self.input_signs

    def stored_bytes(self) -> int:
        """In a file. A bias is written in the 16 bits that the checkpoint had, whatever it is computed in."""
        state = self.state_dict().values()
        return sum(t.numel() * (2 if t.is_floating_point() else t.element_size()) for t in state)

    def hold_floats(self) -> None:
        """From now on scale and factor are held as kernels take them, 4 bytes each, besides as they are stored.

        Of a layer that lies where it runs and stays as it is: else each product widens them, in a launch each. Whoever
        loads another state holds them anew.
        """
        self.held_scale = self.held_factor = None  # what was held before
        scale, factor = self._scale(), self.factor()
        self.held_scale = scale.view(torch.int32)
        self.held_factor = None if factor is None else factor.view(torch.int32)

    def extra_repr(self) -> str:
        turned = f", rotation={self.spec.rotation}" if self.spec.rotation else ""
        scaled = ", scaled" if self.spec.scaled else ""
        return (
            f"{self.in_features}, {self.out_features}, {self.spec.format}{turned}{scaled}, bias={self.bias is not None}"
        )

    def _whole(self) -> Tensor:
        """[N, K] as the matmul takes it."""
        its = self.spec.format
        if its.weight_bits == 8:
            return self.qweight if its.weight_dtype == torch.int8 else self.qweight.view(E4M3)
        return unpack(self.qweight, self.in_features, its.weight_bits, its.activation_dtype)

    def _scale(self) -> Tensor:
        if self.held_scale is not None:
            return self.held_scale.view(torch.float32)
        return self.weight_scale.view(torch.bfloat16).float()

    def factor(self) -> Tensor | None:
        """What multiplies the input, float32 [K], or None."""
        if self.held_factor is not None:
            return self.held_factor.view(torch.float32)
        return None if self.input_factor is None else self.input_factor.view(torch.bfloat16).float()


def fusable(first: QuantLinear, other: QuantLinear) -> bool:
    """Do both treat a common input alike (spec, factor, signs), and have a bias both or neither?"""
    same_input = _same(other.input_factor, first.input_factor) and _same(other.input_signs, first.input_signs)
    same_spec = other.spec == first.spec and other.in_features == first.in_features
    return same_spec and same_input and (other.bias is None) == (first.bias is None)


def fuse(layers: Sequence[QuantLinear]) -> QuantLinear:
    """One layer that answers what these would, side by side along the last axis: their common input is rounded once.

    Refuses layers that are not fusable.
    """
    first = layers[0]
    for layer in layers[1:]:
        if not fusable(first, layer):
            raise ValueError(
                f"layers that are fused treat their input alike, and have a bias all or none; got {first}, {layer}"
            )
    outputs = sum(layer.out_features for layer in layers)
    fused = QuantLinear(first.in_features, outputs, first.spec, bias=first.bias is not None, device="meta")
    state: dict[str, Any] = dict(first.state_dict())
    for name in {"qweight", "weight_scale", "bias"} & state.keys():
        state[name] = torch.cat([layer.state_dict()[name] for layer in layers])
    fused.load_state_dict(state, assign=True)
    fused.requires_grad_(False)
    return fused


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)
