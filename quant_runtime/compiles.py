"""What is compiled for a GPU, as it is: how long it took, or that it lay in the cache on the disk.

A kernel is compiled once for each set of dtypes, alignments and constants; the same set again costs nothing in this
process, and the reading of a file in the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from quant_runtime.kernels import _cuda
from quant_runtime.kernels._triton import triton


@dataclass(frozen=True)
class Compile:
    kernel: str
    seconds: float
    cached: bool  # read from the disk


_told: list[Callable[[Compile], None]] = []


def watch(tell: Callable[[Compile], None]) -> Callable[[], None]:
    """From now on `tell` hears of every one, on the thread that waits for it; until what this returns is called.

    Without Triton, and in its interpreter, there are none.
    """
    if triton is not None:
        triton.knobs.compilation.listener = _listen
    if _hear not in _cuda.listeners:
        _cuda.listeners.append(_hear)
    _told.append(tell)
    return lambda: _told.remove(tell)


@contextmanager
def recorded() -> Iterator[list[Compile]]:
    """Those that happen within it."""
    seen: list[Compile] = []
    end = watch(seen.append)
    try:
        yield seen
    finally:
        end()


def _listen(*, metadata: dict[str, Any], times: Any, cache_hit: bool, **_: object) -> None:
    _hear(str(metadata.get("name", "")), times.total / 1e6, cache_hit)


def _hear(kernel: str, seconds: float, cached: bool) -> None:
    for tell in tuple(_told):
        tell(Compile(kernel, seconds, cached))
