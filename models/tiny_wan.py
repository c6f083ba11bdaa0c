"""The tiny checkpoints of Wan: one of each kind that is published, with random weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from models import tiny, video, wan
from models.demo.video import networks
from models.video import PROMPTS

KINDS = ("t2v", "i2v", "t2v-a14b", "i2v-a14b", "ti2v-5b")
BOUNDARY = 0.9  # of 1000: of two steps or more, at this scheduler's shift, each expert has one
TI2V_LIMITS = replace(
    tiny.LIMITS, size_multiple=32, max_pixels=128 * 96, max_side=128, width=128, height=96, image="optional"
)


def checkpoint(kind: str) -> tuple[Any, video.Serving, Image.Image | None]:
    """The pipeline, what it is served with, and the picture that its serving.json names, `start.png`."""
    if kind not in KINDS:
        raise ValueError(f"no kind {kind!r}: there are {', '.join(KINDS)}")
    shared: dict[str, Any] = {
        "limits": tiny.LIMITS, "max_tokens": networks.MAX_TOKENS, "calibration": PROMPTS[:1], "judging": PROMPTS[1:2]
    }  # fmt: skip
    if kind == "t2v":
        return networks.pipeline(networks.TINY), wan.Serving(**shared), None
    torch.manual_seed(0)
    image = kind.startswith("i2v")
    parts: dict[str, Any] = {
        "tokenizer": networks.tokenizer(networks.TINY),
        "text_encoder": networks.text_encoder(networks.TINY).eval(),
        "vae": networks.vae(networks.TINY).eval(),
        "scheduler": networks.scheduler(),
    }
    channels = {"in_channels": 36} if image else {}
    if image:
        shared |= {"limits": replace(tiny.LIMITS, image="required")}
        shared |= {"calibration_images": ("start.png",), "judging_images": ("start.png",)}
    if kind.endswith("a14b"):
        pipeline = WanImageToVideoPipeline if image else WanPipeline
        served = wan.ImageExpertsServing if image else wan.ExpertsServing
        pipe = pipeline(
            **parts,
            transformer=_transformer(**channels),
            transformer_2=_transformer(**channels),
            boundary_ratio=BOUNDARY,
        )
        return pipe, served(**shared), _drawn() if image else None
    if kind == "ti2v-5b":
        parts["vae"] = _vae_of_48_channels()
        shared |= {"limits": TI2V_LIMITS, "calibration_images": ("start.png",), "judging_images": (None,)}
        pipe = WanPipeline(**parts, transformer=_transformer(in_channels=48, out_channels=48), expand_timesteps=True)
        return pipe, wan.TextImageServing(**shared), _drawn()
    seeing = CLIPVisionConfig(
        hidden_size=16, projection_dim=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    pipe = WanImageToVideoPipeline(
        **parts,
        image_processor=CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        image_encoder=CLIPVisionModel(seeing).eval(),
        transformer=_transformer(**channels, image_dim=16, added_kv_proj_dim=24),
    )
    return pipe, wan.ImageServing(**shared | {"max_tokens": wan.TEXT_TOKENS}), _drawn()


def _transformer(**change: Any) -> WanTransformer3DModel:
    given = {k: v for k, v in networks.transformer(networks.TINY).config.items() if not k.startswith("_")}
    return tiny.stirred(WanTransformer3DModel(**given | change))


def _vae_of_48_channels() -> AutoencoderKLWan:
    """As Wan 2.2's: 16x16 in space and 4 in time."""
    return AutoencoderKLWan(
        base_dim=4, decoder_base_dim=8, z_dim=48, dim_mult=[1, 2, 2, 2], num_res_blocks=1,
        temperal_downsample=[False, True, True], is_residual=True, patch_size=2, in_channels=12, out_channels=12,
        scale_factor_spatial=16, latents_mean=[0.0] * 48, latents_std=[1.0] * 48,
    ).eval()  # fmt: skip


def _drawn() -> Image.Image:
    """A picture of a shape that no film has."""
    y, x = np.mgrid[0:60, 0:110] / 60
    ball = (x - 1.1) ** 2 + (y - 0.4) ** 2 < 0.06
    return Image.fromarray((np.stack([np.where(ball, 0.9, 0.2 * x), 0.5 * y, 1 - y], -1) * 255).astype(np.uint8))
