"""No quantization: the layer stays in 16 bits. What a sparse but unquantized artifact is made with, and what others are
held against."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from quant_runtime.calibrate import LayerStats
from quant_runtime.formats import QuantFormat


@dataclass(frozen=True)
class Keep:
    def quantize(self, layer: nn.Linear, stats: LayerStats, fmt: QuantFormat) -> nn.Linear:
        if fmt.quantized:
            raise ValueError(f"method none keeps layers in 16 bits, W16A16; got {fmt}")
        return layer
