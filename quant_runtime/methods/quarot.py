"""QuaRot (arXiv:2404.00456): spread the outliers of the inputs over all channels by a random rotation, then round.

Of the paper this is the rotation of a layer's input, done online, with round-to-nearest weights. The paper folds most
rotations into neighbouring weights, along the residual stream of a language model with RMS norms. A norm that is
shifted and scaled by the timestep (adaLN) or by learned vectors does not commute with a rotation, so here every layer
turns its own input, in the kernel that rounds it. Where the number of inputs is no power of two, the paper uses
Hadamard matrices of sizes like 12 and 20; we turn blocks of the largest power of two that divides it, which one fast
kernel does for all sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from quant_runtime.calibrate import LayerStats
from quant_runtime.formats import QuantFormat
from quant_runtime.kernels.hadamard import hadamard, largest_block
from quant_runtime.linear import LinearSpec, QuantLinear
from quant_runtime.methods.rtn import Rtn


@dataclass(frozen=True)
class QuaRot:
    """Signs are drawn from `seed` and the number of inputs alone: layers with a common input turn it alike."""

    calibrated: ClassVar[bool] = False
    seed: int = 0
    block: int = 0  # inputs that are turned together; 0 is the largest power of two that divides their number
    rounding: Rtn = field(default_factory=Rtn)

    def __post_init__(self) -> None:
        if self.block < 0 or self.block & (self.block - 1):
            raise ValueError(f"block is a power of two, or 0 for the largest that fits; got {self.block}")

    def spec(self, in_features: int, fmt: QuantFormat) -> LinearSpec:
        block = min(self.block or in_features, largest_block(in_features))
        return LinearSpec(fmt, rotation=block if block > 1 else 0)  # an odd number of inputs: there is nothing to turn

    def quantize(self, layer: nn.Linear, stats: LayerStats | None, fmt: QuantFormat) -> QuantLinear:
        spec = self.spec(layer.in_features, fmt)
        if not spec.rotation:
            return self.rounding.quantize(layer, stats, fmt)
        signs = random_signs(layer.in_features, self.seed).to(layer.weight.device)
        turned = hadamard(layer.weight.detach().float(), signs, spec.rotation)
        whole, scale = self.rounding.round_weight(turned, fmt)
        return QuantLinear.of(whole, scale, spec, layer.bias, signs=signs)


def random_signs(count: int, seed: int) -> Tensor:
    """int8 [count] of 1 and -1."""
    drawn = torch.randint(0, 2, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    return 2 * drawn - 1
