"""Triton's interpreter without a search that takes up to half of its time."""

from __future__ import annotations

import inspect
from typing import Any

from triton.language.core import is_builtin
from triton.runtime import interpreter


def remember_builtins() -> None:
    """It stands in for all that is built into the language, and looks for it anew at every call of a function.

    The names are the same each time, so they are looked for once.
    """
    known: dict[Any, list[str]] = {}

    def patch_builtin(holder: Any, builder: Any, scope: Any) -> None:
        if holder not in known:
            known[holder] = [name for name, member in inspect.getmembers(holder) if is_builtin(member)]
        for name in known[holder]:
            member = getattr(holder, name)
            if is_builtin(member):  # and not stood in for already
                interpreter._patch_attr(holder, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin
