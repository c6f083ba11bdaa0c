"""Runs that use one network on the disk go through it together, block by block: its weights are read once for all.

A run is a program of its own, say a pipeline with its scheduler, that asks for passes of paged networks through gates.
Once every run waits for an answer, the passes that they ask for advance from block to block side by side. Runs and
passes are threads, of which one goes at a time: the same sums as one after the other. What a pass holds while others go
lies in a file that has no name: of activations, those of one pass are in memory.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, Self

import torch
from torch import Tensor, UntypedStorage, nn

from quant_runtime.kernels._cpu import give_back_freed_memory
from quant_runtime.paged import Pages

Known = Callable[[int, int], Tensor | None]  # (run, number of its guided pass): the answer, where it is known


class _Stopped(BaseException):
    """No error: the way out of what nobody waits for any more."""


class _Strand:
    """A function in a thread that takes turns with the one that made it."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.done = False
        self.answer: Any = None
        self._work, self._stop = work, False
        self._error: BaseException | None = None
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def go_on(self) -> None:
        """Until it waits or has ended. Raises what ended it."""
        if self._thread.ident is None:
            self._thread.start()
        self._go.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """In its own thread: the other one's turn."""
        self._back.release()
        self._go.acquire()
        if self._stop:
            raise _Stopped

    def stop(self) -> None:
        """It ends where it waits."""
        if self._thread.ident is not None and not self.done:
            self._stop = True
            self._go.release()
            self._thread.join()

    def _run(self) -> None:
        self._go.acquire()
        try:
            with torch.inference_mode():
                self.answer = self._work()
        except _Stopped:
            pass
        except BaseException as error:  # whatever it is, it is the other thread's
            self._error = error
        self.done = True
        self._back.release()


class _Run(_Strand):
    """One of the programs."""

    def __init__(self, number: int, work: Callable[[], Any]) -> None:
        super().__init__(work)
        self.number = number
        self.guided = 0  # passes that it has asked for through gates with `guided`
        self.asked: list[_Call] = []  # and waits for


class _Call:
    """A pass that was asked for."""

    def __init__(
        self, gate: Gate, run: _Run, number: int | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.gate, self.run, self.number, self.args, self.kwargs = gate, run, number, args, kwargs
        self.answer: Any = None
        self.promised: Tensor | None = None  # what the run was given already, to be filled


class _Pass(_Strand):
    """A pass on its way through a network's blocks. In `file` lies what it holds while others go."""

    def __init__(self, call: _Call, file: IO[bytes]) -> None:
        super().__init__(lambda: call.gate.pages.network(*call.args, **call.kwargs))
        self.call, self._file = call, file
        self.resume: Callable[[], None] | None = None
        self.made: list[weakref.ref[Tensor]] = []  # answers of the network's parts ahead of its blocks
        self._given: Any = None  # to the block that it stands before
        self._away: list[tuple[UntypedStorage, torch.device, int]] = []

    def stand_before(self, given: Any) -> None:
        self._given = given
        self.wait()
        self._given = None

    def put_away(self) -> None:
        """Memory of its own that it goes on with becomes a file. Not that of what it was called with."""
        network = self.call.gate.pages.network
        others = {_place(t) for t in (*network.parameters(), *network.buffers())}
        others |= {_place(t) for t in _tensors((self.call.args, self.call.kwargs))}
        made = [tensor for ref in self.made if (tensor := ref()) is not None]
        own = {_place(t): t for t in (*_tensors(self._given), *made)}
        end = 0
        for place, tensor in own.items():
            storage = tensor.untyped_storage()
            if place in others or not storage.nbytes():
                continue
            _moved(os.pwritev, self._file.fileno(), storage.cpu(), end)
            end += storage.nbytes()
            self._away.append((storage, tensor.device, storage.nbytes()))
            storage.resize_(0)

    def fetch(self) -> None:
        done = 0
        for storage, device, size in self._away:
            if storage.nbytes():
                raise RuntimeError("memory of a pass was written to while it waited: it is not its own")
            storage.resize_(size)
            read = storage if device.type == "cpu" else UntypedStorage(size)
            _moved(os.preadv, self._file.fileno(), read, done)
            if read is not storage:
                storage.copy_(read, non_blocking=False)
            done += size
        self._away.clear()


class Gate:
    """Stands in a run for a paged network: what it is called with is answered together with what others ask.

    Where the network is `guided`, a step asks for so many passes that do not wait for each other (with a prompt and
    without): all but the last are answered with a tensor that is filled before the last one is. Networks whose answers
    are awaited one by one have 0.
    """

    def __init__(self, together: Lockstep, pages: Pages, run: int, guided: int) -> None:
        self._together, self._run = together, run
        self.pages, self.guided = pages, guided

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pages.network, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._together._asked(self, self._run, args, kwargs)


class Lockstep:
    """`turn` is told the number of a run before a pass of its goes on. `memo` is called where one stops, for what puts
    back, before it goes on, all that passes of others change meanwhile.
    """

    def __init__(self, scratch: Path, turn: Callable[[int], None], memo: Callable[[], Callable[[], None]]) -> None:
        self._scratch, self._turn, self._memo = scratch, turn, memo
        self._runs: list[_Run] = []
        self._hooked: set[int] = set()
        self._stack = ExitStack()
        self._here: _Pass | None = None  # whose activations are in memory
        self._known: Known = lambda run, number: None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def gate(self, run: int, pages: Pages, guided: int) -> Gate:
        if id(pages) not in self._hooked:
            self._hooked.add(id(pages))
            self._watch(pages.network)
        return Gate(self, pages, run, guided)

    @torch.inference_mode()
    def go(
        self, runs: Sequence[Callable[[], Any]], known: Known, on_round: Callable[[dict[tuple[int, int], Tensor]], None]
    ) -> None:
        """All runs to their ends.

        Passes of guided networks whose answers are `known` are not made again. `on_round` is given the answers of those
        that were made together, by run and number.
        """
        self._known = known
        self._runs = [_Run(number, work) for number, work in enumerate(runs)]
        for run in self._runs:
            self._stack.callback(run.stop)
        for run in self._runs:
            self._go_on(run)
        while waiting := [call for run in self._runs for call in run.asked]:
            some = [call for call in waiting if not call.gate.guided] or waiting
            for pages in {id(call.gate.pages): call.gate.pages for call in some}.values():
                self._pass([call for call in some if call.gate.pages is pages])
            answers = {(call.run.number, call.number): _only(call.answer) for call in some if call.number is not None}
            for call in some:
                if call.promised is not None:
                    made = _only(call.answer)
                    call.promised.set_(made.untyped_storage(), made.storage_offset(), made.shape, made.stride())
                call.run.asked.remove(call)
            if answers:
                on_round(answers)
            for run in [run for run in self._runs if any(call.run is run for call in some)]:
                self._go_on(run)

    def _go_on(self, run: _Run) -> None:
        run.go_on()
        if run.done and run.asked:
            passes = run.asked[0].gate.guided
            raise RuntimeError(f"run {run.number} has ended ahead of the last of a step's {passes} passes")

    def _asked(self, gate: Gate, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In the run's own thread."""
        run = self._runs[number]
        if not gate.guided:
            return self._answered(_Call(gate, run, None, args, kwargs))
        order, run.guided = run.guided, run.guided + 1
        known = self._known(number, order)
        if known is not None:
            return (known.to(gate.device),)  # it was read from the disk
        call = _Call(gate, run, order, args, kwargs)
        if (order + 1) % gate.guided == 0:
            return self._answered(call)
        run.asked.append(call)
        call.promised = torch.empty(0, dtype=gate.dtype, device=gate.device)
        return (call.promised,)

    def _answered(self, call: _Call) -> Any:
        call.run.asked.append(call)
        call.run.wait()
        return call.answer

    def _pass(self, calls: Sequence[_Call]) -> None:
        """Through one network. They go in the order in which they were asked for, at every block."""
        pages = calls[0].gate.pages
        with ExitStack() as stack:
            if len(calls) > 1:
                stack.enter_context(pages.kept())
            files = [stack.enter_context(tempfile.TemporaryFile(dir=self._scratch)) for _ in calls]
            ahead = [_Pass(call, file) for call, file in zip(calls, files, strict=True)]
            for one in ahead:
                stack.callback(one.stop)
            while ahead:
                for one in ahead:
                    self._advance(one)
                pages.drop()
                for one in ahead:
                    one.call.answer = one.answer
                ahead = [one for one in ahead if not one.done]
        self._here = None

    def _advance(self, one: _Pass) -> None:
        """To the next block, or to its end."""
        if self._here is not one:
            if self._here is not None and not self._here.done:
                self._here.put_away()
            give_back_freed_memory()  # each thread keeps its own, and what stays lies between what went
            one.fetch()
        self._here = one
        self._turn(one.call.run.number)
        if one.resume is not None:
            one.resume()
        one.go_on()
        one.resume = self._memo()

    def _watch(self, network: nn.Module) -> None:
        for block in blocks(network):
            handle = block.register_forward_pre_hook(self._at_block, prepend=True, with_kwargs=True)
            self._stack.callback(handle.remove)
        for part in network.children():
            self._stack.callback(part.register_forward_hook(self._made).remove)

    def _at_block(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._here is not None:
            self._here.stand_before((args, kwargs))

    def _made(self, _: nn.Module, __: Any, output: Any) -> None:
        if self._here is not None:
            self._here.made += [weakref.ref(tensor) for tensor in _tensors(output)]


def blocks(network: nn.Module) -> list[nn.Module]:
    """What the network's lists hold, not what lists inside of these do: by these it is paged when several pass."""
    lists: list[str] = []
    found: list[nn.Module] = []
    for name, module in network.named_modules():
        if isinstance(module, nn.ModuleList) and not name.startswith(tuple(f"{outer}." for outer in lists)):
            lists.append(name)
            found += module
    return found


def _only(answer: Any) -> Tensor:
    if not (isinstance(answer, tuple) and len(answer) == 1 and isinstance(answer[0], Tensor)):
        raise TypeError(f"a guided network answers with one tensor in a tuple (return_dict=False); got {type(answer)}")
    return answer[0]


def _tensors(given: Any) -> Iterator[Tensor]:
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, dict):
        yield from _tensors([*given.values()])
    elif isinstance(given, (list, tuple)):
        for one in given:
            yield from _tensors(one)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _moved(move: Callable[[int, list[memoryview], int], int], handle: int, memory: UntypedStorage, offset: int) -> None:
    """All of it, to or from there on. (A tensor's `numpy()` would give the bytes too, and never let them be freed.)"""
    view, done = memoryview((ctypes.c_ubyte * memory.nbytes()).from_address(memory.data_ptr())).cast("B"), 0
    while done < len(view):
        got = move(handle, [view[done:]], offset + done)
        if not got:
            raise OSError(f"a file of activations ends at byte {offset + done}")
        done += got
