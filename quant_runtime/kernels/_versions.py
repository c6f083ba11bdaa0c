"""Every op and its versions in one table, and which of them runs on which device.

PyTorch's dispatcher tells the kind of device, this table the version: the first that the op's module names for that
kind. `fall` goes on to the next, on one device and for the rest of the process; the last is always plain torch. Whoever
says what runs (the self-test, /artifacts, run.json) reads it here.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, library

Kind = Literal["cpu", "cuda"]
Name = str | Callable[[], str]  # of a version; asked for where it is known only once the program runs
Call = Callable[..., Any]
Examine = Callable[["Op", torch.device, tuple[Any, ...]], Any]

TORCH = "torch"  # the version that ends every list
PART_ELEMENTS = 1 << 26  # of one operand: what `in_rows` works on at a time, 256 MiB of float32

OPS: dict[str, Op] = {}
_local = threading.local()


@dataclass(frozen=True)
class Version:
    call: Call
    name: Name
    on: Callable[[torch.device], bool] | None = None  # of this kind of device, those that it runs on; None is all

    def __str__(self) -> str:
        return self.name if isinstance(self.name, str) else self.name()


@dataclass(frozen=True)
class Fall:
    """That an op runs by another version than its own, and why."""

    version: Version
    why: str


class Op:
    """A torch op `quant_runtime::NAME`, called as its reference is, of tensors on one device.

    `cpu` and `cuda` are versions by their names, the preferred first; `on` says of a version by its name which devices
    of its kind it is for, and is asked at every call. `plain` is torch's, where `reference` would need more memory than
    real inputs leave; any other kind of device runs the reference. `mutates` names what is written to.
    """

    def __init__(
        self,
        name: str,
        reference: Call,
        fake: Call | None = None,
        *,
        cpu: Mapping[Name, Call] | None = None,
        cuda: Mapping[Name, Call] | None = None,
        on: Mapping[Name, Callable[[torch.device], bool]] | None = None,
        plain: Call | None = None,
        mutates: Sequence[str] = (),
    ) -> None:
        self.name, self.reference = name, reference
        parameters = list(inspect.signature(reference).parameters)
        self.mutated = tuple(parameters.index(one) for one in mutates)
        self._versions: dict[str, tuple[Version, ...]] = {}
        self._falls: dict[torch.device, list[Fall]] = {}
        self._op = library.custom_op(f"quant_runtime::{name}", reference, mutates_args=tuple(mutates))
        for kind, given in (("cpu", cpu), ("cuda", cuda)):
            own = [Version(call, its, (on or {}).get(its)) for its, call in (given or {}).items()]
            self._versions[kind] = (*own, Version(plain or reference, TORCH))
            self._op.register_kernel(kind, self._run)
        if fake is not None:
            self._op.register_fake(fake)
        OPS[name] = self

    def __call__(self, *args: Any) -> Any:
        return self._op(*args)

    def versions(self, device: torch.device | str) -> tuple[Version, ...]:
        """Those for this device, the preferred first."""
        place = _place(device)
        return tuple(one for one in self._versions[place.type] if one.on is None or one.on(place))

    def running(self, device: torch.device | str) -> Version:
        falls = self._falls.get(_place(device))
        return falls[-1].version if falls else self.versions(device)[0]

    def fall(self, device: torch.device | str, why: str) -> Version | None:
        """The next version runs on this device from now on; None where there is no other, and nothing changes."""
        known = self.versions(device)
        following = known.index(self.running(device)) + 1
        if following == len(known):
            return None
        self._falls.setdefault(_place(device), []).append(Fall(known[following], why))
        return known[following]

    def fallen(self, device: torch.device | str) -> Fall | None:
        """The version that runs in place of the op's own, and why that one does not; None where it does."""
        falls = self._falls.get(_place(device))
        return Fall(falls[-1].version, falls[0].why) if falls else None

    def rise(self, device: torch.device | str) -> None:
        """The op's own version runs again."""
        self._falls.pop(_place(device), None)

    def _run(self, *args: Any) -> Any:
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        examine: Examine | None = getattr(_local, "examine", None)
        if examine is not None:
            return examine(self, device, args)
        if device.type != "cuda":
            return self.running(device).call(*args)
        with torch.cuda.device(device):  # Triton launches on the current one, whatever the tensors lie on
            return self.running(device).call(*args)


def fallen(device: torch.device | str) -> dict[str, Fall]:
    """The ops that run by another version than their own on this device, by name."""
    found = {name: op.fallen(device) for name, op in OPS.items()}
    return {name: fall for name, fall in found.items() if fall is not None}


@contextmanager
def examined(examine: Examine) -> Iterator[None]:
    """Within it, this thread's calls of ops go to `examine(op, device, args)`, which answers in their place."""
    _local.examine = examine
    try:
        yield
    finally:
        _local.examine = None


def in_rows(reference: Call, *also: int) -> Call:
    """`reference` of rows [M, K], some rows at a time, where rows are worked on one by one.

    The first argument is rows, and so are those at `also`; every answer begins with M as well.
    """

    def parts(*args: Any) -> Any:
        height, step = len(args[0]), max(1, PART_ELEMENTS // max(1, args[0].shape[1]))
        if height <= step:
            return reference(*args)
        cut = {place for place in (0, *also) if args[place] is not None}
        answers = []
        for start in range(0, height, step):
            mine = [a[start : start + step] if place in cut else a for place, a in enumerate(args)]
            answers.append(reference(*mine))
        if isinstance(answers[0], Tensor):
            return torch.cat(answers)
        return tuple(torch.cat(same) for same in zip(*answers, strict=True))

    return parts


def _place(device: torch.device | str) -> torch.device:
    """The device with its number, as tensors have it."""
    device = torch.device(device)
    if device.type == "cpu":
        return torch.device("cpu")
    if device.index is not None:
        return device
    return torch.device(device.type, torch.cuda.current_device() if torch.cuda.is_available() else 0)
