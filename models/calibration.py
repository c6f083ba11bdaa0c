"""Calibration of a checkpoint that no memory holds: it runs with its weights on the disk, and what was seen is a file.

The samples go through the network side by side (quant_runtime/lockstep.py): a step of all of them, guided or not, reads
it once. Behind every such round all that was seen so far, and the network's answers, are on the disk. A calibration
that was cut off films again with these answers, which takes no network, and goes on behind the last of them. The same
observations as of the whole model: the same numbers.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

from safetensors import safe_open
from torch import Tensor

from models.base import Model, VideoInputs
from quant_runtime.calibrate import LayerStats, Observer, fingerprint, observe
from quant_runtime.kernels._cpu import give_back_freed_memory
from quant_runtime.lockstep import Lockstep
from quant_runtime.paged import Pages, Read
from quant_runtime.tensor_files import Blank, TensorFiles, TensorWriter

TRIM_BYTES = 256 << 20  # of weights read and dropped between two times that the freed memory is given back
WHOLE, BEGUN, ANSWERS = "statistics", "begun", "answers-{:05}"  # names of files

OnRead = Callable[[int, int | None], None]  # (bytes of the network read, of about how many; None: not known yet)


class Paged(Model, Protocol):
    """A model whose network is on the disk."""

    def calibration(self, number: int) -> VideoInputs:
        """Of a calibration sample."""
        ...

    def denoise(self, inputs: VideoInputs) -> None:
        """A run to the last step."""
        ...

    def beside(self, inputs: VideoInputs, gate: Callable[[Pages, int], Any]) -> Self:
        """The same model for a run among others. `gate` makes what stands in it for a part that is on the disk.

        It is told how often a step asks that part, each time of what was known before the first; 0 is of no step.
        """
        ...

    def memo(self) -> Callable[[], None]:
        """Puts back what a pass has set, after passes of others."""
        ...


Opened = Callable[[Read], AbstractContextManager[Paged]]  # the checkpoint's model, whose network's tensors are read so


class Statistics:
    """Of every layer, in a file: read one by one."""

    def __init__(self, files: TensorFiles, tokens: dict[str, int], seen: str) -> None:
        self._files, self._tokens = files, tokens
        self.fingerprint = seen  # calibrate.fingerprint of all

    @classmethod
    def read(cls, folder: Path, made_by: str) -> Self | None:
        """None where there are none, or those that another command has made."""
        said = _said(folder, WHOLE, made_by)
        if said is None:
            return None
        return cls(TensorFiles.open(folder, WHOLE), json.loads(said["tokens"]), said["fingerprint"])

    @staticmethod
    def write(folder: Path, stats: dict[str, LayerStats], made_by: str) -> None:
        """Whole and on the disk, or not there at all. OSError where there is no room."""
        tensors: dict[str, Tensor] = {}
        for name, its in stats.items():
            own = {"absmax": its.absmax, "weight_absmax": its.weight_absmax, "sample": its.sample}
            tensors |= {f"{name}.{kind}": tensor for kind, tensor in own.items()}
        tokens = json.dumps({name: its.tokens for name, its in stats.items()})
        _write(folder, WHOLE, tensors, {"made_by": made_by, "tokens": tokens, "fingerprint": fingerprint(stats)})

    @staticmethod
    def forget(folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)

    def of(self, layer: str) -> LayerStats:
        absmax, weights, sample = (
            self._files.read(f"{layer}.{kind}") for kind in ("absmax", "weight_absmax", "sample")
        )
        return LayerStats(absmax, weights, self._tokens[layer], sample)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.__exit__()


class _Begun:
    """What a calibration has come to: `rounds` are done, and so many bytes of the network were read."""

    def __init__(self, folder: Path, made_by: str) -> None:
        self.folder, self._made_by = folder, made_by
        said = _said(folder, BEGUN, made_by)
        self.rounds, self.bytes = (int(said["rounds"]), int(said["bytes"])) if said else (0, 0)
        if not self.rounds:
            Statistics.forget(folder)
        folder.mkdir(exist_ok=True)
        self._seen = TensorFiles.open(folder, BEGUN) if self.rounds else TensorFiles({})
        answers = [self._answers_of(number) for number in range(self.rounds)]
        for path in answers:
            if not path.is_file():
                raise ValueError(f"{path} is not there, and {BEGUN} speaks of it: the same command begins again")
        self._answers = TensorFiles.among(answers)

    def seen(self, key: str) -> Tensor | None:
        return self._seen.read(key) if key in self._seen.tensors else None

    def answer(self, run: int, number: int) -> Tensor | None:
        key = f"{run}.{number}"
        return self._answers.read(key) if key in self._answers.tensors else None

    def save(self, state: Mapping[str, Tensor], answers: Mapping[tuple[int, int], Tensor], read: int) -> None:
        """A round more. It counts once `state` is on the disk, and that comes after its answers."""
        named = {f"{run}.{number}": tensor for (run, number), tensor in answers.items()}
        _write(self.folder, ANSWERS.format(self.rounds), named, {})
        self.rounds += 1
        said = {"made_by": self._made_by, "rounds": str(self.rounds), "bytes": str(read)}
        _write(self.folder, BEGUN, state, said)

    def forget(self) -> None:
        for number in range(self.rounds):
            self._answers_of(number).unlink()
        _file(self.folder, BEGUN).unlink()

    def _answers_of(self, number: int) -> Path:
        return _file(self.folder, ANSWERS.format(number))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._seen.__exit__()
        self._answers.__exit__()


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def _said(folder: Path, name: str, made_by: str) -> dict[str, str] | None:
    """The notes in a file of this name, where there is one, and made by this command."""
    if not _file(folder, name).is_file():
        return None
    with safe_open(_file(folder, name), framework="pt") as opened:
        said: dict[str, str] = opened.metadata()
    return said if said.get("made_by") == made_by else None


def _write(folder: Path, name: str, tensors: Mapping[str, Tensor], said: Mapping[str, str]) -> None:
    """Whole and on the disk, or what was there before."""
    aside = f"{name}.aside"
    blanks = {key: Blank(tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    with TensorWriter(folder, aside, blanks, sum(blank.bytes for blank in blanks.values()), said) as writer:
        for key, tensor in tensors.items():
            writer.write(key, tensor)
        writer.sync()
    _file(folder, aside).replace(_file(folder, name))
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def calibrated(
    folder: Path, made_by: str, opened: Opened, read: Read, layers: Sequence[str], samples: int, on_bytes: OnRead
) -> Statistics:
    """What `layers` are fed by this many of the family's calibration samples: from `folder`, or into it.

    `made_by` stands for all that decides the numbers. `read` gives the network's tensors.
    """
    found = Statistics.read(folder, made_by)
    if found is not None:
        return found
    with _Begun(folder, made_by) as begun:
        stats = _observed(opened, _Told(read, begun.bytes, on_bytes), begun, layers, samples)
        Statistics.write(folder, stats, made_by)
        begun.forget()
    del stats
    give_back_freed_memory()
    made = Statistics.read(folder, made_by)
    assert made is not None
    return made


def _observed(opened: Opened, told: _Told, begun: _Begun, layers: Sequence[str], samples: int) -> dict[str, LayerStats]:
    with opened(told.read) as model:
        told.watch(model)
        return observe(model.network, layers, partial(_together, model, told, begun, samples), shared=model.shared())


def _together(model: Paged, told: _Told, begun: _Begun, samples: int, seen: Observer) -> None:
    seen.go_on_from(begun.seen)
    with Lockstep(begun.folder, partial(setattr, seen, "run"), model.memo) as together:
        asked = [model.calibration(number) for number in range(samples)]
        runs = [
            partial(model.beside(inputs, partial(together.gate, run)).denoise, inputs)
            for run, inputs in enumerate(asked)
        ]
        together.go(runs, begun.answer, lambda answers: begun.save(seen.state(), answers, told.bytes))


class _Told:
    """Counts what is read. How much it will be is told after the first step, and better after each: they are alike."""

    def __init__(self, read: Read, before: int, on_bytes: OnRead) -> None:
        self._read, self._on_bytes = read, on_bytes
        self._model: Model | None = None
        self._passed = self._kept = 0
        self._of: int | None = None
        self.bytes = before

    def watch(self, model: Model) -> None:
        """What was read before is of no step."""
        self._model = model

    def read(self, key: str) -> Tensor:
        tensor = self._read(key)
        if self._model is not None:
            state = self._model.attention
            if state.step > self._passed:
                self._passed, self._of = state.step, round(self.bytes / state.step * state.steps)
            size = tensor.numel() * tensor.element_size()
            self.bytes, self._kept = self.bytes + size, self._kept + size
            if self._kept >= TRIM_BYTES:  # rows that stay lie between weights that went: memory is freed in pieces
                give_back_freed_memory()
                self._kept = 0
            self._on_bytes(self.bytes, self._of)
        return tensor
