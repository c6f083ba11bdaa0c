"""The video demo model's parts and their sizes: a WanPipeline in small, and one of a few kilobytes for tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from models import tiny
from models.demo.video import captions

FLOW_SHIFT = 3.0
MAX_TOKENS = 64  # a caption of the grammar has at most 40; longer prompts are cut there


@dataclass(frozen=True)
class Sizes:
    heads: int = 2
    head_dim: int = 128
    layers: int = 8
    ffn: int = 768
    text_width: int = 128
    text_layers: int = 2
    vae_base: int = 16
    vae_mult: tuple[int, ...] = (1, 2, 4)
    vocabulary: int = 512


DEMO = Sizes()
TINY = Sizes(heads=2, head_dim=12, layers=2, ffn=32, text_width=16, text_layers=1, vae_base=4, vae_mult=(1, 1, 2))


def vae(sizes: Sizes, mean: list[float] | None = None, std: list[float] | None = None) -> AutoencoderKLWan:
    """8x8 in space and 4 in time, 16 channels: patches of 2x2 pixels first, then two halvings."""
    return AutoencoderKLWan(
        base_dim=sizes.vae_base,
        dim_mult=list(sizes.vae_mult),
        num_res_blocks=2,
        temperal_downsample=[True] * (len(sizes.vae_mult) - 1),
        patch_size=2,
        in_channels=12,
        out_channels=12,
        z_dim=16,
        latents_mean=mean or [0.0] * 16,
        latents_std=std or [1.0] * 16,
    )


def transformer(sizes: Sizes) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=sizes.heads,
        attention_head_dim=sizes.head_dim,
        in_channels=16,
        out_channels=16,
        text_dim=sizes.text_width,
        freq_dim=256,
        ffn_dim=sizes.ffn,
        num_layers=sizes.layers,
        cross_attn_norm=True,
        rope_max_seq_len=64,
    )


def text_encoder(sizes: Sizes) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=sizes.vocabulary,
        d_model=sizes.text_width,
        d_kv=min(64, sizes.text_width // 2),
        d_ff=2 * sizes.text_width,
        num_layers=sizes.text_layers,
        num_heads=2,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=64,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
    )
    return UMT5EncoderModel(config)


def tokenizer(sizes: Sizes) -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges from the caption grammar: a word of it is one token, any other text its bytes."""
    return tiny.byte_pairs(captions.describe(captions.sample(4000, seed=1), seed=1), sizes.vocabulary)


def scheduler() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(
        num_train_timesteps=1000, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT
    )


def pipeline(sizes: Sizes, seed: int = 0) -> WanPipeline:
    """A whole pipeline with random weights."""
    torch.manual_seed(seed)
    return WanPipeline(
        tokenizer=tokenizer(sizes),
        text_encoder=text_encoder(sizes).eval(),
        vae=vae(sizes).eval(),
        scheduler=scheduler(),
        transformer=transformer(sizes).eval(),
    )
