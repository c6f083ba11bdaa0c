"""A float layer becomes a QuantLinear. One method, one file; METHODS is all of them."""

from __future__ import annotations

from typing import ClassVar, Protocol, runtime_checkable

from torch import nn

from quant_runtime.calibrate import LayerStats
from quant_runtime.formats import QuantFormat
from quant_runtime.linear import LinearSpec, QuantLinear
from quant_runtime.methods.none import Keep
from quant_runtime.methods.quarot import QuaRot
from quant_runtime.methods.rtn import Rtn
from quant_runtime.methods.smoothquant import SmoothQuant


class Method(Protocol):
    """A frozen dataclass: its fields are its knobs."""

    def quantize(self, layer: nn.Linear, stats: LayerStats, fmt: QuantFormat) -> nn.Module:
        """The layer that takes the place of `layer`, on its device. `layer` itself is not changed."""
        ...


@runtime_checkable
class Streamable(Protocol):
    """A method that says what becomes of a layer before it has seen one: it can take a checkpoint layer by layer."""

    calibrated: ClassVar[bool]  # does it look at `stats`, or at weights alone?

    def spec(self, in_features: int, fmt: QuantFormat) -> LinearSpec:
        """Of the layer that `quantize` makes of one with so many inputs."""
        ...

    def quantize(self, layer: nn.Linear, stats: LayerStats | None, fmt: QuantFormat) -> QuantLinear:
        """`stats` is None only where the method is not calibrated."""
        ...


METHODS: dict[str, type[Method]] = {
    "none": Keep,
    "rtn": Rtn,
    "smoothquant": SmoothQuant,
    "quarot": QuaRot,
}
