"""The self-test of an artifact: the kernels that its family runs for it on one device, against their references."""

from __future__ import annotations

from pathlib import Path

import torch

from models import registry
from quant_runtime import artifact, selftest
from quant_runtime.selftest import Report


def check(folder: Path, device: str, fallback: bool = False) -> Report:
    """Reads the manifest and configs, and no weights. ArtifactError names the file or field that does not fit.

    With `fallback`, an op that fails runs by its next version in this process from now on.
    """
    manifest = artifact.read_manifest(folder)
    family = registry.family(manifest.family)
    try:
        return selftest.run(family.pieces(folder, manifest, device), torch.device(device), fallback)
    except artifact.ArtifactError:
        raise
    except ValueError as error:
        raise artifact.ArtifactError(str(error)) from error
