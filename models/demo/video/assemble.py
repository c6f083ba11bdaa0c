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

from models.demo.video import networks


def assemble(vae: Path, dit: Path, out: Path) -> None:
    sizes = networks.DEMO
    transformer = networks.transformer(sizes)
    state = {}
    for part in sorted(dit.glob("transformer-*.safetensors")):
        state |= load_file(part)
    transformer.load_state_dict(state)
    text_encoder = networks.text_encoder(sizes)
    words = load_file(dit / "text_encoder.safetensors")
    text_encoder.load_state_dict(words | {"encoder.embed_tokens.weight": words["shared.weight"]})
    pipeline = WanPipeline(
        tokenizer=networks.tokenizer(sizes),
        text_encoder=text_encoder.to(torch.bfloat16),
        vae=AutoencoderKLWan.from_pretrained(vae, dtype=torch.float16),
        scheduler=networks.scheduler(),
        transformer=transformer.to(torch.bfloat16),
    )
    shutil.rmtree(out, ignore_errors=True)
    pipeline.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("vae", "dit", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    given = parser.parse_args()
    assemble(given.vae, given.dit, given.out)
