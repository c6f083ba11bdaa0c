"""AutoencoderKLWan on a whole clip at once: what diffusers computes chunk by chunk with a feature cache, in one pass.

One pass can be differentiated, compiled and batched; training needs all three. Equal to `vae.encode` and `vae.decode`
to rounding (the test says so). Only the two temporal resamplings depend on the chunks: the first frame is a chunk of
its own there, skipped by the strided convolution on the way down, and on the way up neither doubled nor seen by the
frames after it.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, patchify, unpatchify
from torch import Tensor, nn


def encode(vae: AutoencoderKLWan, video: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance [B, z, 1 + (T-1)/4, H/8, W/8] of video [B, 3, T, H, W], T = 4n + 1."""
    x = patchify(video, vae.config.patch_size or 1)
    encoder = vae.encoder
    x = encoder.conv_in(x)
    for block in encoder.down_blocks:
        x = _resample(block, x) if isinstance(block, WanResample) else block(x)
    x = encoder.mid_block(x)
    x = encoder.conv_out(encoder.nonlinearity(encoder.norm_out(x)))
    mean, log_variance = vae.quant_conv(x).chunk(2, dim=1)
    return mean, log_variance


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Video [B, 3, T, H, W], not clamped, of latents as the VAE made them (not normalized)."""
    decoder = vae.decoder
    x = decoder.conv_in(vae.post_quant_conv(latents))
    x = decoder.mid_block(x)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = resnet(x)
        for upsampler in block.upsamplers or ():
            x = _resample(upsampler, x)
    x = decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x)))
    return unpatchify(x, vae.config.patch_size or 1)


def _resample(layer: nn.Module, x: Tensor) -> Tensor:
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        rest = layer.time_conv(x[:, :, 1:])
        b, _, t, h, w = rest.shape
        rest = rest.reshape(b, 2, -1, t, h, w).permute(0, 2, 3, 1, 4, 5).reshape(b, -1, 2 * t, h, w)
        x = torch.cat((x[:, :, :1], rest), dim=2)
    x = layer(x)  # without a cache: in space alone
    if layer.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat((x[:, :, :1], layer.time_conv(x)), dim=2)
    return x
