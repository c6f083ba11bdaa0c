"""The parts of a pipeline that are models of transformers: text and image encoders, read by us.

They go to their device a tensor at a time, as networks do. On a CPU that computes in float32 an encoder takes the
memory that its file has bytes: large layers and embeddings stay in the 16 bits in which they lie
(quant_runtime/wide_face.py), and widening them is exact.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers.initialization import no_init_weights

from quant_runtime import wide_face
from quant_runtime.tensor_files import Stored, TensorFiles

WEIGHTS = "model"  # transformers' name

log = logging.getLogger(__name__)


def kinds(index: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' class of each part that is such a model, by what a model_index.json says."""
    named = {part: its[1] for part, its in index.items() if isinstance(its, list) and its[:1] == ["transformers"]}
    found = {part: getattr(transformers, name or "", None) for part, name in named.items()}
    return {
        part: kind
        for part, kind in found.items()
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    }


def empty(folder: Path, kind: Any) -> nn.Module:
    """A model by its folder's config, on the meta device but for what no file holds. ValueError names the config."""
    try:
        with init_empty_weights(), no_init_weights():
            made: nn.Module = kind(kind.config_class.from_pretrained(folder, local_files_only=True)).eval()
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'} describes no {kind.__name__}: {error}") from error
    return made


@dataclass(frozen=True)
class Names:
    """Where the tensors of a model's state lie, by its own names, which a file may know with its kind's prefix."""

    held: Mapping[str, Stored]
    tied: Mapping[str, str]  # in no file: the one that each of them is
    missing: tuple[str, ...]
    unknown: tuple[str, ...]  # in a file, and neither of the state nor known to be of no use

    @classmethod
    def of(cls, encoder: nn.Module, tensors: Mapping[str, Stored]) -> Self:
        foreign: Any = encoder
        own, prefix = encoder.state_dict().keys(), f"{foreign.base_model_prefix}."
        useless = {name for name, _ in encoder.named_buffers()} - own
        patterns = foreign._keys_to_ignore_on_load_unexpected or ()
        held, unknown = {}, []
        for key, stored in tensors.items():
            name = key if key in own else key.removeprefix(prefix)
            if name in own and name not in held:
                held[name] = stored
            elif name not in useless and not any(re.search(pattern, key) for pattern in patterns):
                unknown.append(key)
        tied = {key: its for key, its in foreign.all_tied_weights_keys.items() if key not in held and its in held}
        return cls(held, tied, tuple(sorted(own - held.keys() - tied.keys())), tuple(sorted(unknown)))


def read(
    folder: Path, kind: Any, dtype: torch.dtype, device: str, digests: Mapping[str, str] | None = None
) -> nn.Module | None:
    """The encoder of this folder on its device, strictly, computing in `dtype`: float32 on a CPU is often a face.

    `digests` has each file's SHA-256, by its name, as in TensorFiles.pour. None, and a line in the log, where the
    folder's files are not safetensors or have names that only transformers knows to read: then it is to load them, and
    nothing was hashed. ValueError names a tensor that is missing or has another shape.
    """
    if not any((folder / f"{WEIGHTS}.safetensors{end}").is_file() for end in ("", ".index.json")):
        log.warning("%s has no %s.safetensors: transformers loads it, in more memory", folder, WEIGHTS)
        return None
    encoder: Any = empty(folder, kind)
    with TensorFiles.open(folder, WEIGHTS) as files:
        names = Names.of(encoder, files.tensors)
    if names.unknown:
        some = ", ".join(names.unknown[:3])
        log.warning("%s has tensors of other names (%s): transformers loads it, in more memory", folder, some)
        return None
    if names.missing:
        raise ValueError(f"{folder} has no {', '.join(names.missing[:5])}")
    wide = encoder._keep_in_fp32_modules_strict or ()
    with TensorFiles(names.held) as files:
        wide_face.load(encoder, files, device, dtype, digests, wide=wide, tied=names.tied)
    return encoder
