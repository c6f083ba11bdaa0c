"""Train the video demo's autoencoder: `python -m models.demo.video.train_vae --seconds 300 --out DIR`.

Clips are rendered as it goes. L1 on pixels and on their differences in space (three scales) and time, a little KL,
latents shaken by a tenth of their spread in half of the clips (so that a decoder fed by a sampler is not surprised).
Ends by itself; every minute and at the end the averaged weights are written as a diffusers folder, with the measured
mean and spread of their latents.
"""

from __future__ import annotations

import argparse
import contextlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor

from models.demo.training import Average, Clock, Curve
from models.demo.video import captions, networks, render, whole_clip

MOVING = 6.0
HELD_OUT_SEED = 10**6  # clips of this seed are measured, never trained on


@dataclass(frozen=True)
class Recipe:
    sizes: networks.Sizes = networks.DEMO
    frames: int = 17
    height: int = 192  # of the rendered clip
    width: int = 320
    crop: tuple[int, int] = (128, 160)
    clips: int = 8  # rendered a step; two crops are cut from each
    pool: int = 10**5  # steps after which the clips, not their crops, come again
    rate: float = 2e-3
    kl: float = 1e-4
    seed: int = 0


TINY = Recipe(sizes=networks.TINY, frames=5, height=48, width=80, crop=(48, 80), clips=2, pool=1, rate=1e-2)


def losses(got: Tensor, want: Tensor) -> Tensor:
    """Mean error of values and of differences, float32 [B, 3, T, H, W]; what moves counts up to `MOVING` times more.

    Objects cover a thirtieth of a clip: without the weight their edges would be the last thing that an average learns.
    """
    moves = (want - want.mean(dim=2, keepdim=True)).abs().amax(dim=1, keepdim=True)
    weight = 1 + (MOVING - 1) * (moves / 0.5).clamp(max=1)
    error = got - want
    total = (weight * (error.abs() + 2 * error.square())).mean()
    total = total + (weight[:, :, 1:] * error.diff(dim=2).abs()).mean()
    for scale in (1, 2, 4):
        if scale > 1:
            error, weight = (F.avg_pool3d(x, (1, 2, 2)) for x in (error, weight))
        total = total + (weight[..., 1:] * error.diff(dim=-1).abs()).mean()
        total = total + (weight[..., 1:, :] * error.diff(dim=-2).abs()).mean()
    return total


def train(
    recipe: Recipe, seconds: float, out: Path, device: str, start: Path | None = None, steps: int | None = None
) -> list[float]:
    """Returns the logged losses. `start` is an earlier result to go on from; `steps` ends it earlier (for tests)."""
    torch.manual_seed(recipe.seed)
    cuda = device.startswith("cuda")
    vae = (AutoencoderKLWan.from_pretrained(start) if start else networks.vae(recipe.sizes)).float().to(device).train()
    for p in vae.parameters():
        if p.dim() == 5:
            p.data = p.data.contiguous(memory_format=torch.channels_last_3d)
        elif p.dim() == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=cuda)
    average = Average(vae.parameters(), 0.998)

    def loss_of(video: Tensor, shake: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cuda", torch.bfloat16) if cuda else contextlib.nullcontext():
            mean, log_variance = whole_clip.encode(vae, video)
        mean, log_variance = mean.float(), log_variance.float().clamp(-20, 10)
        latents = mean + noise * ((0.5 * log_variance).exp() + shake * mean.detach().std())
        with torch.autocast("cuda", torch.bfloat16) if cuda else contextlib.nullcontext():
            got = whole_clip.decode(vae, latents)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        pixels = losses(got.float(), video)
        return pixels + recipe.kl * kl, kl.detach()

    if cuda:
        torch.backends.cudnn.benchmark = True
        loss_of = torch.compile(loss_of, dynamic=False)
    crop_h, crop_w = recipe.crop
    clock = Clock(seconds, warm=0.03)
    curve = Curve(out / "curve.jsonl", clock)
    logged, step, counted, saved = [], 0, 0, 0.0
    running = torch.zeros((), device=device)
    while clock.progress < 1 and (steps is None or step < steps):
        clips = captions.sample(recipe.clips, seed=recipe.seed * 10**5 + step % recipe.pool)
        with torch.no_grad():
            rendered = render.render(clips, recipe.frames, recipe.height, recipe.width, device)
            cuts = []
            for _ in range(2):
                top = int(torch.randint(recipe.height - crop_h + 1, ()))
                left = int(torch.randint(recipe.width - crop_w + 1, ()))
                cuts.append(rendered[..., top : top + crop_h, left : left + crop_w])
            video = torch.cat(cuts).contiguous(memory_format=torch.channels_last_3d)
            n, t = video.shape[0], 1 + (recipe.frames - 1) // 4
            shake = 0.1 * (torch.arange(n, device=device) % 2)[:, None, None, None, None]
            noise = torch.randn(n, 16, t, crop_h // 8, crop_w // 8, device=device)
        loss, kl = loss_of(video, shake, noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * clock.rate
        optimizer.step()
        average.update()
        running += loss.detach()
        step += 1
        counted += 1
        if counted == (100 if cuda else 10) or step == 1:
            logged.append(float(running) / counted)
            running.zero_()
            counted = 0
            curve.write(step=step, loss=logged[-1], kl=float(kl), rate=recipe.rate * clock.rate)
        if clock.elapsed - saved > 60:
            saved = clock.elapsed
            save(vae, average, recipe, out, device, curve)
    save(vae, average, recipe, out, device, curve)
    return logged


@torch.no_grad()
def save(
    vae: torch.nn.Module,
    average: Average,
    recipe: Recipe,
    out: Path,
    device: str,
    curve: Curve,
    spread: tuple[list[float], list[float]] | None = None,
) -> None:
    """Measure the averaged weights on held-out whole clips and write them as `out/vae`.

    `spread` is the latents' mean and spread, channel by channel, where they are to stay what they were.
    """
    average.swap()
    frames = recipe.frames if recipe.sizes == networks.TINY else 33
    means, errors, energies = [], [], []
    for seed in range(4):
        clips = captions.sample(4, HELD_OUT_SEED + seed)
        video = render.render(clips, frames, recipe.height, recipe.width, device)
        with torch.autocast("cuda", torch.bfloat16) if device.startswith("cuda") else contextlib.nullcontext():
            mean, _ = whole_clip.encode(vae, video)
            got = whole_clip.decode(vae, mean).float().clamp(-1, 1)
        means.append(mean.float())
        errors.append((got - video).square().mean(dim=(1, 2, 3, 4)))
        energies.append(torch.stack([_energy(got) / _energy(video)]))
    psnr = float((10 * torch.log10(4 / torch.cat(errors))).mean())
    latents = torch.cat(means)
    measured = latents.mean(dim=(0, 2, 3, 4)).tolist(), latents.std(dim=(0, 2, 3, 4)).tolist()
    curve.write(held_out_psnr=psnr, energy=torch.cat(energies).mean(0).tolist(), spread=float(latents.std()))
    finished = networks.vae(recipe.sizes, *(spread or measured))
    finished.load_state_dict({k: v.detach().cpu().contiguous() for k, v in vae.state_dict().items()})
    finished.to(torch.float16).save_pretrained(out / "vae")
    average.swap()


def _energy(video: Tensor) -> Tensor:
    """(spatial, temporal) gradient energy as one tensor: see measure.gradient_energy."""
    spatial = video.diff(dim=-1).square().mean() + video.diff(dim=-2).square().mean()
    return torch.stack((spatial, video.diff(dim=2).square().mean()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--start", type=Path, help="go on from this folder, the result of an earlier run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, help="peak learning rate, if not the recipe's")
    given = parser.parse_args()
    recipe = TINY if given.tiny else Recipe()
    recipe = replace(recipe, seed=given.seed, rate=given.rate or recipe.rate)
    train(recipe, given.seconds, given.out, given.device, given.start)
