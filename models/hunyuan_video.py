"""HunyuanVideo (arXiv:2412.03603) in diffusers' layout: text to video.

Video and text go through one attention: 20 blocks with weights of their own for each, then 40 with one set for both.
The linear layers of these blocks shrink; the text refiner, which is small, does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE as TEMPLATE
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

from models import video
from models.base import BadInput, VideoInputs, VideoLimits
from models.hunyuan_video_blocks import pack_blocks
from models.packed_pieces import Packing
from models.video import PROMPTS, PipelineFamily, VideoModel, rotated, write_serving
from quant_runtime.attention import AttentionState, attend
from quant_runtime.sparsity.base import TokenLayout


class Serving(video.Serving):
    """The defaults are those of the 13B checkpoint."""

    limits: video.Limits = VideoLimits(
        size_multiple=16, max_pixels=1280 * 720, max_side=1280, max_frames=129, width=960, height=544, frames=129,
        fps=24, steps=50, guidance=6.0,
    )  # fmt: skip
    max_tokens: video.Tokens = 256


class JointAttention:
    """diffusers' processor, with our attention. Dense and unquantized it computes what theirs does.

    The mask is not needed: HunyuanVideoModel.enter has cut off what it would hide.
    """

    def __init__(self, layer: int, model: HunyuanVideoModel, state: AttentionState) -> None:
        self.layer, self.model, self.state = layer, model, state

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        text = encoder_hidden_states.shape[1]
        if attn.added_kv_proj_dim is not None:
            parts = self._heads(attn, hidden_states, "fused_qkv", attn.norm_q, attn.norm_k)
            words = self._heads(attn, encoder_hidden_states, "fused_added_qkv", attn.norm_added_q, attn.norm_added_k)
        else:
            both = torch.cat([hidden_states, encoder_hidden_states], dim=1)
            joint = self._heads(attn, both, "fused_qkv", attn.norm_q, attn.norm_k)
            parts, words = zip(*(x.tensor_split([-text], dim=2) for x in joint), strict=True)
        assert image_rotary_emb is not None
        q, k = (rotated(x, *image_rotary_emb) for x in parts[:2])
        q, k, v = (torch.cat(pair, dim=2) for pair in zip((q, k, parts[2]), words, strict=True))
        out = attend(q, k, v, layer=self.layer, layout=self.model.layout, state=self.state)
        seen, read = out.transpose(1, 2).flatten(2).tensor_split([-text], dim=1)
        if attn.added_kv_proj_dim is None:
            return seen, read  # the block has one projection for these and for its MLP
        return attn.to_out[0](seen), attn.to_add_out(read)

    def _heads(self, attn: Any, x: Tensor, fused: str, norm_q: Any, norm_k: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, H, N, D] of x [B, N, C]."""
        q, k, v = (y.unflatten(2, (attn.heads, -1)).transpose(1, 2) for y in self.model.projected(attn, x, fused))
        return norm_q(q), norm_k(k), v


class HunyuanVideoModel(VideoModel):
    blocks = ("transformer_blocks.", "single_transformer_blocks.")
    projections: ClassVar[Mapping[str, Sequence[str]]] = {
        **VideoModel.projections,
        "fused_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    }
    processor = JointAttention

    def attentions(self, network: Any) -> Mapping[str, Any]:
        stacks = ("transformer_blocks", "single_transformer_blocks")
        blocks = {f"{stack}.{i}": block for stack in stacks for i, block in enumerate(getattr(network, stack))}
        return {f"{name}.attn": block.attn for name, block in blocks.items()}

    def fuse_projections(self) -> None:
        super().fuse_projections()
        pack_blocks(self.network)

    def enter(self, given: dict[str, Any]) -> dict[str, Any]:
        """Text that is only padding is cut off, as the mask would hide it from all that is kept: nothing else changes.

        Refuses padding in front, and a batch whose texts differ in length.
        """
        mask = given["encoder_attention_mask"]
        text = int(mask[0].sum(dtype=torch.int))  # not in the mask's own 16-bit floats, which count to 256
        if not bool((mask[:, :text] == 1).all()) or bool(mask[:, text:].any()):
            raise ValueError("texts of a batch have one length, with padding after them; got another attention mask")
        config = self.network.config
        frames, height, width = given["hidden_states"].shape[2:]
        self.layout = TokenLayout(
            frames // config.patch_size_t, height // config.patch_size, width // config.patch_size, text=text
        )
        words = given["encoder_hidden_states"][:, :text]
        return given | {"encoder_hidden_states": words, "encoder_attention_mask": mask[:, :text]}

    def expected(self, inputs: VideoInputs) -> TokenLayout:
        config = self.network.config
        patch = (config.patch_size_t, config.patch_size, config.patch_size)
        return TokenLayout(*self.grid(inputs, patch), text=self.serving.max_tokens)

    def sequences(self, inputs: VideoInputs) -> int:
        return 1 if self.network.config.guidance_embeds else super().sequences(inputs)

    def tokens(self, prompt: str) -> int:
        """The prompt stands in a template, whose beginning the text encoder reads and the network does not see."""
        return super().tokens(TEMPLATE["template"].format(prompt)) - TEMPLATE["crop_start"]

    def check(self, inputs: VideoInputs) -> None:
        super().check(inputs)
        if inputs.negative_prompt and self.network.config.guidance_embeds:
            message = "this checkpoint has learned its guidance and takes no negative prompt; leave it out"
            raise BadInput("negative_prompt", message)

    def passes(self, inputs: VideoInputs) -> int:
        return 1 if self.network.config.guidance_embeds else super().passes(inputs)

    def asked(self, inputs: VideoInputs) -> dict[str, Any]:
        """A checkpoint that has not learned its guidance is guided by two passes a step."""
        asked = self._encoded(inputs.prompt)
        if self.network.config.guidance_embeds:
            return asked | {"guidance_scale": inputs.guidance}
        away = {f"negative_{name}": value for name, value in self._encoded(inputs.negative_prompt).items()}
        return asked | away | {"true_cfg_scale": inputs.guidance}

    def _encoded(self, prompt: str) -> dict[str, Tensor]:
        embeds, pooled, mask = self.pipe.encode_prompt(prompt, max_sequence_length=self.serving.max_tokens)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "prompt_attention_mask": mask}


_DOUBLE, _SINGLE = r"transformer_blocks\.(\d+)\.", r"single_transformer_blocks\.(\d+)\."
ORIGINALS = (  # those in the blocks: where several are one there, their rows lie in this order
    *((rf"{_DOUBLE}attn\.to_{x}", r"double_blocks.\1.img_attn_qkv") for x in "qkv"),
    *((rf"{_DOUBLE}attn\.add_{x}_proj", r"double_blocks.\1.txt_attn_qkv") for x in "qkv"),
    (rf"{_DOUBLE}attn\.to_out\.0", r"double_blocks.\1.img_attn_proj"),
    (rf"{_DOUBLE}attn\.to_add_out", r"double_blocks.\1.txt_attn_proj"),
    (rf"{_DOUBLE}norm1\.linear", r"double_blocks.\1.img_mod.linear"),
    (rf"{_DOUBLE}norm1_context\.linear", r"double_blocks.\1.txt_mod.linear"),
    (rf"{_DOUBLE}ff\.net\.0\.proj", r"double_blocks.\1.img_mlp.fc1"),
    (rf"{_DOUBLE}ff\.net\.2", r"double_blocks.\1.img_mlp.fc2"),
    (rf"{_DOUBLE}ff_context\.net\.0\.proj", r"double_blocks.\1.txt_mlp.fc1"),
    (rf"{_DOUBLE}ff_context\.net\.2", r"double_blocks.\1.txt_mlp.fc2"),
    *((rf"{_SINGLE}attn\.to_{x}", r"single_blocks.\1.linear1") for x in "qkv"),
    (rf"{_SINGLE}proj_mlp", r"single_blocks.\1.linear1"),
    (rf"{_SINGLE}proj_out", r"single_blocks.\1.linear2"),
    (rf"{_SINGLE}norm\.linear", r"single_blocks.\1.modulation.linear"),
)


class HunyuanVideo(PipelineFamily[HunyuanVideoModel]):
    """diffusers' HunyuanVideoPipeline folders."""

    name = "hunyuan_video"
    originals = ORIGINALS
    pipelines = (HunyuanVideoPipeline,)
    transformer = HunyuanVideoTransformer3DModel
    model = HunyuanVideoModel
    serving = Serving
    sample = TokenLayout(5, 10, 12, text=17)
    packing = Packing(others=True, narrow=True)

    def check(self, folder: Path) -> None:
        super().check(folder)
        if self.config(folder, self.component).get("image_condition_type") is not None:
            raise ValueError(f"{folder} takes a start image: of HunyuanVideo only text to video is run yet")

    def settle(self, pipe: Any) -> None:
        pipe.vae.enable_tiling()  # a film of 720p takes more memory at once than a GPU has

    def tiny(self, folder: Path) -> None:
        from models import tiny

        torch.manual_seed(0)
        tokenizer = tiny.byte_pairs([TEMPLATE["template"], *PROMPTS], vocabulary=700)
        text: dict[str, Any] = {
            "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3,
            "num_attention_heads": 2, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None,
        }  # fmt: skip
        pipe = HunyuanVideoPipeline(
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            text_encoder=LlamaModel(LlamaConfig(**text, pad_token_id=tokenizer.pad_token_id)).eval(),
            text_encoder_2=CLIPTextModel(CLIPTextConfig(**text)).eval(),
            transformer=tiny.stirred(
                HunyuanVideoTransformer3DModel(
                    in_channels=4,
                    out_channels=4,
                    num_attention_heads=2,
                    attention_head_dim=16,
                    num_layers=1,
                    num_single_layers=2,
                    num_refiner_layers=1,
                    text_embed_dim=16,
                    pooled_projection_dim=16,
                    rope_axes_dim=(4, 6, 6),
                )
            ),
            vae=AutoencoderKLHunyuanVideo(
                latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
            ).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        )
        tiny.write(pipe, folder)
        serving = Serving(limits=tiny.LIMITS, max_tokens=128, calibration=PROMPTS[:1], judging=PROMPTS[1:2])
        write_serving(folder, serving)
