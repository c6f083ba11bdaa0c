"""LoRA (arXiv:2106.09685): low-rank changes of a checkpoint's weights, merged in float32 before anything is rounded.

Files are read tensor by tensor, so that a checkpoint can be changed as it goes by. Layers are named as diffusers names
them or as the model's authors do, behind any of PREFIXES; of the authors' layers that diffusers cuts into several, each
gets its rows.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import safe_open
from torch import Tensor, nn

from quant_runtime.artifact import LoraRecord
from quant_runtime.tensor_files import TensorFiles

FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # in a folder: diffusers' name, PEFT's
PREFIXES = ("base_model.model.", "model.", "diffusion_model.", "transformer.")
FLAT = ("lora_unet_", "lora_transformer_")  # kohya's: behind these, dots are underscores
Part = Literal["down", "up", "up_bias", "alpha", "diff", "diff_b"]
SUFFIXES: Mapping[str, Part] = {
    ".lora_A.weight": "down",
    ".lora_A.default.weight": "down",
    ".lora_down.weight": "down",
    ".lora.down.weight": "down",
    ".lora_B.weight": "up",
    ".lora_B.default.weight": "up",
    ".lora_up.weight": "up",
    ".lora.up.weight": "up",
    ".lora_B.bias": "up_bias",
    ".lora_B.default.bias": "up_bias",
    ".alpha": "alpha",
    ".diff": "diff",
    ".diff_b": "diff_b",
}
SHOWN = 6  # names of layers that an error shows

_Known = dict[str, tuple[str, ...]]  # what a LoRA may call layers → those of the network that are meant
Originals = Sequence[tuple[str, str]]  # (regex of diffusers' name of a layer, the authors'); in the order of their rows


@dataclass(frozen=True)
class Lora:
    """A safetensors file, or a folder with one of FILES, and how strongly it is merged."""

    path: Path
    scale: float = 1.0
    network: str = ""  # the folder of the network it is for, where a checkpoint has several

    @classmethod
    def parse(cls, text: str) -> Self:
        """PATH or PATH:SCALE, behind NETWORK= where there are several. ValueError says what would do."""
        network, sign, rest = text.partition("=")
        if not sign or Path(text).exists() or not network.isidentifier():
            network, rest = "", text
        path, sign, scale = rest.rpartition(":")
        if not sign or Path(rest).exists():
            return cls(Path(rest), network=network)
        try:
            number = float(scale)
        except ValueError:
            raise ValueError(f"--lora is PATH or PATH:SCALE, and SCALE a number; got {text!r}") from None
        if not math.isfinite(number) or not number:
            raise ValueError(f"the SCALE of --lora is a finite number other than 0; got {text!r}")
        return cls(Path(path), number, network)

    def file(self) -> Path:
        """ValueError names what is not there."""
        if self.path.is_dir():
            for name in FILES:
                if (self.path / name).is_file():
                    return self.path / name
            raise ValueError(f"{self.path} has neither {' nor '.join(FILES)}: name the LoRA's file")
        if self.path.suffix != ".safetensors" or not self.path.is_file():
            raise ValueError(f"{self.path} is no safetensors file, and no folder of a LoRA")
        return self.path


class _Trained(BaseModel):
    """Of PEFT's LoraConfig all that changes the sum. Its many other fields are about training: they are not read."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    lora_alpha: float
    alpha_pattern: dict[str, float] = {}
    use_rslora: bool = False
    use_dora: Literal[False] = False

    def factor(self, layer: str, rank: int) -> float:
        matched = (alpha for end, alpha in self.alpha_pattern.items() if f".{layer}".endswith(f".{end}"))
        return next(matched, self.lora_alpha) / (math.sqrt(rank) if self.use_rslora else rank)


@dataclass
class _Keys:
    """What a file has for one layer: its keys by part."""

    named: str  # as the file names the layer, prefixes left out
    layers: tuple[str, ...]  # of the network; more than one share the rows
    parts: dict[Part, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Change:
    """Of one tensor of the network: `factor` times a tensor of the file, or the product of two; of these rows."""

    files: TensorFiles
    factor: float
    left: str
    right: str | None
    rows: slice

    def of(self, shape: Sequence[int]) -> Tensor:
        """float32, on the CPU."""
        left = self._read(self.left)[self.rows]
        if self.right is None:
            return self.factor * left.reshape(shape)
        return self.factor * (left.flatten(1) @ self._read(self.right).flatten(1)).reshape(shape)

    def _read(self, key: str) -> Tensor:
        tensor = self.files.read(key).float()
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{self.files.tensors[key].file}: {key} has a value that is not finite")
        return tensor


class Loras:
    """Opened LoRAs of a network, or of an nn.ModuleDict of several.

    ValueError names the key that fits no layer or no tensor's shape.
    """

    def __init__(self, loras: Sequence[Lora], network: nn.Module, originals: Originals) -> None:
        self.records: tuple[LoraRecord, ...] = ()
        self._shapes = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
        parts = dict(network.items()) if isinstance(network, nn.ModuleDict) else {"": network}
        self._changes: dict[str, list[_Change]] = {}
        self._files: list[TensorFiles] = []
        for lora in loras:
            file = lora.file()
            if lora.network not in parts:
                wanted = f"say for which, as {[*parts][-1]}=PATH" if parts.keys() - {""} else "name none"
                has = f"has {' and '.join(parts)}" if parts.keys() - {""} else "has one network"
                raise ValueError(
                    f"{file} is for {lora.network or 'no network by name'}; the checkpoint {has}: {wanted}"
                )
            with file.open("rb") as handle:
                digest = hashlib.file_digest(handle, "sha256").hexdigest()
            name = file.name if file == lora.path else f"{lora.path.resolve().name}/{file.name}"
            self.records += (LoraRecord(name=name, scale=lora.scale, sha256=digest, network=lora.network),)
            self._files.append(TensorFiles.open(file.parent, file.stem))
            known = _names(parts[lora.network], lora.network, originals)
            for keys in _layers(self._files[-1], file, known):
                self._plan(keys, self._files[-1], file, lora.scale, _trained(file))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for files in self._files:
            files.__exit__()

    def merged(self, key: str, tensor: Tensor) -> Tensor:
        """The network's tensor of this name with all changes: float32, on the CPU. What nothing changes comes back."""
        if key not in self._changes:
            return tensor
        merged = tensor.cpu().float()
        for change in self._changes[key]:
            merged = merged + change.of(merged.shape)
        if not bool(merged.isfinite().all()):
            raise ValueError(f"{', '.join(record.name for record in self.records)}: {key} becomes too large")
        return merged

    def merge_into(self, network: nn.Module) -> None:
        for key, tensor in network.state_dict().items():
            if key in self._changes:
                tensor.copy_(self.merged(key, tensor))

    def _plan(self, keys: _Keys, files: TensorFiles, file: Path, scale: float, trained: _Trained | None) -> None:
        parts = keys.parts
        factor = scale
        if parts.keys() & {"down", "up", "up_bias", "alpha"}:
            down, up = (self._pair(keys, part, file) for part in ("down", "up"))
            narrow, wide = files.tensors[down].shape, files.tensors[up].shape
            rank = wide[1] if len(wide) > 1 else 0
            if not rank or narrow[:1] != (rank,) or math.prod(wide[2:]) != 1:
                raise ValueError(f"{file}: {up} is {list(wide)} and {down} {list(narrow)}: they have no common rank")
            if "alpha" in parts:
                factor *= _number(files, parts["alpha"], file) / rank
            elif trained is not None:
                factor *= trained.factor(keys.named, rank)
            self._add(keys.layers, "weight", files, file, factor, up, down)
        if "up_bias" in parts:
            self._add(keys.layers, "bias", files, file, factor, parts["up_bias"])
        if "diff" in parts:
            self._add(keys.layers, "weight", files, file, scale, parts["diff"])
        if "diff_b" in parts:
            self._add(keys.layers, "bias", files, file, scale, parts["diff_b"])

    def _pair(self, keys: _Keys, part: Part, file: Path) -> str:
        if part not in keys.parts:
            wanted = "lora_A (lora_down)" if part == "down" else "lora_B (lora_up)"
            raise ValueError(f"{file}: {next(iter(keys.parts.values()))} comes without its {wanted}")
        return keys.parts[part]

    def _add(
        self,
        layers: Sequence[str],
        name: str,
        files: TensorFiles,
        file: Path,
        factor: float,
        left: str,
        right: str | None = None,
    ) -> None:
        targets = [f"{layer}.{name}" for layer in layers]
        if any(target not in self._shapes for target in targets):
            raise ValueError(f"{file}: {left} is of {name}s, and {layers[0]} has none")
        got, inputs = files.tensors[left].shape, files.tensors[right].shape[1:] if right else None
        rows = [self._shapes[target][0] for target in targets]
        within = {self._shapes[target][1:] for target in targets}
        if got[:1] != (sum(rows),) or within != {got[1:] if inputs is None else inputs}:
            has = " and ".join(f"{key} is {list(files.tensors[key].shape)}" for key in (left, right) if key)
            want = ", ".join(f"{target} {list(self._shapes[target])}" for target in targets)
            raise ValueError(f"{file}: {has}; the network has {want}")
        start = 0
        for target, count in zip(targets, rows, strict=True):
            change = _Change(files, factor, left, right, slice(start, start + count))
            self._changes.setdefault(target, []).append(change)
            start += count


def _layers(files: TensorFiles, file: Path, known: _Known) -> Iterator[_Keys]:
    """What a file has, layer by layer."""
    found: dict[str, _Keys] = {}
    for key in files.tensors:
        suffix = next((suffix for suffix in SUFFIXES if key.endswith(suffix)), None)
        if suffix is None:
            parts = "lora_A and lora_B (or lora_down and lora_up), alpha, diff and diff_b"
            raise ValueError(f"{file}: {key} is nothing that is merged: {parts} are")
        stem, stored = key.removesuffix(suffix), files.tensors[key]
        if not stored.dtype.is_floating_point and SUFFIXES[suffix] != "alpha":
            raise ValueError(f"{file}: {key} is {stored.dtype}, and a float is wanted")
        named, layers = _called(stem, known)
        if not layers:
            some = list(known)[:: max(1, len(known) // SHOWN)]
            raise ValueError(f"{file}: {key} fits no layer of this network; it has {', '.join(some)}")
        keys = found.setdefault(named, _Keys(named, layers))
        if SUFFIXES[suffix] in keys.parts:
            raise ValueError(f"{file}: {key} and {keys.parts[SUFFIXES[suffix]]} are the same")
        keys.parts[SUFFIXES[suffix]] = key
    yield from found.values()


def _called(stem: str, known: _Known) -> tuple[str, tuple[str, ...]]:
    """The name without prefixes, and the layers that it stands for, if any."""
    for flat in FLAT:
        if stem.startswith(flat):
            given = stem.removeprefix(flat)
            return next(((n, its) for n, its in known.items() if n.replace(".", "_") == given), (given, ()))
    for prefix in PREFIXES:
        if stem not in known:
            stem = stem.removeprefix(prefix)
    return stem, known.get(stem, ())


def _names(network: nn.Module, folder: str, originals: Originals) -> _Known:
    layers = dict.fromkeys(key.rpartition(".")[0] for key in network.state_dict())
    theirs: dict[str, list[tuple[int, str]]] = {}
    for layer in layers:
        for place, (pattern, template) in enumerate(originals):
            match = re.fullmatch(pattern, layer)
            if match:
                theirs.setdefault(match.expand(template), []).append((place, layer))
                break
    named = {name: tuple(layer for _, layer in sorted(its)) for name, its in theirs.items()}
    named |= {layer: (layer,) for layer in layers}
    return {name: tuple(f"{folder}.{layer}".removeprefix(".") for layer in its) for name, its in named.items()}


def _number(files: TensorFiles, key: str, file: Path) -> float:
    stored = files.tensors[key]
    number = float(files.read(key).float().reshape(-1)[0]) if math.prod(stored.shape) == 1 else math.nan
    if not math.isfinite(number):
        raise ValueError(f"{file}: {key} is no single finite number")
    return number


def _trained(file: Path) -> _Trained | None:
    """How it was trained, where it says so: in the file, as diffusers writes it, or beside it, as PEFT does."""
    beside = file.with_name("adapter_config.json")
    with safe_open(file, framework="pt") as opened:
        text = (opened.metadata() or {}).get("lora_adapter_metadata")
    try:
        if text is not None:
            given = json.loads(text)
            own = "transformer."
            named = {key.removeprefix(own): value for key, value in given.items() if key.startswith(own)}
            return _Trained.model_validate(named) if named else None
        if file.name == FILES[1] and beside.is_file():
            return _Trained.model_validate_json(beside.read_bytes())
    except (ValueError, AttributeError) as error:  # a ValidationError is a ValueError
        first = error.errors(include_url=False)[0] if isinstance(error, ValidationError) else None
        said = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else str(error)
        raise ValueError(f"{file}: what it says of its training will not do: {said}") from None
    return None
