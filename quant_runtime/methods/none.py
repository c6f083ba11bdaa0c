"""No quantization: layers stay in 16 bits. For artifacts that are only sparse, and to hold the others against."""

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
