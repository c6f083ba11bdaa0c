"""The networks of published checkpoints at their true sizes: what their config.json says, and how large they are.

Wan's are those of diffusers' scripts/convert_wan_to_diffusers.py, which wrote the hub's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch


@dataclass(frozen=True)
class Published:
    """`parameters` are those of the transformer, of each where there are two, in billions.

    (No paper counts those of CogVideoX-2B, nor of Wan but 2.1's two from text: counted here.)
    """

    family: str
    pipeline: str  # the class in diffusers that its folder is of
    network: str  # and that of its transformer
    config: Mapping[str, Any]  # where it is not the class' default
    parameters: float
    networks: int = 1  # of this config: two experts take turns in Wan 2.2 A14B
    index: Mapping[str, Any] = field(default_factory=dict)  # what its model_index.json says beside its parts' classes
    dtype: torch.dtype = torch.bfloat16  # of its files
    shard_bytes: int = 5_000_000_000  # no file of it is larger

    def on_meta(self) -> Any:
        """The network without its tensors."""
        with torch.device("meta"):
            return getattr(diffusers, self.network).from_config(dict(self.config))


@dataclass(frozen=True)
class Part:
    """A part of a pipeline that does not shrink: diffusers' or transformers' class, and what its config says."""

    kind: str
    config: Mapping[str, Any]  # where it is not the class' default
    parameters: float  # in billions


_XXL = {
    "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}  # fmt: skip
_LLAMA = {
    "vocab_size": 128320, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
}  # fmt: skip
_CLIP = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 77, "projection_dim": 768, "hidden_act": "quick_gelu",
}  # fmt: skip
PARTS: Mapping[str, Mapping[str, Part]] = {  # of the families' checkpoints from text
    "wan": {  # 2.1, and 2.2 A14B
        "text_encoder": Part("UMT5EncoderModel", {"vocab_size": 256384, **_XXL}, 5.6809),
        "vae": Part("AutoencoderKLWan", {}, 0.1269),
    },
    "hunyuan_video": {
        "text_encoder": Part("LlamaModel", _LLAMA, 7.5052),
        "text_encoder_2": Part("CLIPTextModel", _CLIP, 0.1231),
        "vae": Part("AutoencoderKLHunyuanVideo", {}, 0.2465),
    },
    "cogvideox": {
        "text_encoder": Part("T5EncoderModel", {"vocab_size": 32128, **_XXL}, 4.7623),
        "vae": Part("AutoencoderKLCogVideoX", {}, 0.2156),
    },
}

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
    "wan-2.1-i2v-14b": Published(  # 480P and 720P
        "wan",
        "WanImageToVideoPipeline",
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
        index={"image_encoder": ["transformers", "CLIPVisionModel"]},
        dtype=torch.float32,
    ),
    "wan-2.2-t2v-a14b": Published(
        "wan",
        "WanPipeline",
        "WanTransformer3DModel",
        {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
        14.2885,
        networks=2,
        index={"boundary_ratio": 0.875},
        dtype=torch.float32,
    ),
    "wan-2.2-i2v-a14b": Published(
        "wan",
        "WanImageToVideoPipeline",
        "WanTransformer3DModel",
        {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824, "in_channels": 36, "out_channels": 16},
        14.2889,
        networks=2,
        index={"boundary_ratio": 0.9},
        dtype=torch.float32,
    ),
    "wan-2.2-ti2v-5b": Published(
        "wan",
        "WanPipeline",
        "WanTransformer3DModel",
        {"num_attention_heads": 24, "num_layers": 30, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48},
        4.9998,
        index={"expand_timesteps": True},
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
