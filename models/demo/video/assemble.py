"""Put a trained autoencoder, transformer and text encoder together as one diffusers folder.

    python -m models.demo.video.assemble --vae DIR --dit DIR --out models/demo/video/checkpoint

`DIR`s are what train_vae and train_dit wrote. Weights stay in the 16-bit types they were saved in.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanPipeline
from safetensors.torch import load_file

from models import video
from models.base import VideoLimits
from models.demo.video import captions, networks
from models.wan import Serving


def assemble(vae: Path, dit: Path, out: Path) -> None:
    sizes = networks.DEMO
    transformer = networks.transformer(sizes)
    state: dict[str, torch.Tensor] = {}
    for part in sorted(dit.glob("transformer-*.safetensors")):
        state |= load_file(part)
    transformer.load_state_dict(state)
    text_encoder = networks.text_encoder(sizes)
    words = load_file(dit / "text_encoder.safetensors")
    text_encoder.load_state_dict(words | {"encoder.embed_tokens.weight": words["shared.weight"]})
    trained = AutoencoderKLWan.from_pretrained(vae)
    autoencoder = networks.vae(sizes, trained.config.latents_mean, trained.config.latents_std)
    autoencoder.load_state_dict(trained.state_dict())  # anew: the trained one's config would say which folder it was in
    pipeline = WanPipeline(
        tokenizer=networks.tokenizer(sizes),
        text_encoder=text_encoder.to(torch.bfloat16),
        vae=autoencoder.to(torch.float16),
        scheduler=networks.scheduler(),
        transformer=transformer.to(torch.bfloat16),
    )
    shutil.rmtree(out, ignore_errors=True)
    pipeline.save_pretrained(out)
    video.write_serving(out, serving())


def serving() -> Serving:
    """What it was trained on is what it takes: sizes up to its own, prompts of its grammar."""
    held_out = captions.held_out(seed=12)[torch.tensor([3, 20, 37, 54])]
    return Serving(
        limits=VideoLimits(
            size_multiple=16, max_pixels=320 * 192, max_side=320, max_frames=33, max_steps=50, max_prompt=240,
            width=320, height=192, frames=33, fps=16, steps=20, guidance=4.0,
        ),
        max_tokens=networks.MAX_TOKENS,
        calibration=tuple(captions.describe(captions.sample(4, seed=11), seed=11)),
        judging=tuple(captions.describe(held_out, seed=12)),
    )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("vae", "dit", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    given = parser.parse_args()
    assemble(given.vae, given.dit, given.out)
