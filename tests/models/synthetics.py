"""A network of the size of a test under the hub's names, and ways to break its files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from models.published import Published

NAME = "diffusion_pytorch_model"
WAN = Published(
    "wan",
    "WanPipeline",
    "WanTransformer3DModel",
    {
        "num_attention_heads": 2, "attention_head_dim": 64, "num_layers": 2, "ffn_dim": 256, "text_dim": 64,
        "freq_dim": 32, "rope_max_seq_len": 32,
    },
    0.0011,
    dtype=torch.float16,
    shard_bytes=500_000,
)  # fmt: skip


def nothing(done: int, of: int) -> None:
    pass


def index_of(folder: Path) -> dict:
    return json.loads((folder / f"{NAME}.safetensors.index.json").read_text())


def shard_of(folder: Path, key: str) -> Path:
    return folder / index_of(folder)["weight_map"][key]


def renamed(folder: Path, key: str, name: str) -> None:
    """A tensor under another name, in its shard and in the index."""
    file, index = shard_of(folder, key), index_of(folder)
    tensors = load_file(file)
    tensors[name] = tensors.pop(key)
    save_file(tensors, file)
    index["weight_map"][name] = index["weight_map"].pop(key)
    (folder / f"{NAME}.safetensors.index.json").write_text(json.dumps(index))
