"""Safetensors files by positioned reads and writes: one tensor in memory at a time, and no page mapped.

A mapped file's pages count as the process' memory for as long as the mapping lives; a checkpoint of 24 GiB is to pass
through a machine of 8. A file is 8 bytes (little-endian, the length of the header), the header in JSON
({name: {dtype, shape, data_offsets}}), then the tensors' bytes without gaps.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, NonNegativeInt, TypeAdapter, ValidationError
from torch import Tensor, nn

LARGEST_HEADER = 100_000_000  # bytes: what the format allows
PASSED = 1 << 22  # bytes that are read at once: they are still in the cache as they are hashed and copied
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def _known(name: str) -> str:
    if name not in DTYPES:
        raise ValueError(f"{name!r} is none of {', '.join(DTYPES)}")
    return name


def _beside(name: str) -> str:
    if Path(name).name != name or name in (".", ".."):
        raise ValueError(f"{name!r} is no file of this folder")
    return name


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Entry(_Strict):
    dtype: Annotated[str, AfterValidator(_known)]
    shape: tuple[NonNegativeInt, ...]
    data_offsets: tuple[NonNegativeInt, NonNegativeInt]


class _Index(_Strict):
    metadata: dict[str, Any] = {}
    weight_map: dict[str, Annotated[str, AfterValidator(_beside)]]


_HEADER = TypeAdapter(dict[str, _Entry])


@dataclass(frozen=True)
class Blank:
    """A tensor without its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Stored(Blank):
    """And where they lie."""

    file: Path
    offset: int  # from the file's first byte


class TensorFiles:
    """The tensors of NAME.safetensors, or of the shards that NAME.safetensors.index.json names, to be read one by one.

    Opening reads headers alone. ValueError names the file that is missing, cut off or damaged, and the tensor that an
    index and its shard disagree about.
    """

    def __init__(self, tensors: Mapping[str, Stored]) -> None:
        self.tensors = tensors
        self._open: dict[Path, int] = {}

    @classmethod
    def open(cls, folder: Path, name: str) -> Self:
        whole, index = folder / f"{name}.safetensors", folder / f"{name}.safetensors.index.json"
        if whole.is_file():
            return cls(_header(whole))
        if not index.is_file():
            raise ValueError(f"{folder} has neither {whole.name} nor {index.name}")
        try:
            where = _Index.model_validate_json(index.read_bytes()).weight_map
        except ValidationError as error:
            raise ValueError(f"{index}: {error}") from None
        tensors: dict[str, Stored] = {}
        for file in dict.fromkeys(where.values()):
            if not (folder / file).is_file():
                raise ValueError(f"{index} names {file}, which is not there")
            held = _header(folder / file)
            named = {key for key, its in where.items() if its == file}
            if held.keys() != named:
                wrong = sorted(held.keys() ^ named)[:5]
                raise ValueError(f"{index} and {file} do not agree about {', '.join(wrong)}")
            tensors |= held
        return cls({key: tensors[key] for key in where})

    @classmethod
    def among(cls, files: Iterable[Path]) -> Self:
        """The tensors of these files. ValueError where two of them have one of the same name."""
        tensors: dict[str, Stored] = {}
        for file in files:
            held = _header(file)
            if twice := sorted(held.keys() & tensors.keys()):
                raise ValueError(f"{file} has {twice[0]}, and so has {tensors[twice[0]].file.name}")
            tensors |= held
        return cls(tensors)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._open.values():
            os.close(handle)
        self._open.clear()

    def files(self) -> list[Path]:
        return list(dict.fromkeys(stored.file for stored in self.tensors.values()))

    def read(self, key: str) -> Tensor:
        """The tensor, in memory of its own."""
        stored = self.tensors[key]
        raw = torch.empty(stored.bytes, dtype=torch.uint8)
        self._bytes(stored.file, stored.offset, raw)
        return raw.view(stored.dtype).view(stored.shape)

    def pour(self, into: Mapping[str, Tensor], digests: Mapping[str, str] | None = None) -> None:
        """The values of every tensor go into the one of its name: contiguous, of its shape, of any dtype and device.

        File by file, in the order in which they lie there. What is of the same dtype on a CPU is read where it is to
        be. All else passes through the same PASSED bytes of the host, which are pinned where a GPU takes them, so that
        nothing larger is held there for it, by us or by the driver.

        `digests` has each file's SHA-256, by its name. They are of the same reading, which then takes in what lies
        between these tensors: ValueError by name behind the last tensor of a file that is not the one that was meant.
        What came of it before is to be thrown away.
        """
        pinned = any(its.device.type == "cuda" for its in into.values())
        passing = torch.empty(PASSED, dtype=torch.uint8, pin_memory=pinned)
        for file in self.files():
            held = sorted((key for key, its in self.tensors.items() if its.file == file), key=self._offset)
            digest, done = None if digests is None else hashlib.sha256(), 0
            for key in held:
                stored = self.tensors[key]
                if digest is not None:
                    self._hash(digest, file, done, stored.offset, passing)
                    done = stored.offset + stored.bytes
                self._pour(stored, into[key], digest, passing)
            if digests is None or digest is None:
                continue
            self._hash(digest, file, done, file.stat().st_size, passing)
            if digest.hexdigest() != digests[file.name]:
                raise ValueError(f"{file} is damaged: it is not the file that was saved")

    def check(self, own: Mapping[str, Tensor]) -> None:
        """ValueError names what is missing of the state `own`, what is not in it, and what has another shape or type.

        A float of 16 bits or more is as good as any other.
        """
        missing, extra = sorted(own.keys() - self.tensors.keys()), sorted(self.tensors.keys() - own.keys())
        if missing or extra:
            raise ValueError(f"tensors missing: {missing[:5] or 'none'}; tensors of no layer: {extra[:5] or 'none'}")
        for key, its in own.items():
            stored = self.tensors[key]
            got, want = stored.dtype, its.dtype
            same = got.is_floating_point and got.itemsize >= 2 if want.is_floating_point else got == want
            if stored.shape != tuple(its.shape) or not same:
                given = f"{got} {list(stored.shape)}"
                raise ValueError(f"{stored.file}: {key} is {given}; the network has {want} {list(its.shape)}")

    def _offset(self, key: str) -> int:
        return self.tensors[key].offset

    def _hash(self, digest: hashlib._Hash, file: Path, start: int, end: int, passing: Tensor) -> None:
        """What lies from `start` to `end`."""
        for at in range(start, end, len(passing)):
            digest.update(self._bytes(file, at, passing[: end - at]))

    def _pour(self, stored: Stored, target: Tensor, digest: hashlib._Hash | None, passing: Tensor) -> None:
        """A part after the other: what was read a moment ago is hashed and copied out of the cache."""
        flat, size = target.view(-1), stored.dtype.itemsize
        stays = target.device.type == "cpu" and target.dtype == stored.dtype
        step = len(passing) // size
        for start in range(0, len(flat), step):
            part = flat[start : start + step]
            raw = part.view(torch.uint8) if stays else passing[: len(part) * size]
            view = self._bytes(stored.file, stored.offset + start * size, raw)
            if digest is not None:
                digest.update(view)
            if not stays:
                part.copy_(raw.view(stored.dtype))  # waits for a GPU: the next part is read into the same place

    def _bytes(self, file: Path, offset: int, raw: Tensor) -> memoryview:
        """Fills uint8 `raw` from there on."""
        if file not in self._open:
            self._open[file] = os.open(file, os.O_RDONLY)
        view, done = raw.numpy().data, 0
        while done < len(view):
            got = os.preadv(self._open[file], [view[done:]], offset + done)
            if not got:
                raise ValueError(f"{file} ends before byte {offset + len(view)}: it was cut off while it was read")
            done += got
        return view


def fill(
    network: nn.Module,
    files: TensorFiles,
    device: torch.device | str,
    digests: Mapping[str, str] | None = None,
    kind: Callable[[str, Blank], torch.dtype] = lambda key, stored: stored.dtype,
    tied: Mapping[str, str] = {},
) -> None:
    """Every tensor of the network, which may be on the meta device, becomes that of the files, strictly.

    Those that are `tied` lie in no file: each becomes the one that it names.

    They go to `device` one by one, each in the `kind` that is said of its name and of what is stored, as
    `TensorFiles.pour` has it: so they are in memory once, and beside them PASSED bytes of the host. `digests` as there.
    """
    files.check({key: its for key, its in network.state_dict().items() if key not in tied})
    state = {
        key: torch.empty(stored.shape, dtype=kind(key, stored), device=device) for key, stored in files.tensors.items()
    }
    files.pour(state, digests)
    state |= {key: state[its] for key, its in tied.items()}
    network.load_state_dict(state, strict=True, assign=True)
    network.requires_grad_(False)


def _header(file: Path) -> dict[str, Stored]:
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > min(LARGEST_HEADER, size - 8):
            raise ValueError(f"{file} is no safetensors file, or cut off: its header would be {length} bytes long")
        text = handle.read(length)
    try:
        given = json.loads(text)
        if isinstance(given, dict):
            given.pop("__metadata__", None)
        entries = _HEADER.validate_python(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except ValueError as error:
        raise ValueError(f"{file} has a header that is not JSON: {error}") from None
    start, found, end = 8 + length, {}, 0
    for key, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        stored = Stored(DTYPES[entry.dtype], entry.shape, file, start + entry.data_offsets[0])
        if entry.data_offsets != (end, end + stored.bytes):
            raise ValueError(
                f"{file}: {key} lies at {entry.data_offsets}, where ({end}, {end + stored.bytes}) would be"
            )
        end = entry.data_offsets[1]
        found[key] = stored
    if size != start + end:
        raise ValueError(f"{file} has {size} bytes and its header speaks of {start + end}: it is not whole")
    return found


class TensorWriter:
    """Files whose every byte has its place before the first is written: tensors come in any order, and more than once.

    `said` are notes in each file's header.

    The files are NAME.safetensors, or above `shard_bytes` NAME-00001-of-00003.safetensors and so on with an index, in
    `folder`; space on the disk is taken at once, so that a full one is known from the start. Files that are there
    already, with the same headers, are gone on with.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        blanks: Mapping[str, Blank],
        shard_bytes: int,
        said: Mapping[str, str] | None = None,
    ) -> None:
        self._said = {"format": "pt", **(said or {})}
        self.resumed = True  # every file was there, as large as it is now: what an earlier writer wrote is in it
        self._places: dict[str, Stored] = {}
        self._handles: dict[Path, int] = {}
        shards = _shards(blanks, shard_bytes)
        files = [
            f"{name}.safetensors" if len(shards) == 1 else f"{name}-{number:05}-of-{len(shards):05}.safetensors"
            for number in range(1, len(shards) + 1)
        ]
        try:
            for file, shard in zip(files, shards, strict=True):
                self._begin(folder / file, shard)
        except BaseException:
            self.__exit__()
            raise
        if len(shards) > 1:
            where = {key: file for file, shard in zip(files, shards, strict=True) for key in shard}
            index = {"metadata": {"total_size": sum(blank.bytes for blank in blanks.values())}, "weight_map": where}
            (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")

    def _begin(self, file: Path, shard: Mapping[str, Blank]) -> None:
        header: dict[str, Any] = {"__metadata__": self._said}
        end = 0
        for key, blank in shard.items():
            header[key] = _Entry(
                dtype=NAMES[blank.dtype], shape=blank.shape, data_offsets=(end, end + blank.bytes)
            ).model_dump()
            end += blank.bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        handle = self._handles[file] = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        self.resumed &= os.fstat(handle).st_size == start + end
        os.posix_fallocate(handle, 0, start + end)
        os.ftruncate(handle, start + end)
        _write(handle, memoryview(len(text).to_bytes(8, "little") + text), 0)
        offsets = {key: header[key]["data_offsets"][0] for key in shard}
        self._places |= {
            key: Stored(blank.dtype, blank.shape, file, start + offsets[key]) for key, blank in shard.items()
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def write(self, key: str, tensor: Tensor) -> None:
        place = self._places[key]
        if tensor.dtype != place.dtype or tuple(tensor.shape) != place.shape:
            planned = f"{place.dtype} {list(place.shape)}"
            raise ValueError(f"{key} was planned as {planned}; got {tensor.dtype} {list(tensor.shape)}")
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        _write(self._handles[place.file], raw.numpy().data, place.offset)

    def sync(self) -> None:
        """What was written is on the disk."""
        for handle in self._handles.values():
            os.fdatasync(handle)


def _write(handle: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(handle, data, offset)
        data, offset = data[done:], offset + done


def _shards(blanks: Mapping[str, Blank], shard_bytes: int) -> list[dict[str, Blank]]:
    """In the order given; inside a shard the widest first, so that every tensor lies at a multiple of its width."""
    shards: list[dict[str, Blank]] = [{}]
    room = shard_bytes
    for key, blank in blanks.items():
        if blank.bytes > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][key] = blank
        room -= blank.bytes
    return [dict(_widest_first(shard.items())) for shard in shards]


def _widest_first(shard: Iterable[tuple[str, Blank]]) -> list[tuple[str, Blank]]:
    return sorted(shard, key=lambda item: -item[1].dtype.itemsize)
