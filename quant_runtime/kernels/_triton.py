"""Triton, or stand-ins where it is not installed: kernels then still import, and their `launch` is never reached.

`triton is None` says which. Kernel modules take `jit, tl, triton` from here and from nowhere else.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

triton: Any = None
tl: Any = None


def jit(function: Callable[..., None]) -> Any:
    """`triton.jit`, or the plain function where there is no Triton to compile it."""
    return function if triton is None else triton.jit(function)


if importlib.util.find_spec("triton") is not None:
    triton = importlib.import_module("triton")
    tl = importlib.import_module("triton.language")
