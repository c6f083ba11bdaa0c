"""Train the video demo's transformer: `python -m models.demo.video.train_dit --vae DIR --seconds 700 --out DIR`.

Flow matching in the latents of a finished autoencoder, the text encoder learning along. Clips are rendered and encoded
once; a first part of the time goes to short clips of half the size (an eighth of the tokens: words find their meaning
there), the rest to whole ones. Matrices inside the blocks learn by Muon, the rest by AdamW; the schedule follows the
clock. Now and then the averaged weights generate the 64 held-out captions, and `measure` reads how many are obeyed.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from torch import Tensor

from models.demo.training import Average, Clock, Curve, Muon
from models.demo.video import captions, measure, networks, render, whole_clip
from models.demo.video.captions import Clips


@dataclass(frozen=True)
class Scale:
    """One part of the training: clips of one size."""

    frames: int
    height: int
    width: int
    clips: int  # rendered and encoded beforehand
    batch: int
    share: float  # of the time


@dataclass(frozen=True)
class Recipe:
    sizes: networks.Sizes = networks.DEMO
    scales: tuple[Scale, ...] = (Scale(17, 96, 160, 24_000, 256, 0.3), Scale(33, 192, 320, 18_000, 48, 0.7))
    muon_rate: float = 2e-3
    adam_rate: float = 1e-3
    drop: float = 0.1  # of the captions are left out, for guidance
    long_text: float = 0.125  # of the steps pad captions to 512, diffusers' default; the others to 64
    caption_tokens: int = 32
    guidance: float = 4.0  # of the clips generated to be measured
    seed: int = 0


TINY = Recipe(
    sizes=networks.TINY,
    scales=(Scale(5, 32, 48, 16, 8, 0.5), Scale(5, 48, 80, 8, 4, 0.5)),
    muon_rate=1e-2,
    adam_rate=1e-2,
)


@dataclass(frozen=True)
class Encoded:
    """Latents, normalized, bfloat16 on CUDA, [N, 16, t, h, w]; their captions' tokens [N, L] and lengths [N]."""

    latents: Tensor
    tokens: Tensor
    lengths: Tensor


def train(
    recipe: Recipe, vae_folder: Path, seconds: float, out: Path, device: str, steps: int | None = None
) -> list[float]:
    """Returns the loss of every logged step. `steps` bounds each scale (for tests)."""
    torch.manual_seed(recipe.seed)
    torch.set_float32_matmul_precision("high")
    cuda = device.startswith("cuda")
    clock = Clock(seconds, warm=0.01, cool=0.45)
    curve = Curve(out / "curve.jsonl", clock)
    vae = AutoencoderKLWan.from_pretrained(vae_folder, dtype=torch.float32).to(device).eval()
    data = [encoded(recipe, scale, vae, device, seed=1 + i) for i, scale in enumerate(recipe.scales)]
    curve.write(encoded=[list(d.latents.shape) for d in data])

    transformer = networks.transformer(recipe.sizes).to(device).train()
    text_encoder = networks.text_encoder(recipe.sizes).to(device).train()
    everything = [*transformer.parameters(), *text_encoder.parameters()]
    matrices = [p for p in transformer.blocks.parameters() if p.dim() == 2]
    known = {id(p) for p in matrices}
    muon = Muon(matrices, recipe.muon_rate, weight_decay=0.02)
    adam = torch.optim.AdamW(
        [p for p in everything if id(p) not in known],
        recipe.adam_rate,
        betas=(0.9, 0.98),
        weight_decay=0.01,
        fused=cuda,
    )
    average = Average(everything, 0.9985)
    if cuda:
        torch.backends.cuda.enable_flash_sdp(
            False
        )  # cuDNN's attention, forward and back, takes 0.55 of its time on Hopper
        torch._dynamo.config.recompile_limit = 32  # two sizes of clip, two lengths of text
        for block in transformer.blocks:
            block.compile(dynamic=False)

    def loss_of(clean: Tensor, tokens: Tensor, lengths: Tensor, padded: int) -> Tensor:
        n = len(clean)
        kept = torch.rand(n, device=device) >= recipe.drop
        empty = torch.zeros_like(tokens)
        empty[:, 0] = 1  # an empty prompt is its end-of-text token alone
        tokens = torch.where(kept[:, None], tokens, empty)
        lengths = torch.where(kept, lengths, 1)
        sigma = torch.sigmoid(torch.randn(n, device=device))
        sigma = networks.FLOW_SHIFT * sigma / (1 + (networks.FLOW_SHIFT - 1) * sigma)
        noise = torch.randn_like(clean)
        at = sigma.view(-1, 1, 1, 1, 1)
        with torch.autocast("cuda", torch.bfloat16) if cuda else contextlib.nullcontext():
            text = said(text_encoder, tokens, lengths, padded)
            got = transformer((1 - at) * clean + at * noise, sigma * 1000, text, return_dict=False)[0]
        return F.mse_loss(got.float(), noise - clean)

    logged: list[float] = []
    running, counted, step, seen = torch.zeros((), device=device), 0, 0, 0
    shown = saved = clock.elapsed
    begun = clock.progress  # encoding took its part; the scales share what is left
    until = begun
    for index, (scale, source) in enumerate(zip(recipe.scales, data, strict=True)):
        until += scale.share * (1 - begun)
        last = index == len(recipe.scales) - 1
        for count, rows in enumerate(shuffled(len(source.latents), scale.batch, device)):
            if (clock.progress >= (1 if last else until)) or (steps is not None and count >= steps):
                break
            padded = 512 if torch.rand(()) < recipe.long_text else networks.MAX_TOKENS
            loss = loss_of(source.latents[rows].float(), source.tokens[rows], source.lengths[rows], padded)
            for optimizer, rate in ((muon, recipe.muon_rate), (adam, recipe.adam_rate)):
                optimizer.zero_grad(set_to_none=True)
                for group in optimizer.param_groups:
                    group["lr"] = rate * clock.rate
            loss.backward()
            torch.nn.utils.clip_grad_norm_(everything, 1.0)
            muon.step()
            adam.step()
            average.update()
            running += loss.detach()
            counted, step, seen = counted + 1, step + 1, seen + scale.batch
            if counted == (100 if cuda else 10) or step == 1:
                logged.append(float(running) / counted)
                curve.write(scale=index, step=step, seen=seen, loss=logged[-1], rate=clock.rate)
                running.zero_()
                counted = 0
            if cuda and clock.elapsed - shown > 75:
                shown = clock.elapsed
                average.swap()
                with torch.compiler.set_stance("force_eager"):  # one more size would not repay its compilation
                    obeyed = obedience(recipe, scale, transformer, text_encoder, vae, device)
                average.swap()
                curve.write(scale=index, step=step, seen=seen, **obeyed)
            if clock.elapsed - saved > 60:
                saved = clock.elapsed
                save(transformer, text_encoder, average, out)
    save(transformer, text_encoder, average, out)
    if cuda:
        average.swap()
        with torch.compiler.set_stance("force_eager"):
            for seed in range(3):
                curve.write(
                    final=seed, **obedience(recipe, recipe.scales[-1], transformer, text_encoder, vae, device, seed)
                )
    return logged


def shuffled(count: int, batch: int, device: str) -> Iterator[Tensor]:
    """Rows of one batch after another, every clip once before any comes twice, without end."""
    while True:
        order = torch.randperm(count, device=device)
        yield from order[: count // batch * batch].view(-1, batch)


@torch.no_grad()
def encoded(recipe: Recipe, scale: Scale, vae: AutoencoderKLWan, device: str, seed: int) -> Encoded:
    cuda = device.startswith("cuda")
    clips = captions.sample(scale.clips, seed)
    mean = torch.tensor(vae.config.latents_mean, device=device).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std, device=device).view(1, -1, 1, 1, 1)
    parts = []
    step = 16 if scale.frames > 17 else 64

    def latents_of(video: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16) if cuda else contextlib.nullcontext():
            return whole_clip.encode(vae, video)[0].float()

    if cuda:
        torch.backends.cudnn.benchmark = True
        latents_of = torch.compile(latents_of, dynamic=False)
    for start in range(0, scale.clips - scale.clips % step or scale.clips, step):
        video = render.render(clips[slice(start, start + step)], scale.frames, scale.height, scale.width, device)
        parts.append(
            ((latents_of(video.contiguous(memory_format=torch.channels_last_3d)) - mean) / std).to(
                torch.bfloat16 if cuda else torch.float32
            )
        )
    latents = torch.cat(parts)
    lines = captions.describe(clips, seed)[: len(latents)]
    tokens, lengths = tokenized(recipe, lines, device)
    return Encoded(latents, tokens, lengths)


def tokenized(recipe: Recipe, lines: list[str], device: str) -> tuple[Tensor, Tensor]:
    found = networks.tokenizer(recipe.sizes)(
        lines, padding="max_length", max_length=recipe.caption_tokens, truncation=True, return_tensors="pt"
    )
    return found.input_ids.to(device), found.attention_mask.sum(1).to(device)


def said(text_encoder: torch.nn.Module, tokens: Tensor, lengths: Tensor, padded: int) -> Tensor:
    """What WanPipeline hands its transformer: hidden states, zero behind the text's end, `padded` long."""
    mask = (torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]).long()
    hidden = text_encoder(tokens, mask).last_hidden_state * mask[..., None]
    return F.pad(hidden, (0, 0, 0, padded - hidden.shape[1]))


@torch.no_grad()
def obedience(
    recipe: Recipe, scale: Scale, transformer: torch.nn.Module, text_encoder: torch.nn.Module, vae: AutoencoderKLWan,
    device: str, seed: int = 0,
) -> dict[str, float]:  # fmt: skip
    """Generate the held-out captions (Euler, 20 steps) and read them: shares of 64, and gradient energies as ratios."""
    clips: Clips = captions.held_out(seed)
    tokens, lengths = tokenized(recipe, captions.describe(clips, seed), device)
    n, t, h, w = len(clips), 1 + (scale.frames - 1) // 4, scale.height // 8, scale.width // 8
    x = torch.randn(n, 16, t, h, w, device=device, generator=torch.Generator(device).manual_seed(seed))
    sigmas = torch.linspace(1, 0, 21, device=device)
    sigmas = networks.FLOW_SHIFT * sigmas / (1 + (networks.FLOW_SHIFT - 1) * sigmas)
    empty = torch.zeros_like(tokens)
    empty[:, 0] = 1
    with torch.autocast("cuda", torch.bfloat16):
        text = said(text_encoder, tokens, lengths, networks.MAX_TOKENS)
        none = said(text_encoder, empty, torch.ones_like(lengths), networks.MAX_TOKENS)
        for now, after in pairwise(sigmas):
            time = now.expand(n) * 1000
            with_text, without = (transformer(x, time, c, return_dict=False)[0].float() for c in (text, none))
            x = x + (after - now) * (without + recipe.guidance * (with_text - without))
        mean = torch.tensor(vae.config.latents_mean, device=device).view(1, -1, 1, 1, 1)
        std = torch.tensor(vae.config.latents_std, device=device).view(1, -1, 1, 1, 1)
        video = torch.cat([whole_clip.decode(vae, part * std + mean).float().clamp(-1, 1) for part in x.split(8)])
    reading = measure.read(video)
    colour = (reading.colour.cpu() == clips.colour[:, 0]).float()
    direction = (reading.direction.cpu() == clips.direction).float()
    truth = torch.cat(
        [render.render(clips[slice(i, i + 8)], scale.frames, scale.height, scale.width, device) for i in range(0, n, 8)]
    )
    spatial, temporal = (
        a / b for a, b in zip(measure.gradient_energy(video), measure.gradient_energy(truth), strict=True)
    )
    return {
        "colour": float(colour.mean()),
        "direction": float(direction.mean()),
        "both": float((colour * direction).mean()),
        "spatial": spatial,
        "temporal": temporal,
    }


def save(transformer: torch.nn.Module, text_encoder: torch.nn.Module, average: Average, out: Path) -> None:
    """The averaged weights in bfloat16: two `transformer` files, each under 16 MiB, and `text_encoder`."""
    average.swap()
    for name, model in (("transformer", transformer), ("text_encoder", text_encoder)):
        state = {
            k.replace("_orig_mod.", ""): v.detach().to("cpu", torch.bfloat16).contiguous()
            for k, v in model.state_dict().items()
        }
        if name == "text_encoder":
            state.pop("encoder.embed_tokens.weight", None)  # the same tensor as shared.weight
        names = sorted(state)
        half = len(names) // 2
        parts = [names] if name == "text_encoder" else [names[:half], names[half:]]
        for i, part in enumerate(parts):
            file = out / (f"{name}.safetensors" if len(parts) == 1 else f"{name}-{i}.safetensors")
            save_file({k: state[k] for k in part}, file.with_suffix(".part"))
            file.with_suffix(".part").rename(file)
    average.swap()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--fraction", type=float, default=1.0, help="of the recipe's clips (a short trial needs few)")
    given = parser.parse_args()
    recipe = TINY if given.tiny else Recipe()
    scales = tuple(replace(s, clips=max(s.batch, int(s.clips * given.fraction))) for s in recipe.scales)
    train(replace(recipe, scales=scales), given.vae, given.seconds, given.out, given.device)
