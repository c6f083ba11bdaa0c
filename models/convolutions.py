"""Convolutions of a float32 video autoencoder on a CPU: by oneDNN, as torch does it in bfloat16.

In float32 torch takes oneDNN for large inputs alone, and measures them by their first four dimensions: of a film that
is decoded a few frames at a time the width does not count. What it takes instead is slower and larger: it writes every
input out once for each weight of a filter.
"""

from __future__ import annotations

from types import MethodType

import torch
from torch import Tensor, nn

from quant_runtime.wide_face import widened


def by_onednn(network: nn.Module) -> None:
    """From now on the float32 nn.Conv3d layers of `network`, which lies on a CPU, go through oneDNN. For inference."""
    if not torch.backends.mkldnn.is_available():
        return
    for layer in network.modules():
        if isinstance(layer, nn.Conv3d) and _is_plain(layer):
            vars(layer)["_conv_forward"] = MethodType(_conv_forward, layer)


def _is_plain(layer: nn.Conv3d) -> bool:
    zeros = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return zeros and layer.weight.dtype == torch.float32


def _conv_forward(layer: nn.Conv3d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    assert not isinstance(layer.padding, str)
    weight = widened(layer, weight)
    return torch.mkldnn_convolution(x, weight, bias, layer.padding, layer.stride, layer.dilation, layer.groups)
