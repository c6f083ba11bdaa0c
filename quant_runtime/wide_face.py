"""A network of another library, in float32 as far as it can see, whose large weights lie in 16 bits behind that face.

Foreign code asks a weight what its layer computes in: T5 rounds what it feeds `wo` to the dtype of `wo.weight`, and a
pipeline what an encoder answers to that of its first parameter. So large weights lie beside the parameters of their
layers, which are float32 of the right shape, NaN throughout and without memory: nothing is taken for a weight that is
none. Embeddings are widened row by row as they are asked, linear layers as NarrowLinear is, and a convolution's filter
whole, while it runs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quant_runtime import narrow_linear
from quant_runtime.tensor_files import Blank, TensorFiles, fill

LEAST = 1 << 18  # weights, of 1 MiB in float32: to widen them takes little in what runs once a film, and keeps its size


class FacedLinear(nn.Linear):
    """nn.Linear of x float32, with `behind` [N, K] in 16 bits for its weight."""

    behind: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return narrow_linear.linear(x, self.behind, self.bias)


class FacedEmbedding(nn.Embedding):
    """nn.Embedding that answers float32, with `behind` [N, K] in 16 bits for its weight."""

    behind: Tensor

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.behind).float()


KINDS: dict[type[nn.Module], type[FacedLinear] | type[FacedEmbedding]] = {
    nn.Linear: FacedLinear,
    nn.Embedding: FacedEmbedding,
}


def faceable(network: nn.Module) -> list[str]:
    """Names of its layers that have a face, and at LEAST so many weights, each name of one that has several.

    Linear layers and embeddings; not their subclasses, which may be anything, nor embeddings that change their weights
    as they are asked (max_norm). Convolutions, and subclasses that pad or cut what they then give to nn.Conv3d's
    forward, as autoencoders have them: one that reads its weight itself would find NaN.
    """
    return [
        name
        for name, module in network.named_modules(remove_duplicate=False)
        if (type(module) in KINDS or isinstance(module, (nn.Conv2d, nn.Conv3d)))
        and isinstance(module.weight, Tensor)
        and module.weight.numel() >= LEAST
        and getattr(module, "max_norm", None) is None
    ]


def face(network: nn.Module, names: Collection[str]) -> None:
    """These layers, which are loaded, hold their weights behind a face from now on, where they are in 16 bits.

    For running alone: the network's state_dict has the faces.
    """
    for name in names:
        module = network.get_submodule(name)
        weight = module.weight
        if not isinstance(weight, Tensor) or weight.dtype.itemsize != 2:
            continue  # wide on the disk, or done under another name
        module.register_buffer("behind", weight.detach(), persistent=False)
        blank = torch.full((), torch.nan, device=weight.device).expand(weight.shape)
        module.weight = nn.Parameter(blank, requires_grad=False)
        if type(module) in KINDS:
            module.__class__ = KINDS[type(module)]
        else:
            vars(module)["_conv_forward"] = MethodType(_conv_forward, module)


def widened(layer: nn.Module, weight: Tensor) -> Tensor:
    """What a layer whose weight is seen as `weight` multiplies by: that, or what lies behind it, in its dtype."""
    behind: Tensor | None = getattr(layer, "behind", None)
    return weight if behind is None else behind.to(weight.dtype)


def _conv_forward(layer: nn.Conv2d | nn.Conv3d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    own: Any = type(layer)._conv_forward
    y: Tensor = own(layer, x, widened(layer, weight), bias)
    return y


def load(
    network: nn.Module,
    files: TensorFiles,
    device: str,
    dtype: torch.dtype,
    digests: Mapping[str, str] | None = None,
    *,
    wide: Collection[str] = (),
    tied: Mapping[str, str] = {},
) -> None:
    """As `fill`: the network in `dtype`, and modules that are named in `wide` in float32 whatever it is.

    In float32 on a CPU large layers that lie in 16 bits get a face: it takes the memory that its files have bytes.
    """
    large = faceable(network) if torch.device(device).type == "cpu" and dtype == torch.float32 else []
    stay = {f"{name}.weight" for name in large}

    def kind(key: str, stored: Blank) -> torch.dtype:
        if not stored.dtype.is_floating_point or (key in stay and stored.dtype.itemsize == 2):
            return stored.dtype
        return torch.float32 if {*wide} & {*key.split(".")} else dtype

    fill(network, files, device, digests, kind, tied)
    face(network, large)
    network.to(device)  # what no file holds
