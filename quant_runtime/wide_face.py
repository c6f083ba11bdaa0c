"""A network of another library, in float32 as far as it can see, whose large weights lie in 16 bits behind that face.

Foreign code asks a weight what its layer computes in: T5 rounds what it feeds `wo` to the dtype of `wo.weight`, and a
pipeline what an encoder answers to that of its first parameter. So large weights lie beside the parameters of their
layers, which are float32 of the right shape, NaN throughout and without memory: nothing is taken for a weight that is
none. Embeddings are widened row by row as they are asked, linear layers as NarrowLinear is.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quant_runtime import narrow_linear


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
    """Names of its linear layers and embeddings that are narrow_linear.LARGE, each name of one that has several.

    Not of subclasses, which may be anything, nor of embeddings that change their weights as they are asked (max_norm).
    """
    return [
        name
        for name, module in network.named_modules(remove_duplicate=False)
        if type(module) in KINDS
        and isinstance(module.weight, Tensor)
        and module.weight.numel() >= narrow_linear.LARGE
        and getattr(module, "max_norm", None) is None
    ]


def face(network: nn.Module, names: Collection[str]) -> None:
    """These layers, which are loaded, hold their weights behind a face from now on, where they are in 16 bits.

    For running alone: the network's state_dict has the faces.
    """
    for name in names:
        module = network.get_submodule(name)
        weight = module.weight
        if type(module) not in KINDS or not isinstance(weight, Tensor) or weight.dtype.itemsize != 2:
            continue  # wide on the disk, or done under another name
        module.register_buffer("behind", weight.detach(), persistent=False)
        blank = torch.full((), torch.nan, device=weight.device).expand(weight.shape)
        module.weight = nn.Parameter(blank, requires_grad=False)
        module.__class__ = KINDS[type(module)]
