"""A GPU's work, recorded once and then launched as one (CUDA graphs): kernels that are shorter than the CPU takes to
launch them would wait for it.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from quant_runtime.attention import AttentionState, Made

MOST_TOKENS = 1 << 15  # of a pass: more keep a GPU busy while the next is launched, and a recording's memory grows
KEPT = 4  # recordings, which share their memory
SEEN = 64  # kinds of passes that are remembered to have run

V = TypeVar("V")

log = logging.getLogger(__name__)


class Recorded:
    """A call of `function`, of tensors on one GPU among other things: recorded when this is made, and not run.

    Called with tensors of the same shapes and dtypes in their places it runs what was recorded, on the current stream;
    answers are copies. What lies between is held as long as this is, but for what it shares with `beside`.

    What `function` does on the CPU it does once, here: kernels have to be compiled before, masks and orders to lie on
    the GPU already, and nothing in it may wait for the GPU. RuntimeError where something does.
    """

    def __init__(self, function: Callable[..., Any], given: Sequence[Any], beside: Recorded | None = None) -> None:
        self._given = [one.clone() if isinstance(one, Tensor) else one for one in given]
        self._graph = torch.cuda.CUDAGraph()
        pool = None if beside is None else beside._graph.pool()
        device = next(one.device for one in given if isinstance(one, Tensor))
        # Other threads of a worker may ask the driver for things of their own meanwhile.
        recording = torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local")
        with torch.cuda.device(device), recording:
            self._answer = function(*self._given)

    def __call__(self, given: Sequence[Any]) -> Any:
        for mine, new in zip(self._given, given, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(new)
        self._graph.replay()
        return tree_map(lambda one: one.clone() if isinstance(one, Tensor) else one, self._answer)


class ByGraph:
    """Stands where `function` stood, whose arguments and answers are tensors on a GPU, and trees of them.

    The first call of a kind runs as it did: it compiles kernels and makes what is cached. The second is recorded, and
    it and those behind it are launched as one. Calls are of a kind where shapes, dtypes and all that is no tensor are
    alike, and `states`, of the attentions inside, are at steps that run alike. `takes` says of a call's arguments
    whether it is worth it. What cannot be recorded goes on as it did, and a warning says so.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        states: Callable[[], Sequence[AttentionState]],
        takes: Callable[..., bool],
    ) -> None:
        self.function, self.states, self.takes = function, states, takes
        self.launched = False  # the last call, as one
        self.refused: str | None = None  # why nothing can be recorded
        self.forget()

    def forget(self) -> None:
        """What was recorded, and its memory."""
        self._recorded: OrderedDict[Hashable, tuple[Recorded, list[list[Made]]]] = OrderedDict()
        self._seen: OrderedDict[Hashable, None] = OrderedDict()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        launched, answer = self.launch(*args, **kwargs)
        return answer if launched else self.function(*args, **kwargs)

    def launch(self, *args: Any, **kwargs: Any) -> tuple[bool, Any]:
        """Whether this call is launched as one, and then its answer. Else it is the caller's to make it."""
        given, tree = tree_flatten((args, kwargs))
        kind = self._kind(given, tree) if self.refused is None and self.takes(*args, **kwargs) else None
        self.launched = kind in self._seen and (kind in self._recorded or self._record(kind, given, tree))
        if not self.launched:
            if kind is not None:
                _newest(self._seen, kind, None, SEEN)
            return False, None
        recorded, made = self._recorded[kind]
        self._recorded.move_to_end(kind)
        answer = recorded(given)
        for state, calls in zip(self.states(), made, strict=True):
            state.made_again(calls)
        return True, answer

    def _kind(self, given: Sequence[Any], tree: TreeSpec) -> Hashable:
        """None for a call that is like no other."""
        phases = [state.phase() for state in self.states()]
        tensors = [one for one in given if isinstance(one, Tensor)]
        if None in phases or len({one.device for one in tensors}) != 1:
            return None
        same = [(one.shape, one.dtype) if isinstance(one, Tensor) else repr(one) for one in given]
        return (repr(tree), *same, *phases)

    def _record(self, kind: Hashable, given: Sequence[Any], tree: TreeSpec) -> bool:
        states = self.states()
        before = [state.mark() for state in states]
        others = list(self._recorded.values())
        try:
            called = partial(_called, self.function, tree)
            recorded = Recorded(called, given, others[-1][0] if others else None)
            made = [state.back_to(mark) for state, mark in zip(states, before, strict=True)]
        except RuntimeError as error:
            self.refused = f"{error}".strip().splitlines()[0]
            log.warning("short kernels are launched one by one, and take longer: %s", self.refused)
            for state, mark in zip(states, before, strict=True):
                state.back_to(mark)
            self.forget()
            return False
        _newest(self._recorded, kind, (recorded, made), KEPT)
        return True


def _called(function: Callable[..., Any], tree: TreeSpec, *given: Any) -> Any:
    args, kwargs = tree_unflatten(given, tree)
    return function(*args, **kwargs)


def _newest(kept: OrderedDict[Hashable, V], kind: Hashable, value: V, most: int) -> None:
    """Is the newest of `kept`, which are no more than `most`."""
    kept[kind] = value
    kept.move_to_end(kind)
    while len(kept) > most:
        kept.popitem(last=False)
