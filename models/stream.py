"""A checkpoint goes in and an artifact comes out, layer by layer: for what no memory holds.

One layer is in memory at a time, read and written at its place in its file. The files grow in `.NAME.partial`, and
beside it `.NAME.partial.jsonl` notes what is done: the same command goes on there after a crash, and ends with the same
bytes. What calibration saw is in `.NAME.calibration`, of one that was cut off too. No film is judged.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial as bound
from pathlib import Path
from typing import IO, Protocol, Self, runtime_checkable

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from models import hub
from models.base import Kind, VideoLimits
from models.calibration import OnRead, Paged, Statistics, calibrated
from models.lora import Lora, Loras
from quant_runtime import __version__, artifact
from quant_runtime.artifact import AttentionRecord, Base, LayerRecord, Manifest
from quant_runtime.attention import AttentionPlan
from quant_runtime.calibrate import LayerStats
from quant_runtime.convert import prepare, report
from quant_runtime.formats import QuantFormat
from quant_runtime.linear import LinearSpec
from quant_runtime.methods import METHODS, Method, Streamable
from quant_runtime.paged import Read
from quant_runtime.rules import Rule, formats
from quant_runtime.tensor_files import Blank, TensorFiles, TensorWriter

SCHEME = 2  # of what is drawn and seen: what was begun under another is not gone on with
SYNC_BYTES = 256 << 20  # written between two syncs: all that a crash costs

OnBytes = Callable[[int, int], None]  # (bytes of the checkpoint read, of how many)


@runtime_checkable
class Streamed(Protocol):
    """What a family tells of its checkpoints without loading one."""

    name: str
    kind: Kind
    weights: str  # the name of its safetensors files, without what tells shards apart
    stored: torch.dtype  # of floats in an artifact
    originals: Sequence[tuple[str, str]]  # what its authors call the network's layers, as models/lora.py reads it

    @property
    def ignored(self) -> Sequence[str]:
        """Patterns of tensors that some checkpoints hold and the network never had."""
        ...

    def skeleton(self, folder: Path) -> nn.Module:
        """The network by its config, on the meta device, or an nn.ModuleDict of those that take turns."""
        ...

    def parts(self, network: nn.Module) -> Mapping[str, nn.Module]:
        """The one, or those, by the folders inside a checkpoint that hold them."""
        ...

    def linears(self, network: nn.Module) -> list[str]:
        """Names of the linear layers to compress."""
        ...

    def suits(self, network: nn.Module, plan: AttentionPlan) -> None:
        """Raises ValueError for a plan that the network cannot run by."""
        ...

    def write_around(self, network: nn.Module, source: Path, target: Path) -> None:
        """Every file of an artifact but its weights and its manifest. `network` has its empty QuantLinears."""
        ...

    def limits(self, folder: Path) -> VideoLimits:
        """What requests the checkpoint takes."""
        ...

    def paged(self, folder: Path, device: str, read: Read) -> AbstractContextManager[Paged]:
        """The checkpoint in float32, ready to run, its network's tensors read by name as they are needed."""
        ...


class _Note(BaseModel):
    """What of one checkpoint's layer or tensor is done and on the disk."""

    model_config = ConfigDict(extra="forbid")

    unit: str
    layer: LayerRecord | None = None


def compress(
    family: Streamed,
    source: Path,
    method: Method,
    format_: QuantFormat,
    attention: AttentionPlan,
    out: Path,
    *,
    base: str,
    device: str,
    on_bytes: OnBytes,
    rules: Sequence[Rule] = (),
    loras: Sequence[Lora] = (),
    samples: int = 1,
    on_calibration: OnRead = lambda done, of: None,
    replace: bool = False,
    sync_bytes: int = SYNC_BYTES,
) -> Manifest:
    """Writes the artifact `out` and returns its manifest. Refuses what artifact.check_free does.

    A calibrated method first sees this many of the family's calibration samples: the checkpoint runs with its weights
    on the disk.

    ValueError names the file, the tensor or the field that will not do: a shard that is missing or cut off, a tensor
    that the network does not have or has in another shape, a value that is not finite; what was begun is removed then.
    After anything else (a full disk, a kill) the same command goes on where this one ended.
    """
    if not isinstance(method, Streamable):
        kind, others = artifact.method_record(method).name, [name for name in METHODS if name != "none"]
        raise ValueError(f"method {kind} does not go layer by layer: take {' or '.join(others)}")
    artifact.check_free(out, replace)
    network = family.skeleton(source)
    family.suits(network, attention)
    chosen = formats(network, family.linears(network), format_, rules)
    low = {name: its for name, its in chosen.items() if its.quantized}
    with (
        _files(source, family, network) as files,
        Loras(loras, network, family.originals) as changes,
    ):
        try:
            files.check(network.state_dict())
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        specs = {name: method.spec(files.tensors[f"{name}.weight"].shape[1], its) for name, its in low.items()}
        prepare(network, specs)
        work = _Work(family, files, changes, specs, method, device, on_bytes, sync_bytes)
        partial = out.parent / f".{out.name}.partial"
        seen = out.parent / f".{out.name}.calibration"
        made_by = work.fingerprint(base, *((samples, _around(source)) if method.calibrated else ()))
        with _journal(partial.with_name(f"{partial.name}.jsonl"), made_by) as journal, ExitStack() as stack:
            try:
                stats = None
                if method.calibrated and specs:
                    opened = bound(family.paged, source, device)
                    made = calibrated(seen, made_by, opened, work.read, [*specs], samples, on_calibration)
                    stats = stack.enter_context(made)
                records = work.run(network, partial, journal, stats)
                _clear_around(partial, family.parts(network))
                family.write_around(network, source, partial)
                manifest = Manifest(
                    family=family.name,
                    base=Base(name=base, revision=hub.revision(source), loras=changes.records),
                    method=artifact.method_record(method),
                    layers=records,
                    kept=tuple(name for name in chosen if name not in low) if low else (),
                    calibration=stats.fingerprint if stats else None,
                    attention=AttentionRecord.of(attention),
                    serving={"kind": family.kind, "limits": json.loads(json.dumps(asdict(family.limits(source))))},
                )
                whole = artifact.seal(partial, manifest)
            except ValueError:
                shutil.rmtree(partial, ignore_errors=True)
                Statistics.forget(seen)
                raise
    Statistics.forget(seen)
    artifact.put(partial, out)
    return whole


@dataclass(frozen=True)
class _Work:
    """One checkpoint on its way."""

    family: Streamed
    files: TensorFiles
    changes: Loras
    specs: Mapping[str, LinearSpec]
    method: Streamable
    device: str
    on_bytes: OnBytes
    sync_bytes: int

    def fingerprint(self, base: str, *more: object) -> str:
        """Of all that decides the bytes: another command, or another checkpoint, does not go on with this one's."""
        seen = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in self.files.files()]
        how = (repr(self.method), repr(dict(self.specs)), repr(self.changes.records))
        facts = (__version__, SCHEME, self.family.name, base, self._device(), *how, artifact.SHARD_BYTES, seen, *more)
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _device(self) -> str:
        """What rounds and draws: other hardware ends with other bytes."""
        device = torch.device(self.device)
        return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

    def run(
        self, network: nn.Module, partial: Path, journal: _Journal, stats: Statistics | None
    ) -> dict[str, LayerRecord]:
        """The weights into `partial`; `network` has its empty QuantLinears. What became of the layers, in order."""
        blanks = {key: Blank(self._kept(its), tuple(its.shape)) for key, its in network.state_dict().items()}
        total, read, unsynced = sum(stored.bytes for stored in self.files.tensors.values()), 0, 0
        with _Writers(partial, self.family, network, blanks) as writer:
            if not writer.resumed:
                journal.forget()
            for unit, keys in self._units().items():
                if unit not in journal.notes:
                    tensors = {key: self.read(key) for key in keys}
                    state, record = self._made(unit, tensors, stats.of(unit) if stats and unit in self.specs else None)
                    for key, tensor in state.items():
                        writer.write(key, self._stored(key, tensor))
                    journal.add(_Note(unit=unit, layer=record))
                    unsynced += sum(blanks[key].bytes for key in state)
                    if unsynced >= self.sync_bytes:
                        writer.sync()
                        journal.sync()
                        unsynced = 0
                read += sum(self.files.tensors[key].bytes for key in keys)
                self.on_bytes(read, total)
            writer.sync()
            journal.sync()
        layers = {unit: note.layer for unit, note in journal.notes.items()}
        return {name: record for name in self.specs if (record := layers[name]) is not None}

    def _units(self) -> dict[str, list[str]]:
        """Tensors that are read together: those of one layer; every other tensor alone."""
        units: dict[str, list[str]] = {}
        for key in self.files.tensors:
            layer = key.rpartition(".")[0]
            units.setdefault(layer if layer in self.specs else key, []).append(key)
        return units

    def read(self, key: str) -> Tensor:
        """The checkpoint's tensor, changed by the LoRAs."""
        tensor = self.files.read(key)
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{self.files.tensors[key].file}: {key} has a value that is not finite")
        return self.changes.merged(key, tensor)

    def _made(
        self, unit: str, tensors: dict[str, Tensor], stats: LayerStats | None
    ) -> tuple[dict[str, Tensor], LayerRecord | None]:
        if unit not in self.specs:
            return tensors, None
        if stats is not None:  # it answers the rows that it was fed
            tensors = {key: tensor.to(stats.sample.dtype) for key, tensor in tensors.items()}
        weight, bias = tensors[f"{unit}.weight"].to(self.device), tensors.get(f"{unit}.bias")
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias.to(self.device), requires_grad=False)
        quantized = self.method.quantize(layer, stats, self.specs[unit].format)
        record = artifact.layer_records({unit: report(layer, quantized, stats)})[unit]
        return {f"{unit}.{name}": tensor for name, tensor in quantized.state_dict().items()}, record

    def _kept(self, tensor: Tensor) -> torch.dtype:
        return self.family.stored if tensor.is_floating_point() else tensor.dtype

    def _stored(self, key: str, tensor: Tensor) -> Tensor:
        kept = tensor.to(self._kept(tensor))
        if kept.is_floating_point() and not bool(kept.isfinite().all()):
            raise ValueError(f"{key} has a value too large for {kept.dtype}")
        return kept


def _around(source: Path) -> list[tuple[str, int, int]]:
    """Every file of a checkpoint, as far as a file can be told from another without reading it."""
    files = sorted(path for path in source.rglob("*") if path.is_file())
    return [(str(path.relative_to(source)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def _prefixes(family: Streamed, network: nn.Module) -> dict[str, str]:
    """By folder, what the names of its tensors begin with in `network`."""
    parts = family.parts(network)
    return {folder: f"{folder}." if len(parts) > 1 else "" for folder in parts}


def _files(source: Path, family: Streamed, network: nn.Module) -> TensorFiles:
    """The tensors of all networks, named as in `network`."""
    return TensorFiles(
        {
            f"{prefix}{key}": stored
            for folder, prefix in _prefixes(family, network).items()
            for key, stored in TensorFiles.open(source / folder, family.weights).tensors.items()
            if not any(re.search(pattern, key) for pattern in family.ignored)
        }
    )


class _Writers:
    """A TensorWriter for each network, in its folder; tensors are named as in `network`."""

    def __init__(self, partial: Path, family: Streamed, network: nn.Module, blanks: Mapping[str, Blank]) -> None:
        self._writers: dict[str, TensorWriter] = {}
        with ExitStack() as stack:
            for folder, prefix in _prefixes(family, network).items():
                own = {key.removeprefix(prefix): blank for key, blank in blanks.items() if key.startswith(prefix)}
                (partial / folder).mkdir(parents=True, exist_ok=True)
                writer = TensorWriter(partial / folder, family.weights, own, artifact.SHARD_BYTES)
                self._writers[prefix] = stack.enter_context(writer)
            self._stack = stack.pop_all()
        self.resumed = all(writer.resumed for writer in self._writers.values())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def write(self, key: str, tensor: Tensor) -> None:
        prefix = next(prefix for prefix in self._writers if key.startswith(prefix))
        self._writers[prefix].write(key.removeprefix(prefix), tensor)

    def sync(self) -> None:
        for writer in self._writers.values():
            writer.sync()


def _clear_around(partial: Path, folders: Collection[str]) -> None:
    """What a run that was killed at the very end had put beside the weights."""
    for path in partial.iterdir():
        if path.name not in folders:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


class _Journal:
    """Notes of what is done. A note counts once it is synced, and that comes after the files that it speaks of."""

    def __init__(self, file: IO[bytes], fingerprint: str) -> None:
        self._file, self._fingerprint = file, fingerprint
        self.notes: dict[str, _Note] = {}
        self._new: list[_Note] = []
        file.seek(0)
        first, *lines = file.read().split(b"\n")
        end = len(first) + 1
        if first.decode(errors="replace") != fingerprint or not lines:
            self.forget()
            return
        for line in lines[:-1]:  # behind the last end of a line is nothing, or what a crash cut off
            try:
                note = _Note.model_validate_json(line)
            except ValidationError:
                break
            self.notes[note.unit] = note
            end += len(line) + 1
        file.truncate(end)
        file.seek(end)

    def forget(self) -> None:
        self.notes.clear()
        self._file.seek(0)
        self._file.truncate()
        self._file.write(self._fingerprint.encode() + b"\n")
        self._file.flush()

    def add(self, note: _Note) -> None:
        self.notes[note.unit] = note
        self._new.append(note)

    def sync(self) -> None:
        self._file.write(b"".join(note.model_dump_json().encode() + b"\n" for note in self._new))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._new.clear()


@contextmanager
def _journal(path: Path, fingerprint: str) -> Iterator[_Journal]:
    """Opened, and removed when all is done or nothing is worth keeping. Refused while another process has it open."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as appended, path.open("r+b") as file:
        try:
            fcntl.flock(appended, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BlockingIOError(f"{path} is being written by another process") from None
        try:
            yield _Journal(file, fingerprint)
        except OSError as error:
            kept = f"{error.strerror}; what is done lies in {path.with_suffix('')}: the same command goes on there"
            raise OSError(error.errno, kept, error.filename) from error
        except ValueError:
            path.unlink()
            raise
        path.unlink()
