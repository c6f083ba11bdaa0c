"""Sharpen a trained autoencoder's decoder, its latents as they are.

    python -m models.demo.video.refine_decoder --start DIR --out DIR --seconds 1500

The encoder stays, so a transformer trained on its latents stays valid. What an L1 loss leaves soft, the edges of what
moves, is asked for by name: each crop's gradient energies, in space and in time, are to be those of the rendered clip.
Crops are cut around the moving object. What is written lies between the decoder before and after (`share`): the whole
way sharpens still parts too much.
"""

from __future__ import annotations

import argparse
import contextlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from models.demo.training import Average, Clock, Curve
from models.demo.video import captions, render, train_vae, whole_clip
from quant_runtime.kernels._cpu import cpu_has_bfloat16

BORDER = 16  # pixels at a crop's edge that do not count: there the decoder sees zeros where a whole clip goes on


@dataclass(frozen=True)
class Recipe:
    clips: int = 384  # rendered and encoded beforehand
    frames: int = 17
    height: int = 192
    width: int = 320
    crop: int = 96
    batch: int = 6
    rate: float = 4e-4
    energy: float = 0.15  # weight of the energies beside train_vae's losses
    share: float = 0.3  # of the way from the decoder before to the decoder after
    measured: train_vae.Recipe = field(default_factory=train_vae.Recipe)  # whose held-out clips it is measured on
    seed: int = 7


def energy_gap(got: Tensor, want: Tensor) -> Tensor:
    """How far apart the logarithms of each clip's gradient energies lie, over space and time; [B, 3, T, H, W]."""
    gap = torch.zeros((), device=got.device)
    for axis in (-1, -2, 2):
        a, b = (x.diff(dim=axis).square().mean(dim=(1, 2, 3, 4)) for x in (got, want))
        gap = gap + ((a + 1e-5) / (b + 1e-5)).log().abs().mean()
    return gap / 3


def refine(recipe: Recipe, start: Path, seconds: float, out: Path, device: str, steps: int | None = None) -> None:
    """Writes `out/vae`. `steps` ends it earlier (for tests)."""
    torch.manual_seed(recipe.seed)
    vae = AutoencoderKLWan.from_pretrained(start).float().to(device)
    for p in vae.parameters():
        if p.dim() == 5:
            p.data = p.data.contiguous(memory_format=torch.channels_last_3d)
    half = contextlib.nullcontext if device == "cpu" and not cpu_has_bfloat16() else _autocast(device)
    clips = captions.sample(recipe.clips, recipe.seed)
    videos, latents = [], []
    with torch.no_grad(), half():
        for i in range(recipe.clips):
            video = render.render(clips[slice(i, i + 1)], recipe.frames, recipe.height, recipe.width, device)
            latents.append(whole_clip.encode(vae, video)[0].float())
            videos.append(((video + 1) * 127.5).round().to(torch.uint8))
    learns = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    optimizer = torch.optim.AdamW(learns, lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.0)
    average = Average(learns, 0.995)
    before = [p.detach().clone() for p in learns]
    clock = Clock(seconds, warm=0.02, cool=0.5)
    curve = Curve(out / "curve.jsonl", clock)
    scale = torch.cat(latents).std()
    step = 0
    sums = torch.zeros(2)
    while clock.progress < 1 and (steps is None or step < steps):
        rows = torch.randint(recipe.clips, (recipe.batch,)).tolist()
        pairs = [_crop(clips, row, videos[row], latents[row], recipe) for row in rows]
        want = torch.cat([p for p, _ in pairs]).float().div(127.5).sub(1)
        z = torch.cat([q for _, q in pairs])
        shake = 0.1 * scale * (torch.arange(recipe.batch, device=device) % 2)[:, None, None, None, None]
        with half():
            got = whole_clip.decode(
                vae, (z + shake * torch.randn_like(z)).contiguous(memory_format=torch.channels_last_3d)
            )
        inner = (..., slice(BORDER, -BORDER), slice(BORDER, -BORDER))
        got, want = got.float()[inner], want[inner]
        pixels, gap = train_vae.losses(got, want), energy_gap(got, want)
        optimizer.zero_grad(set_to_none=True)
        (pixels + recipe.energy * gap).backward()
        torch.nn.utils.clip_grad_norm_(learns, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * clock.rate
        optimizer.step()
        average.update()
        sums += torch.stack((pixels.detach(), gap.detach())).cpu()
        step += 1
        if step % 50 == 0:
            curve.write(step=step, pixels=float(sums[0]) / 50, energy_gap=float(sums[1]) / 50)
            sums.zero_()
    torch._foreach_lerp_(average.mean, before, 1 - recipe.share)
    config = vae.config  # a transformer was trained on latents of this mean and spread
    kept = (config.latents_mean, config.latents_std)
    train_vae.save(vae, average, recipe.measured, out, device, curve, kept)


def _crop(clips: captions.Clips, row: int, video: Tensor, latents: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """A crop around where the moving object is at some moment, in pixels and in latents, both on the 8x8 grid."""
    moment = torch.rand(())
    at = (clips.start[row, 0] + moment * clips.travel[row]) * recipe.height / 8
    size = recipe.crop // 8
    aside = (torch.rand(2) - 0.5) * size * 0.5
    left, top = (
        int((at[i] - size / 2 + aside[i]).round().clamp(0, full // 8 - size))
        for i, full in enumerate((recipe.width, recipe.height))
    )
    pixels = video[..., top * 8 : (top + size) * 8, left * 8 : (left + size) * 8]
    return pixels, latents[..., top : top + size, left : left + size]


def _autocast(device: str):
    return lambda: torch.autocast(device.split(":")[0], torch.bfloat16)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--start", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    refine(Recipe(), given.start, given.seconds, given.out, given.device)
