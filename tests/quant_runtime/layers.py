"""Layers to quantize and inputs with the outlier channels of real activations, for the tests of this room."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quant_runtime.calibrate import LayerStats, observe
from quant_runtime.formats import QuantFormat
from quant_runtime.linear import QuantLinear
from quant_runtime.methods import METHODS


def tokens(inputs: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """[2, 37, inputs], one channel in 32 thirty times as large."""
    x = torch.randn(2, 37, inputs, device=device)
    x[..., ::32] *= 30
    return x.to(dtype)


def observed(inputs: int, outputs: int, device: str, bias: bool = True) -> tuple[nn.Linear, LayerStats]:
    layer = nn.Linear(inputs, outputs, bias=bias, device=device)
    stats = observe(nn.Sequential(layer), ["0"], lambda _: layer(tokens(inputs, device)))
    return layer, stats["0"]


def quantized(method: str, fmt: QuantFormat, inputs: int, outputs: int, device: str, bias: bool = True) -> QuantLinear:
    layer, stats = observed(inputs, outputs, device, bias)
    made = METHODS[method]().quantize(layer, stats, fmt)
    assert isinstance(made, QuantLinear)
    return made
