"""The networks of published checkpoints at their true sizes: what their config.json says, and how large they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch


@dataclass(frozen=True)
class Published:
    """`parameters` are those of the transformer, in billions. (No paper counts those of CogVideoX-2B: counted here.)"""

    family: str
    pipeline: str  # the class in diffusers that its folder is of
    network: str  # and that of its transformer
    config: Mapping[str, Any]  # where it is not the class' default
    parameters: float
    dtype: torch.dtype = torch.bfloat16  # of its files
    shard_bytes: int = 5_000_000_000  # no file of it is larger

    def on_meta(self) -> Any:
        """The network without its tensors."""
        with torch.device("meta"):
            return getattr(diffusers, self.network).from_config(dict(self.config))


PUBLISHED = {
    "wan-2.1-1.3b": Published(
        "wan",
        "WanPipeline",
        "WanTransformer3DModel",
        {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
        1.4190,
        dtype=torch.float32,
    ),
    "wan-2.1-14b": Published(
        "wan",
        "WanPipeline",
        "WanTransformer3DModel",
        {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
        14.2885,
        dtype=torch.float32,
    ),
    "hunyuan-video": Published("hunyuan_video", "HunyuanVideoPipeline", "HunyuanVideoTransformer3DModel", {}, 12.8210),
    "cogvideox-2b": Published(
        "cogvideox",
        "CogVideoXPipeline",
        "CogVideoXTransformer3DModel",
        {},
        1.6938,
        dtype=torch.float16,
        shard_bytes=10_000_000_000,
    ),
    "cogvideox-5b": Published(
        "cogvideox",
        "CogVideoXPipeline",
        "CogVideoXTransformer3DModel",
        {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
        5.5703,
        shard_bytes=10_000_000_000,
    ),
}
