"""The parts of a pipeline that are diffusers' own models and do not shrink: autoencoders, read by us.

They come in as encoders do (models/encoders.py), and on a CPU that computes in float32 they take the memory that their
files have bytes: a filter is widened while it runs, which is exact.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from torch import nn

from quant_runtime import wide_face
from quant_runtime.tensor_files import TensorFiles

WEIGHTS = "diffusion_pytorch_model"  # diffusers' name

log = logging.getLogger(__name__)


def kinds(index: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' class of each part that is such a model, networks among them, by what a model_index.json says."""
    named = {part: its[1] for part, its in index.items() if isinstance(its, list) and its[:1] == ["diffusers"]}
    found = {part: getattr(diffusers, name or "", None) for part, name in named.items()}
    return {
        part: kind for part, kind in found.items() if isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)
    }


def read(
    folder: Path, kind: Any, dtype: torch.dtype, device: str, digests: Mapping[str, str] | None = None
) -> nn.Module | None:
    """The autoencoder of this folder on its device, strictly, computing in `dtype`: float32 on a CPU is often a face.

    `digests`, None and ValueError as in encoders.read.
    """
    if not any((folder / f"{WEIGHTS}.safetensors{end}").is_file() for end in ("", ".index.json")):
        log.warning("%s has no %s.safetensors: diffusers loads it, in more memory", folder, WEIGHTS)
        return None
    try:
        with init_empty_weights():
            made: nn.Module = kind.from_config(kind.load_config(folder, local_files_only=True)).eval()
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'} describes no {kind.__name__}: {error}") from error
    with TensorFiles.open(folder, WEIGHTS) as files:
        if unknown := sorted(files.tensors.keys() - made.state_dict().keys()):
            some = ", ".join(unknown[:3])
            log.warning("%s has tensors of other names (%s): diffusers loads it, in more memory", folder, some)
            return None
        wide_face.load(made, files, device, dtype, digests, wide=kind._keep_in_fp32_modules or ())
    return made
