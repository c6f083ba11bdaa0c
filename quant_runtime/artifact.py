"""The artifact: a folder of safetensors and configs that diffusers opens, and a manifest that vouches for every file.

An artifact is written aside and renamed when it is whole, so that nothing half-written ever stands under its name.
Reading refuses what it does not know: another version, an unknown field, a file too many, too few or changed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Container, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, JsonValue, ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from quant_runtime import __version__, fields
from quant_runtime.attention import AttentionPlan, Density
from quant_runtime.convert import LayerReport, prepare
from quant_runtime.formats import QuantFormat
from quant_runtime.linear import LinearSpec
from quant_runtime.methods import METHODS, Method
from quant_runtime.residual import Place, Refresh, Residual, ResidualUse
from quant_runtime.sparsity import POLICIES
from quant_runtime.tensor_files import TensorFiles, fill

VERSION: Final = 1
MANIFEST = "manifest.json"
SHARD_BYTES = 4 << 30


class ArtifactError(ValueError):
    """An artifact that cannot be used as it lies there; the message names the file or the field."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or str(path) != name or name == MANIFEST:
        raise ValueError(f"{name!r} is no path of a file inside the artifact")
    return name


def _format(text: str) -> str:
    return str(QuantFormat.parse(text))


class SpecRecord(_Strict):
    """What is needed to make an empty QuantLinear; the `layers` of a config's quantization_config."""

    format: Annotated[str, AfterValidator(_format)]
    scaled: bool = False
    rotation: int = 0

    @classmethod
    def of(cls, spec: LinearSpec) -> SpecRecord:
        return cls(format=str(spec.format), scaled=spec.scaled, rotation=spec.rotation)

    def spec(self) -> LinearSpec:
        return LinearSpec(QuantFormat.parse(self.format), self.scaled, self.rotation)


class LayerRecord(SpecRecord):
    """One quantized layer. SQNRs in dB, of its weights and of its answers to calibration inputs.

    None where nothing was lost, or where nothing was run.
    """

    in_features: int
    out_features: int
    bias: bool
    bytes: int
    weight_sqnr: float | None
    output_sqnr: float | None


class Named(_Strict):
    """A row of METHODS or POLICIES, with its fields."""

    name: str
    fields: dict[str, JsonValue] = {}

    @classmethod
    def of(cls, table: Mapping[str, type[Any]], value: Any) -> Named:
        (name,) = [name for name, kind in table.items() if type(value) is kind]
        return cls(name=name, fields=json.loads(json.dumps(dataclasses.asdict(value))))


class RefreshRecord(_Strict):
    """One step whose loss was kept. Norms are relative to the dense answer's, over all layers and passes."""

    step: int
    lost: float  # by sparse attention
    first_error: float | None  # how far off what the refresh before has lost is by now
    second_error: float | None  # and that with its trend; None where there was none
    fell_back: int  # calls that go without a trend

    @classmethod
    def of(cls, refresh: Refresh) -> RefreshRecord:
        lost, first, second = (
            None if value is None else float(f"{value:.4g}")
            for value in (refresh.lost, refresh.first_error, refresh.second_error)
        )
        return cls(
            step=refresh.step, lost=lost or 0.0, first_error=first, second_error=second, fell_back=refresh.fell_back
        )


class ResidualRecord(_Strict):
    """How what sparse attention loses is cached, and what of a run was."""

    interval: int
    order: Literal[1, 2]
    rank: int
    bits: Literal[8, 16]
    place: Literal["device", "host", "auto"]
    freeze: bool = True
    placed: Place | None = None  # where it lay
    bytes: int | None = None  # that it took at most
    refreshes: tuple[RefreshRecord, ...] = ()

    @classmethod
    def of(cls, residual: Residual, use: ResidualUse | None) -> ResidualRecord:
        its = dataclasses.asdict(residual)
        if use is None:
            return cls(**its)
        refreshes = tuple(RefreshRecord.of(refresh) for refresh in use.refreshes)
        return cls(**its, placed=use.place, bytes=use.bytes, refreshes=refreshes)

    def residual(self) -> Residual:
        return Residual(self.interval, self.order, self.rank, self.bits, self.place, self.freeze)


class AttentionRecord(_Strict):
    """How self-attention runs, and the density that was measured when the artifact was made."""

    policy: Named
    warmup: float
    dense_layers: tuple[int, ...]
    qk_bits: Literal[8, 16]
    dense_qk_bits: Literal[8, 16]
    pv_bits: Literal[8, 16] = 16
    residual: ResidualRecord | None = None
    sparse_density: float | None = None
    effective_density: float | None = None
    network_densities: dict[str, float] = {}  # the effective one of each network, where several take turns
    fp8_calls: float | None = None  # the fraction of attention calls whose values were in FP8

    @classmethod
    def of(cls, plan: AttentionPlan, density: Density | None = None) -> AttentionRecord:
        return cls(
            policy=Named.of(POLICIES, plan.policy),
            warmup=plan.warmup,
            dense_layers=plan.dense_layers,
            qk_bits=plan.qk_bits,
            dense_qk_bits=plan.dense_qk_bits,
            pv_bits=plan.pv_bits,
            residual=ResidualRecord.of(plan.residual, density.residual if density else None) if plan.residual else None,
            sparse_density=density.sparse if density else None,
            effective_density=density.effective if density else None,
            network_densities=dict(density.networks) if density else {},
            fp8_calls=density.packed if density else None,
        )

    def plan(self) -> AttentionPlan:
        """Refuses a policy or a field that this version does not know, and values that do not go together."""
        try:
            policy = fields.build(POLICIES, self.policy.name, self.policy.fields)
        except ValueError as error:
            raise ArtifactError(f"{MANIFEST}: attention.policy: {error}") from None
        bits = (self.qk_bits, self.dense_qk_bits, self.pv_bits)
        try:
            residual = self.residual.residual() if self.residual else None
            return AttentionPlan(policy, self.warmup, self.dense_layers, *bits, residual)
        except ValueError as error:
            raise ArtifactError(f"{MANIFEST}: attention: {error}") from None


class LoraRecord(_Strict):
    """What was merged into the checkpoint: its file's name and hash, and how strongly."""

    name: str
    scale: float
    sha256: str
    network: str = ""  # the one that was changed, of a checkpoint that has several


class Base(_Strict):
    """The checkpoint that was compressed."""

    name: str
    revision: str | None = None
    loras: tuple[LoraRecord, ...] = ()


class FileRecord(_Strict):
    bytes: int
    sha256: str


class Manifest(_Strict):
    version: Literal[1] = VERSION
    runtime: str = f"quant_runtime {__version__}"  # whose kernels it was made and measured with
    family: str
    base: Base
    method: Named
    layers: dict[str, LayerRecord]
    kept: tuple[str, ...] = ()  # of the layers that shrink by default, those that stay in 16 bits here
    calibration: str | None = None  # SHA-256 of what the layers were fed (calibrate.fingerprint)
    attention: AttentionRecord | None = None
    quality: dict[str, JsonValue] = {}  # what was measured against full precision, by name
    serving: dict[str, JsonValue] = {}  # the family's own: what its generator needs to know
    files: dict[Annotated[str, AfterValidator(_inside)], FileRecord] = {}  # filled in by save

    def layer_bytes(self) -> tuple[int, int]:
        """Of the quantized layers: their bytes in a file, and what they took in 16 bits."""
        layers = self.layers.values()
        half = sum(2 * layer.out_features * (layer.in_features + layer.bias) for layer in layers)
        return sum(layer.bytes for layer in layers), half

    def specs(self) -> dict[str, LinearSpec]:
        return {name: layer.spec() for name, layer in self.layers.items()}


def layer_records(reports: Mapping[str, LayerReport]) -> dict[str, LayerRecord]:
    """What convert reported, as the manifest writes it."""
    return {
        name: LayerRecord(
            **SpecRecord.of(report.spec).model_dump(),
            in_features=report.in_features,
            out_features=report.out_features,
            bias=report.bias,
            bytes=report.stored_bytes,
            weight_sqnr=_finite(report.weight_sqnr),
            output_sqnr=_finite(report.output_sqnr),
        )
        for name, report in reports.items()
    }


def method_record(method: Method) -> Named:
    return Named.of(METHODS, method)


def quantization_config(specs: Mapping[str, LinearSpec]) -> dict[str, Any]:
    """The `quantization_config` of a config.json: what quant_runtime.diffusers reads to open the folder."""
    layers = {name: SpecRecord.of(spec).model_dump() for name, spec in specs.items()}
    return {"quant_method": "lowbit", "version": VERSION, "layers": layers}


def _finite(decibels: float | None) -> float | None:
    return round(decibels, 3) if decibels is not None and math.isfinite(decibels) else None


def check_free(folder: Path, replace: bool) -> None:
    """Refuses a folder that exists, unless it is to be replaced and is an artifact: nothing else is ever removed."""
    if folder.exists() and not replace:
        raise FileExistsError(f"{folder} exists: choose another name, or say that it is to be replaced")
    if folder.exists() and not (folder / MANIFEST).is_file():
        raise FileExistsError(f"{folder} is no artifact, and is not replaced: choose another name")


def save(folder: Path, manifest: Manifest, write: Callable[[Path], None], *, replace: bool = False) -> Manifest:
    """Makes the artifact `folder`. `write(aside)` writes its files but the manifest; they are hashed and renamed.

    Returns the manifest with its files. Refuses what check_free does. If `write` raises, or the
    machine stops, nothing stands under the folder's name but what stood there before.
    """
    folder = Path(folder)
    check_free(folder, replace)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.parent / f".{folder.name}.partial-{secrets.token_hex(4)}"
    aside.mkdir()
    try:
        write(aside)
        whole = seal(aside, manifest)
        put(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return whole


def seal(aside: Path, manifest: Manifest) -> Manifest:
    """Hashes the files in `aside`, writes the manifest beside them and all to the disk. Returns it with its files."""
    files = {name: _record(aside / name) for name in _files(aside)}
    whole = manifest.model_copy(update={"files": files})
    Manifest.model_validate(whole.model_dump())
    (aside / MANIFEST).write_text(whole.model_dump_json(indent=1) + "\n")
    _sync(aside)
    return whole


def put(aside: Path, folder: Path) -> None:
    """The sealed artifact `aside` gets its name, in the place of the one that is there."""
    if folder.exists():
        old = folder.parent / f".{folder.name}.replaced-{secrets.token_hex(4)}"
        folder.rename(old)
        try:
            aside.rename(folder)
        except OSError:
            old.rename(folder)
            raise
        shutil.rmtree(old)
    else:
        aside.rename(folder)
    _sync_one(folder.parent)


def write_weights(model: nn.Module, folder: Path, name: str = "model", shard_bytes: int = SHARD_BYTES) -> None:
    """The model's state as NAME.safetensors; above `shard_bytes` as NAME-00001-of-00003.safetensors, and an index."""
    shards: list[dict[str, Tensor]] = [{}]
    room = shard_bytes
    for key, tensor in model.state_dict().items():
        size = tensor.numel() * tensor.element_size()
        if size > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][key] = tensor.detach().cpu().contiguous()
        room -= size
    if len(shards) == 1:
        save_file(shards[0], folder / f"{name}.safetensors", metadata={"format": "pt"})
        return
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{name}-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, file)
    total = sum(t.numel() * t.element_size() for shard in shards for t in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def link_or_copy(source: Path, target: Path) -> None:
    """`source`, a file or a folder, at `target` as well: files as hard links where the file system has them."""
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        for inner in sorted(source.iterdir()):
            link_or_copy(inner, target / inner.name)
        return
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an artifact, checked field by field. ArtifactError says which field is wrong."""
    path = Path(folder) / MANIFEST
    try:
        given = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ArtifactError(f"{folder} is no artifact: it has no {MANIFEST}") from None
    except ValueError as error:
        raise ArtifactError(f"{path} is not JSON: {error}") from None
    if not isinstance(given, dict) or given.get("version") != VERSION:
        found = given.get("version") if isinstance(given, dict) else None
        raise ArtifactError(f"{path}: version {found!r}; this program reads version {VERSION}")
    try:
        return Manifest.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(f"{path}: {where}: {first['msg']} ({error.error_count()} in all)") from None


def verify(folder: Path, manifest: Manifest | None = None, *, later: Container[str] = ()) -> Manifest:
    """Every file is there, no other is, and each has the bytes it was saved with; else an ArtifactError by name.

    Files named `later` have the right length: their hashes are for whoever reads them.
    """
    folder = Path(folder)
    manifest = manifest or read_manifest(folder)
    found = set(_files(folder)) - {MANIFEST}
    missing, extra = sorted(manifest.files.keys() - found), sorted(found - manifest.files.keys())
    if missing or extra:
        raise ArtifactError(f"{folder}: missing files: {missing or 'none'}; files of no artifact: {extra or 'none'}")
    for name, record in manifest.files.items():
        same = (folder / name).stat().st_size == record.bytes
        if not same or (name not in later and _record(folder / name) != record):
            raise ArtifactError(f"{folder}: {name} is damaged: it is not the file that was saved")
    return manifest


def weights(manifest: Manifest, component: str) -> dict[str, str]:
    """The SHA-256 of each file that holds weights of this folder inside the artifact, by its name in the manifest."""
    where = PurePosixPath(component)
    paths = {name: PurePosixPath(name) for name in manifest.files}
    held = [name for name, path in paths.items() if path.suffix == ".safetensors" and path.parent == where]
    return {name: manifest.files[name].sha256 for name in held}


def load_into(
    model: nn.Module, folder: Path, *, component: str = "", device: torch.device | str = "cpu", check: bool = True
) -> Manifest:
    """Turns a float model into the artifact's: its layers become QuantLinears, then every tensor is loaded, strictly.

    `component` is the folder inside the artifact that holds the weights. The tensors keep the dtypes they were saved
    in, and go to `device` one by one; the model may be on the meta device. Hashes are those of the same reading, and
    come before it for all other files; `check=False` leaves them out.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    own = weights(manifest, component)
    if check:
        verify(folder, manifest, later=own)
    prepare(model, manifest.specs())
    digests = {PurePosixPath(name).name: digest for name, digest in own.items()} if check else None
    try:
        with TensorFiles.among(folder / name for name in own) as files:
            fill(model, files, device, digests)
    except ValueError as error:
        raise ArtifactError(f"{folder}: {error}") from None
    return manifest


def _files(folder: Path) -> list[str]:
    names = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise ArtifactError(f"{folder}: {name} is a symbolic link: an artifact holds its files itself")
        if path.is_file():
            names.append(name)
    return names


def _record(path: Path) -> FileRecord:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(bytes=path.stat().st_size, sha256=digest)


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync_one(path)
    _sync_one(folder)


def _sync_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
