"""SmoothQuant (arXiv:2211.10438): move the outliers of the activations into the weights, then round.

The paper folds 1/s into the layer norm in front. Here the layer multiplies its input as it rounds it, which costs
nothing there and asks nothing of the network; activations are rounded per token at run time (the paper's O1), weights
per output channel.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from quant_runtime.calibrate import LayerStats
from quant_runtime.formats import QuantFormat
from quant_runtime.linear import LinearSpec, QuantLinear
from quant_runtime.methods.rtn import Rtn


@dataclass(frozen=True)
class SmoothQuant:
    calibrated: ClassVar[bool] = True
    alpha: float = 0.5  # 0 leaves the outliers in the activations, 1 moves them all
    rounding: Rtn = field(default_factory=Rtn)

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha lies between 0 and 1; got {self.alpha}")

    def spec(self, in_features: int, fmt: QuantFormat) -> LinearSpec:
        return LinearSpec(fmt, scaled=True)

    def quantize(self, layer: nn.Linear, stats: LayerStats | None, fmt: QuantFormat) -> QuantLinear:
        if stats is None:
            raise ValueError("smoothquant scales a layer by what it is fed: calibrate it")
        scale = smoothing_scale(stats.absmax, stats.weight_absmax, self.alpha)
        factor = scale.reciprocal().to(torch.bfloat16).to(layer.weight.device)  # any scale near it does as well
        whole, weight_scale = self.rounding.round_weight(layer.weight.detach().float() / factor.float(), fmt)
        return QuantLinear.of(whole, weight_scale, self.spec(layer.in_features, fmt), layer.bias, factor=factor)


def smoothing_scale(activation_max: Tensor, weight_max: Tensor, alpha: float) -> Tensor:
    """One factor per input channel: divide x by it and multiply w by it, and x @ w.T stays what it was. Equation 4."""
    scale = activation_max.pow(alpha) / weight_max.pow(1 - alpha)
    return torch.where(scale.isfinite() & (scale > 0), scale, 1.0)  # a silent channel stays as it is
