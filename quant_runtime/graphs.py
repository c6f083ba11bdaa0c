"""A GPU's work, recorded once and then launched as one (CUDA graphs): kernels that are shorter than the CPU takes to
launch them would wait for it.
"""

from __future__ import annotations

import functools
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

from quant_runtime.attention import AttentionState, Made

MOST_TOKENS = 1 << 15  # of a pass: more keep a GPU busy while the next is launched, and a recording's memory grows
KEPT = 4  # recordings, which share their memory
SEEN = 64  # kinds of passes that are remembered: that they have run, or that they cannot be recorded

V = TypeVar("V")

log = logging.getLogger(__name__)


class Recorded:
    """A call of `function`, of tensors on one GPU among other things: recorded when this is made, and not run.

    Called with tensors of the same shapes and dtypes in their places it runs what was recorded, on the current stream;
    answers are copies. What lies between is held as long as this is, but for what it shares with `beside`; so is all
    else that was read, such as masks and orders that a cache may drop, but for `others`, which whoever calls looks
    after. `compiled` says that `function` is torch's compiler's, which looks after that itself.

    What `function` does on the CPU it does once, here: kernels have to be compiled before, masks and orders to lie on
    the GPU already, and nothing in it may wait for the GPU. RuntimeError where something does.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        given: Sequence[Any],
        beside: Recorded | None = None,
        compiled: bool = False,
        others: Sequence[Tensor] = (),
    ) -> None:
        device = next(one.device for one in given if isinstance(one, Tensor))
        self._given = [one.clone() if isinstance(one, Tensor) else one for one in given]
        self._reads = Reads(others)
        generator = torch.cuda.default_generators[device.index]
        drawn = generator.clone_state()
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
            # The stream is set once more around it: a recording that fails does not give back its own.
            self._graph = torch.cuda.CUDAGraph()
            self._pool: Any = torch.cuda.graph_pool_handle() if beside is None else beside._pool
            recording = torch.cuda.graph(
                self._graph,
                pool=self._pool,
                stream=_stream(device),
                capture_error_mode="thread_local",  # other threads of a worker may ask the driver for things of theirs
            )
            try:
                with recording, nullcontext() if compiled else self._reads:
                    self._answer = function(*self._given)
            except BaseException:
                _end_pool(device, self._pool)
                generator.graphsafe_set_state(drawn)  # its own would wait for the end of this recording, which failed
                raise

    def __call__(self, given: Sequence[Any]) -> Any:
        for mine, new in zip(self._given, given, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(new)
        self._graph.replay()
        return tree_map(lambda one: one.clone() if isinstance(one, Tensor) else one, self._answer)


class Reads(TorchDispatchMode):
    """Holds every tensor that ops within it read and that none of them made, but for `others`."""

    def __init__(self, others: Sequence[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own has no types
        self.held: dict[int, Tensor] = {}
        self._made = {_place(one) for one in others}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for one in _tensors((args, kwargs)):
            if _place(one) not in self._made:
                self.held[_place(one)] = one
        answer = func(*args, **(kwargs or {}))
        self._made |= {_place(one) for one in _tensors(answer)} - self.held.keys()
        return answer


class _Recording(NamedTuple):
    recorded: Recorded
    made: list[list[Made]]  # calls, of each state
    places: list[Hashable]  # of each state


class ByGraph:
    """Stands where `function` stood, whose arguments and answers are tensors on a GPU, and trees of them.

    The first call of a kind runs as it did: it compiles kernels and makes what is cached. So does the second, behind
    which it is recorded; those that follow are launched as one. Calls are of a kind where shapes, dtypes and all that
    is no tensor are alike, and `states`, of the attentions inside, are at steps that run alike. `takes` says of a
    call's arguments whether it is worth it. A kind that cannot be recorded goes on as it did, and a warning says so.

    Whoever changes what `function` does calls `forget`.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        states: Callable[[], Sequence[AttentionState]],
        takes: Callable[..., bool],
        compiled: bool = False,
    ) -> None:
        self.function, self.states, self.takes, self.compiled = function, states, takes, compiled
        self.launched = False  # the last call, as one
        self.forget()

    def forget(self) -> None:
        self.release()
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        self.refused: OrderedDict[Hashable, str] = OrderedDict()  # why, by kind

    def release(self) -> None:
        """What was recorded, and its memory. A kind that was seen is recorded behind its next call."""
        self._recorded: OrderedDict[Hashable, _Recording] = OrderedDict()

    def release_stale(self) -> None:
        """Recordings that read what was kept where it no longer lies."""
        places = self._places()
        for kind in [kind for kind, one in self._recorded.items() if one.places != places]:
            del self._recorded[kind]

    def __call__(self, *args: Any, plain: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
        """`plain` runs where this call is not launched as one, and answers what `function` does."""
        given, tree = tree_flatten((args, kwargs))
        kind = self._kind(given, tree) if self.takes(*args, **kwargs) else None
        self.release_stale()
        self.launched = kind in self._recorded
        if self.launched:
            return self._launch(kind, given)
        before = [state.mark() for state in self.states()]
        answer = (plain or self.function)(*args, **kwargs)
        if kind in self._seen and kind not in self.refused:
            self._record(kind, given, tree, before)
        elif kind is not None:
            _newest(self._seen, kind, None, SEEN)
        return answer

    def _launch(self, kind: Hashable, given: Sequence[Any]) -> Any:
        one = self._recorded[kind]
        self._recorded.move_to_end(kind)
        answer = one.recorded(given)
        for state, calls in zip(self.states(), one.made, strict=True):
            state.made_again(calls)
        return answer

    def _kind(self, given: Sequence[Any], tree: TreeSpec) -> Hashable:
        """None for a call that is like no other."""
        phases = [state.phase() for state in self.states()]
        tensors = [one for one in given if isinstance(one, Tensor)]
        if None in phases or len({one.device for one in tensors}) != 1:
            return None
        same = [(one.shape, one.dtype, one.device) if isinstance(one, Tensor) else repr(one) for one in given]
        return (repr(tree), *same, *phases, torch.is_inference_mode_enabled())

    def _places(self) -> list[Hashable]:
        return [state.place() for state in self.states()]

    def _record(self, kind: Hashable, given: Sequence[Any], tree: TreeSpec, before: Sequence[Any]) -> None:
        """Behind a call of the same, and as it was `before` that: what it caches is there.

        torch.OutOfMemoryError is the caller's to know of.
        """
        states = self.states()

        def again() -> list[list[Made]]:
            """As nothing was answered, no calls were made."""
            return [state.back_to(mark) for state, mark in zip(states, before, strict=True)]

        called, others = partial(_called, self.function, tree), list(self._recorded.values())
        kept = [tensor for state in states for tensor in state.kept()]  # which tell when they lie elsewhere
        answered = again()
        try:
            with without_waiting():  # so that what cannot be recorded is found out while nothing is
                called(*given)
            again()
            recorded = Recorded(called, given, others[-1].recorded if others else None, self.compiled, kept)
            _newest(self._recorded, kind, _Recording(recorded, again(), self._places()), KEPT)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            why = f"{error}".strip().splitlines()[0]
            _newest(self.refused, kind, why, SEEN)
            log.warning("short kernels are launched one by one, and take longer: %s", why)
        finally:
            again()
            for state, calls in zip(states, answered, strict=True):
                state.on_to(calls)


@contextmanager
def without_waiting() -> Iterator[None]:
    """Within it a torch op that waits for a GPU raises RuntimeError."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Recordings that share memory are made on one."""
    return torch.cuda.Stream(device)


def _end_pool(device: torch.device, pool: Any) -> None:
    """What torch leaves undone where the driver refuses to end a recording: allocations would go to its memory on."""
    end = getattr(torch._C, "_cuda_endAllocateToPool", None)
    with suppress(RuntimeError, TypeError):  # it was done; and what failed is to be told, not this
        if end is not None:
            end(device.index, pool)


def _called(function: Callable[..., Any], tree: TreeSpec, *given: Any) -> Any:
    args, kwargs = tree_unflatten(given, tree)
    return function(*args, **kwargs)


def _tensors(tree: Any) -> list[Tensor]:
    return [one for one in tree_leaves(tree) if isinstance(one, Tensor)]


def _place(tensor: Tensor) -> int:
    place: int = tensor.untyped_storage()._cdata
    return place


def _newest(kept: OrderedDict[Hashable, V], kind: Hashable, value: V, most: int) -> None:
    """Is the newest of `kept`, which are no more than `most`."""
    kept[kind] = value
    kept.move_to_end(kind)
    while len(kept) > most:
        kept.popitem(last=False)
