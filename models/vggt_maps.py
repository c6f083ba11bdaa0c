"""VGGT's dense heads on a GPU: what stands between two convolutions is one pass, and the last product another.

torch adds a convolution's bias, a residual and a place each in a pass of its own, rectifies in another, and resizes
16-bit maps that lie channels last at a tenth of what the memory gives. On a CPU, which adds biases as it convolves, the
network's own way is the faster.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.vggt_net import LAST, VGGT, DPTHead, ResidualUnit, places
from quant_runtime.kernels.map_pass import map_answer, map_pass


class Passes:
    """Stands where a head's `mapped` stood: the same, rounded less often. Weights lie channels last, as `settle` has
    them."""

    def __init__(self, head: DPTHead) -> None:
        self.head: Any = head

    def __call__(self, taps: list[Tensor], size: tuple[int, int], patch: int) -> Tensor:
        head, grid = self.head, (size[0] // patch, size[1] // patch)
        maps = []
        for tap, project, to_scale in zip(taps, head.projects, head.resize_layers, strict=True):
            # With the special tokens, which are few: without them each tap would be copied.
            x = F.linear(head.norm(tap.to(head.norm.weight.dtype)), project.weight.flatten(1))[:, head.special :]
            x = x.transpose(1, 2).unflatten(2, grid)
            x = map_pass(x, bias=project.bias, places=placed(x, grid, size))
            maps.append(x if isinstance(to_scale, nn.Identity) else map_pass(bare(to_scale, x), bias=to_scale.bias))
        x = self._fused(maps)
        x = map_pass(x, size, head.scratch.output_conv1.bias, placed(x, size, size))
        conv, _, last = head.scratch.output_conv2
        return map_answer(bare(conv, x), conv.bias, last.weight.flatten(1), last.bias)

    def _fused(self, maps: list[Tensor]) -> Tensor:
        """As Scratch.forward, but for the last bias. Of a side and of a sum only what is above zero is read."""
        scratch = self.head.scratch
        sides = [rectified(getattr(scratch, f"layer{index}_rn"), x) for index, x in enumerate(maps, start=1)]
        sizes = [(2 * sides[0].shape[2], 2 * sides[0].shape[3]), *((s.shape[2], s.shape[3]) for s in sides)]
        x: Tensor | None = None
        for index in (4, 3, 2, 1):
            fuse, side = getattr(scratch, f"refinenet{index}"), sides[index - 1]
            if x is not None:
                side = residual(fuse.resConfUnit1, side, other=x, and_rectified=True)
            within = bare(fuse.out_conv, residual(fuse.resConfUnit2, side))
            x = map_pass(within, sizes[index - 1], fuse.out_conv.bias)
        assert x is not None
        return bare(scratch.output_conv1, x)


def bare(conv: Any, x: Tensor) -> Tensor:
    """The convolution without its bias."""
    turned = isinstance(conv, nn.ConvTranspose2d)
    more = (conv.stride, conv.padding, conv.dilation, turned, conv.output_padding, conv.groups)
    return torch.convolution(x, conv.weight, None, *more)


def rectified(conv: Any, x: Tensor) -> Tensor:
    return map_pass(bare(conv, x), bias=conv.bias, rectified=True)


def residual(unit: ResidualUnit, x: Tensor, other: Tensor | None = None, and_rectified: bool = False) -> Tensor:
    """The unit of an x that is above zero already, plus another map."""
    h = bare(unit.conv2, rectified(unit.conv1, x))
    return map_pass(h, bias=unit.conv2.bias, side=x, other=other, rectified=and_rectified)


def placed(x: Tensor, at: tuple[int, int], image: tuple[int, int]) -> tuple[Tensor, Tensor]:
    return places(*at, x.shape[1], image, x.device)


def pass_maps(network: VGGT) -> None:
    """From now on the dense heads of a VGGT, which lies on its device in its dtypes, run so: before it is launched as
    one, which records what stands there then."""
    heads: list[Any] = [head for head in (network.depth_head, network.point_head) if head is not None]
    for head in heads:
        head.mapped = Passes(head)


def tried(channels: int, dtype: torch.dtype, device: torch.device) -> None:
    """For the self-test: the passes over maps `channels` wide."""
    kind: dict[str, Any] = {"device": device, "dtype": dtype}
    small, size = (5, 9), (10, 19)
    tokens = torch.randn(2, 3 + small[0] * small[1], channels, **kind)
    x, bias = tokens[:, 3:].transpose(1, 2).unflatten(2, small), torch.randn(channels, **kind)
    x = map_pass(map_pass(x, bias=bias, places=placed(x, small, size)), bias=bias)
    side = map_pass(x, bias=bias, rectified=True)
    x = map_pass(map_pass(x, bias=bias, side=side, other=x, rectified=True), size, bias)
    map_pass(map_pass(x, bias=bias, side=x), (23, 40), bias, placed(x, (23, 40), (23, 40)))


def tried_last(outputs: int, dtype: torch.dtype, device: torch.device) -> None:
    """For the self-test: how a head of so many outputs ends."""
    kind: dict[str, Any] = {"device": device, "dtype": dtype}
    x = torch.randn(2, LAST, 23, 40, **kind).contiguous(memory_format=torch.channels_last)
    weight, bias = (torch.randn(*shape, device=device) for shape in ((outputs, LAST), (outputs,)))
    map_answer(x, torch.randn(LAST, **kind), weight, bias)
