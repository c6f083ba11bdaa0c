"""Round to nearest: weights within ±top, symmetric, one scale per output channel. Every method ends in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from quant_runtime.calibrate import LayerStats
from quant_runtime.formats import QuantFormat
from quant_runtime.kernels.quantize_rows import nearest
from quant_runtime.linear import LinearSpec, QuantLinear

TINY = 1e-30  # the scale of a row of zeros is not zero
CLIPS = tuple(1.0 - 0.02 * step for step in range(26))  # 1.00, 0.98 ... 0.50 of the largest weight


@dataclass(frozen=True)
class Rtn:
    """Of FP8 weights it is the nearest number of e4m3. `clip` says where a row's largest number lies.

    "absmax", the default: at its largest weight. "mse": at the fraction of it, of those in CLIPS, that leaves the least
    squared error in the row's weights.
    """

    calibrated: ClassVar[bool] = False
    clip: Literal["absmax", "mse"] = "absmax"

    def __post_init__(self) -> None:
        if self.clip not in ("absmax", "mse"):
            raise ValueError(f"clip is absmax or mse; got {self.clip!r}")

    def spec(self, in_features: int, fmt: QuantFormat) -> LinearSpec:
        return LinearSpec(fmt)

    def quantize(self, layer: nn.Linear, stats: LayerStats | None, fmt: QuantFormat) -> QuantLinear:
        whole, scale = self.round_weight(layer.weight.detach(), fmt)
        return QuantLinear.of(whole, scale, self.spec(layer.in_features, fmt), layer.bias)

    def round_weight(self, weight: Tensor, fmt: QuantFormat) -> tuple[Tensor, Tensor]:
        """Float weights [N, K] in fmt.weight_dtype, and their scale, bfloat16 [N]: rounded before they are."""
        weight = weight.float()
        full = (weight.abs().amax(dim=1).clamp(min=TINY) / fmt.weight_top).bfloat16().float()
        if self.clip == "absmax":
            return _rounded(weight, full, fmt), full.bfloat16()

        scale, least = full, torch.full_like(full, torch.inf)
        for fraction in CLIPS:
            tried = (full * fraction).bfloat16().float()
            error = (_rounded(weight, tried, fmt).float() * tried[:, None] - weight).square().sum(dim=1)
            scale, least = torch.where(error < least, tried, scale), torch.minimum(error, least)
        return _rounded(weight, scale, fmt), scale.bfloat16()


def _rounded(weight: Tensor, scale: Tensor, fmt: QuantFormat) -> Tensor:
    return nearest((weight / scale[:, None]).clamp(-fmt.weight_top, fmt.weight_top), fmt.weight_dtype)
