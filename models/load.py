"""An artifact goes in, a model ready to run comes out. Nothing of a folder is trusted before its hashes are right."""

from __future__ import annotations

from pathlib import Path

from models import registry
from models.base import Model
from quant_runtime import artifact


def load(folder: Path, device: str, check: bool = True) -> Model:
    """The artifact's model on `device`, warm. ArtifactError names the file or field that does not fit.

    `check=False` leaves out the hashes, for a folder that was verified before.
    """
    manifest = artifact.read_manifest(folder)
    if check:
        artifact.verify(folder, manifest)
    return registry.family(manifest.family).open(folder, manifest, device)
