"""The networks of published checkpoints at their true sizes: what their config.json says, and how large they are.

Wan's are those of diffusers' scripts/convert_wan_to_diffusers.py, which wrote the hub's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch


@dataclass(frozen=True)
class Published:
    """`parameters` are those of the transformer, of each where there are two, in billions.

    (No paper counts those of CogVideoX-2B, nor of Wan but 2.1's two from text: counted here.)
    """

    family: str
    network: str  # the class in diffusers
    config: Mapping[str, Any]  # where it is not the class' default
    parameters: float
    networks: int = 1  # of this config: two experts take turns in Wan 2.2 A14B

    def on_meta(self) -> Any:
        """The network without its tensors."""
        with torch.device("meta"):
            return getattr(diffusers, self.network).from_config(dict(self.config))


PUBLISHED = {
    "wan-2.1-1.3b": Published(
        "wan",
        "WanTransformer3DModel",
        {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
        1.4190,
    ),
    "wan-2.1-14b": Published(
        "wan",
        "WanTransformer3DModel",
        {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
        14.2885,
    ),
    "wan-2.1-i2v-14b": Published(  # 480P and 720P
        "wan",
        "WanTransformer3DModel",
        {
            "num_attention_heads": 40,
            "num_layers": 40,
            "ffn_dim": 13824,
            "in_channels": 36,
            "out_channels": 16,
            "image_dim": 1280,
            "added_kv_proj_dim": 5120,
        },
        16.3949,
    ),
    "wan-2.2-t2v-a14b": Published(
        "wan",
        "WanTransformer3DModel",
        {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
        14.2885,
        networks=2,
    ),
    "wan-2.2-i2v-a14b": Published(
        "wan",
        "WanTransformer3DModel",
        {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824, "in_channels": 36, "out_channels": 16},
        14.2889,
        networks=2,
    ),
    "wan-2.2-ti2v-5b": Published(
        "wan",
        "WanTransformer3DModel",
        {"num_attention_heads": 24, "num_layers": 30, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48},
        4.9998,
    ),
    "hunyuan-video": Published("hunyuan_video", "HunyuanVideoTransformer3DModel", {}, 12.8210),
    "cogvideox-2b": Published("cogvideox", "CogVideoXTransformer3DModel", {}, 1.6938),
    "cogvideox-5b": Published(
        "cogvideox",
        "CogVideoXTransformer3DModel",
        {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
        5.5703,
    ),
}
