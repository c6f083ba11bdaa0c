"""Which artifacts lie in a folder, read from their manifests without torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from service.jobs import ArtifactInfo
from service.settings import StartError

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Found:
    folder: Path
    info: ArtifactInfo


class _Part(BaseModel):
    """A part of a manifest that serving needs; the worker's loader checks the rest, unknown fields and hashes too."""

    model_config = ConfigDict(extra="ignore")


class _Layer(_Part):
    format: str


class _Residual(_Part):
    bytes: int | None = None


class _Attention(_Part):
    effective_density: float | None = None
    residual: _Residual | None = None


class _Serving(_Part):
    kind: Literal["video", "scene"]
    limits: dict[str, Any]


class _Manifest(_Part):
    name: str | None = None  # left out: the folder's
    family: str
    method: str | None = None
    bits: str | None = None  # left out: the format of most layers
    density: float | None = None  # left out: what the attention was measured to keep
    layers: dict[str, _Layer] = {}
    attention: _Attention | None = None
    quality: dict[str, Any] = {}
    serving: _Serving

    @field_validator("method", mode="before")
    @classmethod
    def _name_of_the_method(cls, value: Any) -> Any:
        return value.get("name") if isinstance(value, dict) else value  # {"name": ..., its fields} or the name alone


def read(folder: Path) -> Found:
    """Raises StartError that names the file and what in it is wrong."""
    path = folder / MANIFEST
    try:
        manifest = _Manifest.model_validate_json(path.read_bytes())
        formats = Counter(layer.format for layer in manifest.layers.values()).most_common(1)
        residual = manifest.attention and manifest.attention.residual
        info = ArtifactInfo.model_validate(
            {
                "name": manifest.name or re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name),
                "kind": manifest.serving.kind,
                "family": manifest.family,
                "method": manifest.method,
                "bits": manifest.bits or (formats[0][0] if formats else None),
                "density": manifest.density or (manifest.attention and manifest.attention.effective_density),
                "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
                "limits": manifest.serving.limits,
                "cache_bytes": residual.bytes if residual else 0,
                "quality": manifest.quality,
            }
        )
    except (OSError, ValidationError) as error:
        raise StartError(f"{path} describes no artifact that can be served: {error}") from error
    return Found(folder, info)


def find(places: Iterable[Path]) -> tuple[Found, ...]:
    """The artifacts in `places`, in their order; a place is an artifact or a folder of artifacts, there sorted by name.

    A place that does not exist holds none. Two artifacts of one name are refused: a request could not tell them apart.
    """
    found: dict[str, Found] = {}
    for folder in _folders(places):
        one = read(folder)
        if one.info.name in found:
            raise StartError(f"{folder} and {found[one.info.name].folder} are both named {one.info.name!r}; rename one")
        found[one.info.name] = one
    return tuple(found.values())


def needed(places: tuple[Path, ...]) -> tuple[Found, ...]:
    """As find; raises StartError where there is none."""
    found = find(places)
    if not found:
        where = ", ".join(map(str, places))
        raise StartError(f"a worker needs an artifact: none is in {where}; name folders of some in LOWBIT_ARTIFACTS")
    return found


def _folders(places: Iterable[Path]) -> Iterator[Path]:
    for place in places:
        if (place / MANIFEST).is_file():
            yield place
        elif place.is_dir():
            folders = sorted(path.parent for path in place.glob(f"*/{MANIFEST}"))
            yield from (folder for folder in folders if not folder.name.startswith("."))  # one that is being written
