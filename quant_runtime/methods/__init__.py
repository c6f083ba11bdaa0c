"""A float layer becomes a QuantLinear. One method, one file; METHODS is all of them."""

from __future__ import annotations

from typing import Protocol

from torch import nn

from quant_runtime.calibrate import LayerStats
from quant_runtime.formats import QuantFormat
from quant_runtime.methods.none import Keep
from quant_runtime.methods.quarot import QuaRot
from quant_runtime.methods.rtn import Rtn
from quant_runtime.methods.smoothquant import SmoothQuant


class Method(Protocol):
    """A frozen dataclass: its fields are its knobs."""

    def quantize(self, layer: nn.Linear, stats: LayerStats, fmt: QuantFormat) -> nn.Module:
        """The layer that takes the place of `layer`, on its device. `layer` itself is not changed."""
        ...


METHODS: dict[str, type[Method]] = {
    "none": Keep,
    "rtn": Rtn,
    "smoothquant": SmoothQuant,
    "quarot": QuaRot,
}
