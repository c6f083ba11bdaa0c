"""Checkpoints of the published networks at their true sizes, with random weights: for tests and measurements.

A folder as the hub has it, of its transformer alone, or of both: configs, shards under the hub's names and of its
sizes, their index. `write_whole` has small parts around it, so that it runs, and `write_full` all parts at their true
sizes, to be opened. One tensor is in memory at a time.

Values are normal, drawn once into a pool; each tensor takes them from there, from a place of its own on, around and
around, times its layer's scale. So 24 GiB come as fast as the disk takes them. What can be told from such weights:
sizes, memory, time, and what rounding costs a matrix; not what a network makes of them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor

from models import encoders, registry
from models.base import VideoLimits
from models.published import Part, Published
from models.video import write_serving
from quant_runtime.tensor_files import Blank, TensorWriter

COMPONENTS, WEIGHTS = ("transformer", "transformer_2"), "diffusion_pytorch_model"  # diffusers' names
POOL = 2**24 - 3  # values; a prime, so that no two rows of a matrix begin at the same one
OUTLIERS = 64  # one input channel in so many is an outlier,
OUTLIER = 8.0  # and its weights are so many times as large
AROUND = 0.02  # standard deviation of biases around 0, and of the gains of norms around 1

OnBytes = Callable[[int, int], None]  # (bytes written, of how many)


def write(
    published: Published,
    folder: Path,
    on_bytes: OnBytes,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    shard_bytes: int | None = None,
) -> None:
    """Makes the checkpoint `folder`: the same bytes for the same seed. Without `dtype` and `shard_bytes`, as published.

    FileExistsError where there is something; OSError before the first tensor where the disk has no room for all.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists: choose another name")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.parent / f".{folder.name}.partial-{secrets.token_hex(4)}"
    aside.mkdir()
    try:
        components = COMPONENTS[: published.networks]
        parts = {component: ["diffusers", published.network] for component in components}
        index = {"_class_name": published.pipeline, "_diffusers_version": diffusers.__version__} | parts
        index |= published.index
        (aside / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        typed, most = dtype or published.dtype, shard_bytes or published.shard_bytes
        for number, component in enumerate(components):
            told = partial(_of_all, on_bytes, number, len(components))
            write_network(published.on_meta(), aside / component, typed, most, seed + number, told)
        aside.rename(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def write_whole(
    published: Published,
    folder: Path,
    limits: VideoLimits,
    on_bytes: OnBytes,
    *,
    seed: int = 0,
) -> None:
    """A Wan checkpoint that runs: this network with the text encoder and the autoencoder of the tiny one, and so fed.

    In bfloat16; it films what `limits` has by default. FileExistsError where there is something, ValueError for a
    network of another family, or two that take turns.
    """
    from models.wan import Serving, Wan

    if (published.family, published.networks) != ("wan", 1):
        raise ValueError(f"a network of Wan's kind, and one, can be made to run; got {published.family}")
    if folder.exists():
        raise FileExistsError(f"{folder} exists: choose another name")
    family = Wan()
    family.tiny(folder)
    fed = {name: family.config(folder, family.component)[name] for name in ("in_channels", "out_channels", "text_dim")}
    network = replace(published, config={**published.config, **fed}).on_meta()
    shutil.rmtree(folder / family.component)
    write_network(network, folder / family.component, torch.bfloat16, published.shard_bytes, seed, on_bytes)
    write_serving(folder, Serving(limits=limits, max_tokens=family.served(folder).max_tokens))


def write_full(
    published: Published, parts: Mapping[str, Part], folder: Path, on_bytes: OnBytes, *, seed: int = 0
) -> None:
    """A checkpoint all of whose models are as large as they are, in bfloat16: to be compressed and opened, not run.

    What is no model (tokenizers, the scheduler) is that of the family's tiny one. FileExistsError where there is
    something, ValueError where networks take turns.
    """
    if published.networks != 1:
        raise ValueError("a checkpoint of one network can be made whole")
    if folder.exists():
        raise FileExistsError(f"{folder} exists: choose another name")
    family: Any = registry.family(published.family)
    family.tiny(folder)
    for name, part in parts.items():
        shutil.rmtree(folder / name)
        library = diffusers if hasattr(diffusers, part.kind) else transformers
        kind = getattr(library, part.kind)
        if library is transformers:
            write_encoder(kind, kind.config_class(**part.config), folder / name, published.shard_bytes, seed)
            continue
        with torch.device("meta"):
            made = kind(**part.config)
        write_network(made, folder / name, torch.bfloat16, published.shard_bytes, seed, lambda done, of: None)
    shutil.rmtree(folder / family.component)
    network = published.on_meta()
    write_network(network, folder / family.component, torch.bfloat16, published.shard_bytes, seed, on_bytes)


def _of_all(on_bytes: OnBytes, number: int, networks: int, done: int, of: int) -> None:
    on_bytes(number * of + done, networks * of)


def write_network(
    network: Any, folder: Path, dtype: torch.dtype, shard_bytes: int, seed: int, on_bytes: OnBytes
) -> None:
    """The config of a diffusers network, which may be on the meta device, and random weights for it, synced."""
    folder.mkdir()
    network.save_config(folder)
    _write_tensors(network.state_dict(), folder, WEIGHTS, dtype, shard_bytes, seed, on_bytes)


def write_encoder(kind: Any, config: Any, folder: Path, shard_bytes: int, seed: int) -> None:
    """A model of this class of transformers' with random weights in bfloat16, as transformers writes it."""
    with torch.device("meta"):
        encoder: Any = kind(config)
    folder.mkdir()
    encoder.config.architectures = [type(encoder).__name__]
    encoder.config.dtype = torch.bfloat16
    encoder.config.save_pretrained(folder)
    own = {key: its for key, its in encoder.state_dict().items() if key not in encoder.all_tied_weights_keys}
    _write_tensors(own, folder, encoders.WEIGHTS, torch.bfloat16, shard_bytes, seed, lambda done, of: None)


def _write_tensors(
    state: Mapping[str, Tensor],
    folder: Path,
    name: str,
    dtype: torch.dtype,
    shard_bytes: int,
    seed: int,
    on_bytes: OnBytes,
) -> None:
    blanks = {key: Blank(dtype, tuple(its.shape)) for key, its in state.items()}
    total, done = sum(blank.bytes for blank in blanks.values()), 0
    free = shutil.disk_usage(folder).free
    if free < total:
        raise OSError(errno.ENOSPC, f"{total:,} bytes are to be written and {free:,} are free", str(folder))
    pool = torch.empty(POOL).normal_(generator=torch.Generator().manual_seed(seed)).to(dtype)
    with TensorWriter(folder, name, blanks, shard_bytes) as writer:
        for key, blank in blanks.items():
            writer.write(key, drawn(pool, key, blank.shape))
            done += blank.bytes
            on_bytes(done, total)
        writer.sync()


def drawn(pool: Tensor, key: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor of this name. Matrices [N, K] and kernels [N, ...] have a deviation of 1/sqrt of what a row sums."""
    place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    values = _around(pool, place % len(pool), Blank(pool.dtype, shape))
    if len(shape) < 2:
        return values.mul_(AROUND).add_(1.0 if key.endswith(".weight") else 0.0)
    rows = values.flatten(1)
    rows.mul_(rows.shape[1] ** -0.5)
    if len(shape) == 2:
        some = torch.randperm(shape[1], generator=torch.Generator().manual_seed(place % 2**63))
        rows[:, some[: -(-shape[1] // OUTLIERS)]] *= OUTLIER
    return values


def _around(pool: Tensor, start: int, blank: Blank) -> Tensor:
    values = torch.empty(blank.shape, dtype=blank.dtype)
    flat, done = values.view(-1), 0
    while done < len(flat):
        part = pool[start : start + len(flat) - done]
        flat[done : done + len(part)] = part
        done, start = done + len(part), 0
    return values
