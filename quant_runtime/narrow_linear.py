"""NarrowLinear: a layer in its checkpoint's 16 bits among others in float32: a CPU holds it as the disk does."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quant_runtime.kernels._cpu import row_chunks, scratch

LARGE = 1 << 22  # weights, of 16 MiB in float32: what layers below this widen to is little beside a model


class NarrowLinear(nn.Linear):
    """y = x @ w.T + bias of x and y float32 and w in 16 bits, which are widened where they are multiplied.

    The sums are those of the layer in float32. A few output channels at a time are widened, so that they stay in cache
    and no second copy of the weights is made. x in the weights' own float is multiplied in it, and y is in it too.
    """

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear of x float32 [..., K] with a weight [N, K] in 16 bits, or of x in the weight's own dtype."""
    if x.dtype == weight.dtype:
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    rows = x.reshape(-1, weight.shape[1])
    y = rows.new_empty(len(rows), weight.shape[0])
    for some in row_chunks(*weight.shape):
        part = weight[some]
        torch.mm(rows, scratch("narrow weights", tuple(part.shape), x.dtype).copy_(part).t(), out=y[:, some])
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], weight.shape[0])


def narrowable(network: nn.Module) -> list[str]:
    """Names of its linear layers that are LARGE. Not of an nn.Linear's subclasses, which may be anything."""
    return [
        name for name, module in network.named_modules() if type(module) is nn.Linear and module.weight.numel() >= LARGE
    ]


def keep_narrow(network: nn.Module, names: Collection[str]) -> None:
    """These layers, which may be on the meta device, are NarrowLinears from now on, to load into."""
    for name in names:
        layer = network.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        made = NarrowLinear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        made.weight, made.bias = layer.weight, layer.bias
        network.set_submodule(name, made.train(layer.training))
