"""The families there are, by name, imported when first asked for."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

from models.base import Family

FAMILIES = {
    "wan": "models.wan:Wan",
    "hunyuan_video": "models.hunyuan_video:HunyuanVideo",
    "cogvideox": "models.cogvideox:CogVideoX",
    "vggt": "models.vggt:Vggt",
}

# Checkpoints that come along, by the name that stands for their folder.
SHIPPED = {
    "demo-video": Path(__file__).parent / "demo" / "video" / "checkpoint",
    "demo-scene": Path(__file__).parent / "demo" / "scene" / "checkpoint",
}


def family(name: str) -> Family:
    if name not in FAMILIES:
        raise ValueError(f"no family {name!r}: there are {', '.join(FAMILIES)}")
    module, _, kind = FAMILIES[name].partition(":")
    made: Family = getattr(import_module(module), kind)()
    return made


def checkpoint(name: str) -> Path:
    """The folder of a shipped checkpoint's name or of a path. Refuses what does not exist."""
    folder = SHIPPED.get(name, Path(name))
    if not folder.is_dir():
        raise ValueError(f"{name} is neither a folder nor one of {', '.join(SHIPPED)}")
    return folder


def family_of(folder: Path) -> Family:
    """The family that recognizes a checkpoint's folder. Refuses an artifact: it was a checkpoint."""
    if (folder / "manifest.json").is_file():
        raise ValueError(f"{folder} is an artifact: quantize the checkpoint that it was made from")
    for name in FAMILIES:
        found = family(name)
        if found.recognizes(folder):
            return found
    raise ValueError(f"{folder} is no checkpoint of {' or '.join(FAMILIES)}: {_found(folder)}")


def _found(folder: Path) -> str:
    try:
        return f"its model_index.json names a {json.loads((folder / 'model_index.json').read_bytes())['_class_name']}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"found {sorted(path.name for path in folder.iterdir())[:8]}"
