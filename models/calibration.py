"""Calibration of a checkpoint that no memory holds: it runs with its weights on the disk, and what was seen is a file.

The same observations as of the whole model, in the same order: the same numbers. Every pass reads the network once.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.base import Model
from quant_runtime.calibrate import LayerStats, fingerprint, observe
from quant_runtime.kernels._cpu import give_back_freed_memory
from quant_runtime.paged import Read
from quant_runtime.tensor_files import TensorFiles

TRIM_BYTES = 256 << 20  # of weights read and dropped between two times that the freed memory is given back

OnRead = Callable[[int, int | None], None]  # (bytes of the network read, of about how many; None: not known yet)
Opened = Callable[[Read], AbstractContextManager[Model]]  # the checkpoint's model, whose network's tensors are read so


class Statistics:
    """Of every layer, in a file: read one by one."""

    def __init__(self, files: TensorFiles, tokens: dict[str, int], seen: str) -> None:
        self._files, self._tokens = files, tokens
        self.fingerprint = seen  # calibrate.fingerprint of all

    @classmethod
    def read(cls, file: Path, made_by: str) -> Self | None:
        """None where there is no such file, or one that another command has made."""
        if not file.is_file():
            return None
        with safe_open(file, framework="pt") as opened:
            said = opened.metadata() or {}
        if said.get("made_by") != made_by:
            return None
        return cls(TensorFiles.open(file.parent, file.stem), json.loads(said["tokens"]), said["fingerprint"])

    @staticmethod
    def write(file: Path, stats: dict[str, LayerStats], made_by: str) -> None:
        """Whole and on the disk, or not there at all. OSError where there is no room."""
        tensors: dict[str, Tensor] = {}
        for name, its in stats.items():
            own = {"absmax": its.absmax, "weight_absmax": its.weight_absmax, "sample": its.sample}
            tensors |= {f"{name}.{kind}": tensor.clone() for kind, tensor in own.items()}  # a group shares its maxima
        tokens = json.dumps({name: its.tokens for name, its in stats.items()})
        said, aside = {"made_by": made_by, "tokens": tokens, "fingerprint": fingerprint(stats)}, _aside(file)
        try:
            save_file(tensors, aside, metadata=said)
        except SafetensorError as error:  # what it makes of a full disk
            raise OSError(errno.EIO, str(error), str(aside)) from error
        _sync(aside)
        aside.replace(file)
        _sync(file.parent)

    @staticmethod
    def forget(file: Path) -> None:
        for path in (file, _aside(file)):
            path.unlink(missing_ok=True)

    def of(self, layer: str) -> LayerStats:
        absmax, weights, sample = (
            self._files.read(f"{layer}.{kind}") for kind in ("absmax", "weight_absmax", "sample")
        )
        return LayerStats(absmax, weights, self._tokens[layer], sample)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.__exit__()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _aside(file: Path) -> Path:
    return file.with_name(f"{file.name}.begun")


def calibrated(
    file: Path, made_by: str, opened: Opened, read: Read, layers: Sequence[str], samples: int, on_bytes: OnRead
) -> Statistics:
    """What `layers` are fed by this many of the family's calibration samples: from `file`, or into it.

    `made_by` stands for all that decides the numbers. `read` gives the network's tensors.
    """
    found = Statistics.read(file, made_by)
    if found is not None:
        return found
    Statistics.write(file, _observed(opened, _Told(read, samples, on_bytes), layers, samples), made_by)
    give_back_freed_memory()
    made = Statistics.read(file, made_by)
    assert made is not None
    return made


def _observed(opened: Opened, told: _Told, layers: Sequence[str], samples: int) -> dict[str, LayerStats]:
    with opened(told.read) as model:
        told.watch(model)
        return observe(model.network, layers, lambda: model.calibrate(samples, told.sampled), shared=model.shared())


class _Told:
    """Counts what is read. How much it will be is told after the first step, and better after each: they are alike."""

    def __init__(self, read: Read, samples: int, on_bytes: OnRead) -> None:
        self._read, self._samples, self._on_bytes = read, samples, on_bytes
        self._model: Model | None = None
        self._bytes = self._sample = self._passed = self._kept = 0
        self._of: int | None = None

    def watch(self, model: Model) -> None:
        """What was read before is of no step."""
        self._model = model

    def sampled(self, done: int, of: int) -> None:
        self._sample = done

    def read(self, key: str) -> Tensor:
        tensor = self._read(key)
        if self._model is not None:
            state = self._model.attention
            passed = self._sample * state.steps + state.step
            if passed > self._passed:
                self._passed, self._of = passed, round(self._bytes / passed * state.steps * self._samples)
            size = tensor.numel() * tensor.element_size()
            self._bytes, self._kept = self._bytes + size, self._kept + size
            if self._kept >= TRIM_BYTES:  # rows that stay lie between weights that went: memory is freed in pieces
                give_back_freed_memory()
                self._kept = 0
            self._on_bytes(self._bytes, self._of)
        return tensor
