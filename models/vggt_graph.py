"""Few views' way through a VGGT's aggregator as one launch: else the GPU waits for the CPU at each of 72 blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from models.vggt_net import Aggregator
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
        if not self._few(images):
            self.by_graph.release()  # many need the memory
        taps: list[Tensor] = self.by_graph(images, plain=partial(self.plain, on_part=on_part))
        if self.launched and on_part is not None:
            for _ in range(1 + self.config.depth):
                on_part()
        return taps
