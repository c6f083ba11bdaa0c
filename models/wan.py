"""Wan (arXiv:2503.20314) in diffusers' layout: text to video.

The linear layers of its blocks shrink, its self-attention goes sparse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import WanPipeline, WanTransformer3DModel
from torch import Tensor

from models import video
from models.base import VideoInputs, VideoLimits
from models.video import PROMPTS, PipelineFamily, VideoModel, rotated, write_serving
from quant_runtime.attention import attend
from quant_runtime.sparsity.base import TokenLayout

WAN_LIMITS = VideoLimits(
    size_multiple=16, max_pixels=1280 * 720, max_side=1280, max_frames=81, width=832, height=480, frames=81, fps=16,
    steps=50, guidance=5.0,
)  # fmt: skip


class Serving(video.Serving):
    """The defaults are Wan 2.1's."""

    limits: video.Limits = WAN_LIMITS
    max_tokens: video.Tokens = 512


class SelfAttention:
    """diffusers' processor of `attn1`, with our attention. Dense and unquantized it computes what theirs does."""

    def __init__(self, layer: int, model: WanModel) -> None:
        self.layer, self.model = layer, model

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        q, k, v = self.model.projected(attn, hidden_states)
        assert rotary_emb is not None
        q, k = (rotated(x.unflatten(2, (attn.heads, -1)), *rotary_emb) for x in (attn.norm_q(q), attn.norm_k(k)))
        v = v.unflatten(2, (attn.heads, -1))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = attend(q, k, v, layer=self.layer, layout=self.model.layout, state=self.model.attention)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


class WanModel(VideoModel):
    blocks = ("blocks.",)
    processor = SelfAttention

    def attentions(self) -> Mapping[str, Any]:
        return {f"blocks.{i}.attn1": block.attn1 for i, block in enumerate(self.network.blocks)}

    def shared(self) -> list[Sequence[str]]:
        text = [[f"blocks.{i}.attn2.to_{x}" for x in "kv"] for i in range(len(self.network.blocks))]
        return [*super().shared(), *text]

    def enter(self, given: dict[str, Any]) -> dict[str, Any]:
        sizes = zip(given["hidden_states"].shape[2:], self.network.config.patch_size, strict=True)
        frames, height, width = (n // p for n, p in sizes)
        self.layout = TokenLayout(frames, height, width)
        return given

    def asked(self, inputs: VideoInputs) -> dict[str, Any]:
        prompt, negative = self.pipe.encode_prompt(
            inputs.prompt,
            inputs.negative_prompt,
            do_classifier_free_guidance=inputs.guidance > 1,
            max_sequence_length=self.serving.max_tokens,
        )
        return {"prompt_embeds": prompt, "negative_prompt_embeds": negative, "guidance_scale": inputs.guidance}


ORIGINALS = (
    (r"(blocks\.\d+)\.attn1\.to_([qkv])", r"\1.self_attn.\2"),
    (r"(blocks\.\d+)\.attn1\.to_out\.0", r"\1.self_attn.o"),
    (r"(blocks\.\d+)\.attn2\.to_([qkv])", r"\1.cross_attn.\2"),
    (r"(blocks\.\d+)\.attn2\.add_([kv])_proj", r"\1.cross_attn.\2_img"),
    (r"(blocks\.\d+)\.attn2\.to_out\.0", r"\1.cross_attn.o"),
    (r"(blocks\.\d+)\.ffn\.net\.0\.proj", r"\1.ffn.0"),
    (r"(blocks\.\d+)\.ffn\.net\.2", r"\1.ffn.2"),
    (r"(blocks\.\d+)\.norm2", r"\1.norm3"),
    (r"(blocks\.\d+)\.attn1\.norm_([qk])", r"\1.self_attn.norm_\2"),
    (r"(blocks\.\d+)\.attn2\.norm_([qk])", r"\1.cross_attn.norm_\2"),
    (r"(blocks\.\d+)\.attn2\.norm_added_k", r"\1.cross_attn.norm_k_img"),
    (r"condition_embedder\.(text|time)_embedder\.linear_1", r"\1_embedding.0"),
    (r"condition_embedder\.(text|time)_embedder\.linear_2", r"\1_embedding.2"),
    (r"condition_embedder\.time_proj", r"time_projection.1"),
    (r"condition_embedder\.image_embedder\.norm1", r"img_emb.proj.0"),
    (r"condition_embedder\.image_embedder\.ff\.net\.0\.proj", r"img_emb.proj.1"),
    (r"condition_embedder\.image_embedder\.ff\.net\.2", r"img_emb.proj.3"),
    (r"condition_embedder\.image_embedder\.norm2", r"img_emb.proj.4"),
    (r"proj_out", r"head.head"),
)


class Wan(PipelineFamily[WanModel]):
    """diffusers' WanPipeline folders."""

    name = "wan"
    originals = ORIGINALS
    pipeline = WanPipeline
    transformer = WanTransformer3DModel
    model = WanModel
    serving = Serving

    def check(self, pipe: Any, folder: Path) -> None:
        if pipe.transformer_2 is not None:
            raise ValueError(f"{folder} has a transformer_2, as Wan 2.2 A14B has: two networks are not run yet")

    def tiny(self, folder: Path) -> None:
        from models import tiny
        from models.demo.video import networks

        tiny.write(networks.pipeline(networks.TINY), folder)
        serving = Serving(
            limits=tiny.LIMITS, max_tokens=networks.MAX_TOKENS, calibration=PROMPTS[:1], judging=PROMPTS[1:2]
        )
        write_serving(folder, serving)
