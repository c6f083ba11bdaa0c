"""Few views' way through a VGGT as few launches: else the GPU waits for the CPU at each block, and in the heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from models.vggt_net import VGGT, Aggregator
from quant_runtime.attention import AttentionState
from quant_runtime.graphs import MOST_TOKENS, ByGraph


class LaunchedAggregator:
    """Stands where an aggregator's `forward` stood, on a GPU. `states` are those of its attentions.

    Whoever gives the blocks other ones calls `forget`. Of a pass that is launched as one, all parts are told of at its
    end.
    """

    def __init__(
        self, aggregator: Aggregator, states: Callable[[], Sequence[AttentionState]], compiled: bool = False
    ) -> None:
        self.plain, self.config = aggregator.forward, aggregator.config
        self.by_graph = ByGraph(self.plain, states, self._few, compiled)
        self.few = False  # the last pass'
        self.heads: list[ByGraph] = []  # what runs behind it, which is launched as one where it is

    @property
    def launched(self) -> bool:
        """The last pass, as one."""
        return self.by_graph.launched

    def forget(self) -> None:
        self.by_graph.forget()

    def _few(self, images: Tensor) -> bool:
        batch, views, _, height, width = images.shape
        patches = (height // self.config.patch_size) * (width // self.config.patch_size)
        return batch * views * (self.config.special + patches) <= MOST_TOKENS

    def __call__(self, images: Tensor, on_part: Callable[[], None] | None = None) -> list[Tensor]:
        self.few = self._few(images)
        for its in () if self.few else (self.by_graph, *self.heads):
            its.release()  # many need the memory
        taps: list[Tensor] = self.by_graph(images, plain=partial(self.plain, on_part=on_part))
        if self.launched and on_part is not None:
            for _ in range(1 + self.config.depth):
                on_part()
        return taps


def launch_heads(network: VGGT, behind: LaunchedAggregator) -> None:
    """The four rounds of the camera head are one launch, and so is each chunk of a dense head.

    On a GPU, of a network that stays as it is; no plan of an attention says anything about them.
    """
    dense: list[Any] = [head for head in (network.depth_head, network.point_head) if head is not None]
    for module, name in ((network.camera_head, "rounds"), *((head, "mapped") for head in dense)):
        by_graph = ByGraph(getattr(module, name), tuple, lambda *given: behind.few)
        setattr(module, name, by_graph)
        behind.heads.append(by_graph)
