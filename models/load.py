"""An artifact goes in, a model ready to run comes out. Nothing of a folder is run before its hashes are right."""

from __future__ import annotations

from pathlib import Path

from models import registry
from models.base import Model
from quant_runtime import artifact


def load(folder: Path, device: str, check: bool = True) -> Model:
    """The artifact's model on `device`, warm. ArtifactError names the file or field that does not fit.

    All weights are read once, each straight to the device: beside what stays there, the host holds a few MiB. Hashes
    are those of that reading; what its library alone can read is hashed before, and goes through the host, as the log
    says. `check=False` leaves them out, for a folder that was verified before or whose disk is
    trusted.
    """
    manifest = artifact.read_manifest(folder)
    family = registry.family(manifest.family)
    try:
        if check:
            own = [artifact.weights(manifest, part) for part in family.hashed(folder)]
            artifact.verify(folder, manifest, later={name for some in own for name in some})
        return family.open(folder, manifest, device, check)
    except artifact.ArtifactError:
        raise
    except ValueError as error:
        raise artifact.ArtifactError(str(error)) from error
