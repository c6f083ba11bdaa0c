"""Wan 2.1 and 2.2 (arXiv:2503.20314) in diffusers' layout: films from text, and on from a picture.

One network for most; two experts that take turns in Wan 2.2 A14B, the second for the steps of low noise. The linear
layers of their blocks shrink, their self-attention goes sparse. Attention to text, and to the picture, stays dense.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Self

import pydantic
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from torch import Tensor, nn

from models import start_image, video
from models.base import VideoInputs, VideoLimits
from models.packed_pieces import Packing
from models.video import PROMPTS, PipelineFamily, VideoModel, index, networks, rotated, write_serving
from models.wan_blocks import TEXT_TOKENS, pack_blocks
from quant_runtime.attention import AttentionState, attend
from quant_runtime.sparsity.base import TokenLayout

WAN_LIMITS = VideoLimits(
    size_multiple=16, max_pixels=1280 * 720, max_side=1280, max_frames=81, width=832, height=480, frames=81, fps=16,
    steps=50, guidance=5.0,
)  # fmt: skip
TI2V_LIMITS = VideoLimits(
    size_multiple=32, max_pixels=1280 * 704, max_side=1280, max_frames=121, width=1280, height=704, frames=121, fps=24,
    steps=50, guidance=5.0, image="optional",
)  # fmt: skip


class Serving(video.Serving):
    """The defaults are those of Wan 2.1, text to video."""

    limits: video.Limits = WAN_LIMITS
    max_tokens: video.Tokens = TEXT_TOKENS


class ImageServing(Serving):
    """Of Wan 2.1, image to video: its pictures are those that come along."""

    limits: video.Limits = replace(WAN_LIMITS, steps=40, image="required")
    calibration: video.Prompts = tuple(prompt for prompt, _ in start_image.CALIBRATION)
    judging: video.Prompts = tuple(prompt for prompt, _ in start_image.JUDGING)
    calibration_images: video.Images = tuple(start_image.shipped(name) for _, name in start_image.CALIBRATION)
    judging_images: video.Images = tuple(start_image.shipped(name) for _, name in start_image.JUDGING)


class ExpertsServing(Serving):
    """Of Wan 2.2 A14B, text to video: guidance of 4 while there is much noise, then of 3."""

    limits: video.Limits = replace(WAN_LIMITS, steps=40, guidance=4.0)
    low_noise_guidance: Annotated[float, pydantic.Field(gt=0)] = 0.75  # of the second expert, for 1 of the first


class ImageExpertsServing(ImageServing, ExpertsServing):
    """Of Wan 2.2 A14B, image to video."""

    limits: video.Limits = replace(WAN_LIMITS, steps=40, guidance=3.5, image="required")
    low_noise_guidance: Annotated[float, pydantic.Field(gt=0)] = 1.0


class TextImageServing(Serving):
    """Of Wan 2.2 TI2V-5B: every other film starts from a picture."""

    limits: video.Limits = TI2V_LIMITS
    calibration: video.Prompts = (PROMPTS[0], start_image.CALIBRATION[1][0], PROMPTS[2], start_image.CALIBRATION[3][0])
    judging: video.Prompts = (PROMPTS[4], start_image.JUDGING[1][0], PROMPTS[6], start_image.JUDGING[3][0])
    calibration_images: video.Images = (None, start_image.shipped("rocket"), None, start_image.shipped("coffee"))
    judging_images: video.Images = (None, start_image.shipped("brick"), None, start_image.shipped("hubble_deep_field"))


class SelfAttention:
    """diffusers' processor of `attn1`, with our attention. Dense and unquantized it computes what theirs does."""

    def __init__(self, layer: int, model: WanModel, state: AttentionState) -> None:
        self.layer, self.model, self.state = layer, model, state

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
        out = attend(q, k, v, layer=self.layer, layout=self.model.layout, state=self.state)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


class WanModel(VideoModel):
    blocks = ("blocks.",)
    processor = SelfAttention

    def __init__(self, pipe: Any, serving: video.Serving, device: str) -> None:
        super().__init__(pipe, serving, device)
        self.from_text = self.from_image = pipe
        if (
            pipe.config.expand_timesteps
        ):  # TI2V-5B films from text and from pictures, and is saved as the one or the other
            parts = {name: part for name, part in pipe.components.items() if not name.startswith("image_")}
            self.from_text = WanPipeline(**parts, expand_timesteps=True)
            self.from_image = WanImageToVideoPipeline(**parts, expand_timesteps=True)
            for one in (self.from_text, self.from_image):
                one.set_progress_bar_config(disable=True)

    def denoiser(self, pipe: Any) -> nn.Module:
        if pipe.transformer_2 is None:
            return super().denoiser(pipe)
        return nn.ModuleDict({"transformer": pipe.transformer, "transformer_2": pipe.transformer_2})

    def attentions(self, network: Any) -> Mapping[str, Any]:
        return {f"blocks.{i}.attn1": block.attn1 for i, block in enumerate(network.blocks)}

    def fuse_projections(self) -> None:
        super().fuse_projections()
        for network in networks(self.network).values():
            pack_blocks(network)

    def groups(self, network: Any) -> list[Sequence[str]]:
        pairs = [("to_k", "to_v")] + [("add_k_proj", "add_v_proj")] * (network.config.added_kv_proj_dim is not None)
        context = [[f"blocks.{i}.attn2.{x}" for x in pair] for i in range(len(network.blocks)) for pair in pairs]
        return [*super().groups(network), *context]

    def enter(self, given: dict[str, Any]) -> dict[str, Any]:
        sizes = zip(given["hidden_states"].shape[2:], self.pipe.transformer.config.patch_size, strict=True)
        frames, height, width = (n // p for n, p in sizes)
        self.layout = TokenLayout(frames, height, width)
        return given

    def expected(self, inputs: VideoInputs) -> TokenLayout:
        return TokenLayout(*self.grid(inputs, self.pipe.transformer.config.patch_size))

    def split(self, gated: Mapping[str, Any]) -> Self:
        twin = super().split(gated)
        own = [twin.pipe if one is self.pipe else video.split(one, gated) for one in (self.from_text, self.from_image)]
        twin.from_text, twin.from_image = own
        return twin

    def pipeline(self, inputs: VideoInputs) -> Any:
        return self.from_text if inputs.image is None else self.from_image

    def asked(self, inputs: VideoInputs) -> dict[str, Any]:
        """The second expert's guidance goes with the first's, and is never below 1, which is none."""
        prompt, negative = self.pipe.encode_prompt(
            inputs.prompt,
            inputs.negative_prompt,
            do_classifier_free_guidance=inputs.guidance > 1,
            max_sequence_length=self.serving.max_tokens,
        )
        asked = {"prompt_embeds": prompt, "negative_prompt_embeds": negative, "guidance_scale": inputs.guidance}
        if isinstance(self.serving, ExpertsServing):
            asked["guidance_scale_2"] = max(1.0, inputs.guidance * self.serving.low_noise_guidance)
        if inputs.image is not None:
            asked["image"] = start_image.fitted(inputs.image, inputs.width, inputs.height)
        return asked


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
    """diffusers' WanPipeline and WanImageToVideoPipeline folders."""

    name = "wan"
    originals = ORIGINALS
    pipelines = (WanPipeline, WanImageToVideoPipeline)
    transformer = WanTransformer3DModel
    model = WanModel
    serving = Serving
    packing = Packing(together=True)

    def components(self, folder: Path) -> tuple[str, ...]:
        return ("transformer", "transformer_2") if _has(folder, "transformer_2") else ("transformer",)

    def served(self, folder: Path) -> video.Serving:
        image, given = self._pipeline(folder) is WanImageToVideoPipeline, index(folder)
        if given.get("expand_timesteps"):
            kind: type[video.Serving] = TextImageServing
        elif _has(folder, "transformer_2"):
            kind = ImageExpertsServing if image else ExpertsServing
        else:
            kind = ImageServing if image else Serving
        return kind.read(folder)

    def check(self, folder: Path) -> None:
        super().check(folder)
        image, given = self._pipeline(folder) is WanImageToVideoPipeline, index(folder)
        if _has(folder, "transformer_2") != (given.get("boundary_ratio") is not None):
            raise ValueError(f"{folder}: two experts come with a boundary_ratio in model_index.json, one without")
        serving, wanted = self.served(folder), "required" if image else "none"
        if not given.get("expand_timesteps") and serving.limits.image != wanted:
            raise ValueError(f"{folder / video.SERVING}: limits.image is {wanted} for a {given['_class_name']}")
        for component in self.components(folder):
            config = self.config(folder, component)
            if config.get("pos_embed_seq_len") is not None:
                raise ValueError(f"{folder} takes a first and a last picture, as Wan 2.1 FLF2V: that is not run yet")
            seen = config.get("in_channels", 16)
            made = config.get("out_channels") or seen
            beside = 4 + made if image and not given.get("expand_timesteps") else 0  # a mask, and the picture's latents
            if seen != made + beside:
                raise ValueError(f"{folder}/{component} has {seen} input channels; {made + beside} are run here")
            if config.get("image_dim") is not None and not _has(folder, "image_encoder"):
                raise ValueError(f"{folder}/{component} is shown what an image_encoder sees, and there is none")
            if config.get("image_dim") is not None and serving.max_tokens != TEXT_TOKENS:
                raise ValueError(f"{folder / video.SERVING}: max_tokens is {TEXT_TOKENS} in a model with image_encoder")

    def dtypes(self, around: torch.dtype, half: torch.dtype) -> dict[str, torch.dtype]:
        """The image encoder in float32, as diffusers' example has it."""
        return super().dtypes(around, half) | {"transformer_2": around, "image_encoder": torch.float32}

    def tiny(self, folder: Path, kind: str = "t2v") -> None:
        """`kind` is one of models.tiny_wan.KINDS."""
        from models import tiny, tiny_wan

        pipe, serving, image = tiny_wan.checkpoint(kind)
        tiny.write(pipe, folder)
        if image is not None:
            image.save(folder / "start.png")
        write_serving(folder, serving)


def _has(folder: Path, part: str) -> bool:
    """Does the pipeline have this optional part? Without, its index says [null, null], or nothing."""
    named = index(folder).get(part)
    return isinstance(named, list) and any(named)
