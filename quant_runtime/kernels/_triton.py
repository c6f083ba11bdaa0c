"""Triton, or stand-ins where it is not installed: kernels then still import, and their `launch` is never reached.

`triton is None` says which. Kernel modules take what is Triton's from here and from nowhere else.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

triton: Any = None
tl: Any = None
TensorDescriptor: Any = None  # a tensor cut into tiles, as the copy engine of a Hopper takes it


def jit(function: Callable[..., None]) -> Any:
    """`triton.jit`, or the plain function where there is no Triton to compile it."""
    return function if triton is None else triton.jit(function)


if importlib.util.find_spec("triton") is not None:
    triton = importlib.import_module("triton")
    tl = importlib.import_module("triton.language")
    TensorDescriptor = importlib.import_module("triton.tools.tensor_descriptor").TensorDescriptor


@functools.cache
def shared_kib(device: torch.device) -> int:
    """Shared memory that one program can have: of the data-centre cards, by their capability; 99 of all others.

    Triton's interpreter, on a CPU, has as much as the largest.
    """
    known = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
    return known.get(torch.cuda.get_device_capability(device), 99) if device.type == "cuda" else 227


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU: how many programs run at once, at least. Without one, what tests make do with."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
