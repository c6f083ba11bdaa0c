"""CogVideoX (arXiv:2408.06072) in diffusers' layout, 2B and 5B: text to video.

Text stands in front of the video in one attention, and in the same blocks: their linear layers shrink.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from models import video
from models.base import VideoInputs, VideoLimits
from models.cogvideox_blocks import pack_blocks
from models.packed_pieces import Packing
from models.video import PROMPTS, PipelineFamily, VideoModel, rotated, write_serving
from quant_runtime.attention import AttentionState, attend
from quant_runtime.sparsity.base import TokenLayout


class Serving(video.Serving):
    """The defaults are those of CogVideoX 2B and 5B, which were trained on one size."""

    limits: video.Limits = VideoLimits(
        size_multiple=16, max_pixels=720 * 480, max_side=720, max_frames=49, frames_step=8, width=720, height=480,
        frames=49, fps=8, steps=50, guidance=6.0,
    )  # fmt: skip
    max_tokens: video.Tokens = 226


class JointAttention:
    """diffusers' processor of `attn1`, with our attention. Dense and unquantized it computes what theirs does."""

    def __init__(self, layer: int, model: CogVideoXModel, state: AttentionState) -> None:
        self.layer, self.model, self.state = layer, model, state

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        text = encoder_hidden_states.shape[1]
        both = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        q, k, v = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in self.model.projected(attn, both))
        q, k = attn.norm_q(q), attn.norm_k(k)
        if image_rotary_emb is not None:  # 2B adds its places to the tokens, 5B turns queries and keys by them
            q, k = (torch.cat([x[:, :, :text], rotated(x[:, :, text:], *image_rotary_emb)], dim=2) for x in (q, k))
        out = attend(q, k, v, layer=self.layer, layout=self.model.layout, state=self.state)
        read, seen = attn.to_out[0](out.transpose(1, 2).flatten(2)).tensor_split([text], dim=1)
        return seen, read


class CogVideoXModel(VideoModel):
    """Latents are float32 between the steps, as those of the other families are, whatever the network computes in.

    diffusers keeps them in the prompt's dtype and draws noise in it: perhaps other noise of one seed than in 32 bits.
    """

    processor = JointAttention

    def __init__(self, pipe: Any, serving: video.Serving, device: str) -> None:
        super().__init__(pipe, serving, device)
        if pipe.vae is not None:  # a network that is measured comes without
            decode = pipe.vae.decode
            pipe.vae.decode = lambda latents, *args, **kwargs: decode(latents.to(pipe.vae.dtype), *args, **kwargs)

    def attentions(self, network: Any) -> Mapping[str, Any]:
        return {f"transformer_blocks.{i}.attn1": block.attn1 for i, block in enumerate(network.transformer_blocks)}

    def fuse_projections(self) -> None:
        super().fuse_projections()
        pack_blocks(self.network)

    def enter(self, given: dict[str, Any]) -> dict[str, Any]:
        """All text takes part, padding too: the network was trained so."""
        frames, _, height, width = given["hidden_states"].shape[1:]
        patch, text = self.network.config.patch_size, given["encoder_hidden_states"].shape[1]
        self.layout = TokenLayout(frames, height // patch, width // patch, text=text, text_first=True)
        own = {name: given[name].to(self.network.dtype) for name in ("hidden_states", "encoder_hidden_states")}
        return given | own

    def expected(self, inputs: VideoInputs) -> TokenLayout:
        patch = self.network.config.patch_size
        return TokenLayout(*self.grid(inputs, (1, patch, patch)), text=self.serving.max_tokens, text_first=True)

    def passes(self, inputs: VideoInputs) -> int:
        """With and without the prompt go in one batch."""
        return 1

    def asked(self, inputs: VideoInputs) -> dict[str, Any]:
        prompt, negative = self.pipe.encode_prompt(
            inputs.prompt,
            inputs.negative_prompt,
            do_classifier_free_guidance=inputs.guidance > 1,
            max_sequence_length=self.serving.max_tokens,
        )
        return {
            "prompt_embeds": prompt.float(),
            "negative_prompt_embeds": None if negative is None else negative.float(),
            "guidance_scale": inputs.guidance,
            "use_dynamic_cfg": isinstance(self.pipe.scheduler, CogVideoXDPMScheduler),  # as the model's authors run it
        }


class CogVideoX(PipelineFamily[CogVideoXModel]):
    """diffusers' CogVideoXPipeline folders."""

    name = "cogvideox"
    sample = TokenLayout(5, 10, 12, text=17, text_first=True)
    packing = Packing(bias=True, two=True)
    pipelines = (CogVideoXPipeline,)
    transformer = CogVideoXTransformer3DModel
    model = CogVideoXModel
    serving = Serving

    def check(self, folder: Path) -> None:
        super().check(folder)
        if self.config(folder, self.component).get("patch_size_t") is not None:
            raise ValueError(f"{folder} joins frames in patches, as CogVideoX 1.5 does: 2B and 5B are run, 1.5 not yet")

    def settle(self, pipe: Any) -> None:
        pipe.vae.enable_tiling()  # decoded at once, a film of the default size takes more memory than it was made in

    def dtypes(self, around: torch.dtype, half: torch.dtype) -> dict[str, torch.dtype]:
        """One for all parts."""
        return {"default": around}

    def tiny(self, folder: Path) -> None:
        from models import tiny

        torch.manual_seed(0)
        tokenizer, max_tokens = tiny.byte_pairs(PROMPTS, vocabulary=420), 40
        text = T5Config(
            vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
            feed_forward_proj="gated-gelu", dropout_rate=0.0, pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
        pipe = CogVideoXPipeline(
            tokenizer=tokenizer,
            text_encoder=T5EncoderModel(text).eval(),
            transformer=tiny.stirred(
                CogVideoXTransformer3DModel(
                    num_attention_heads=2,
                    attention_head_dim=16,
                    in_channels=4,
                    out_channels=4,
                    time_embed_dim=16,
                    text_embed_dim=16,
                    num_layers=2,
                    sample_width=12,
                    sample_height=8,
                    sample_frames=9,
                    max_text_seq_length=max_tokens,
                    use_rotary_positional_embeddings=True,
                )
            ),
            vae=AutoencoderKLCogVideoX(
                latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
                scaling_factor=0.7,
            ).eval(),
            scheduler=CogVideoXDDIMScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
                rescale_betas_zero_snr=True, snr_shift_scale=1.0, timestep_spacing="trailing", clip_sample=False,
            ),
        )  # fmt: skip
        tiny.write(pipe, folder)
        limits = replace(tiny.LIMITS, frames_step=8)
        serving = Serving(limits=limits, max_tokens=max_tokens, calibration=PROMPTS[:1], judging=PROMPTS[1:2])
        write_serving(folder, serving)
