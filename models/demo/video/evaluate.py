"""Does the demo video model obey its prompts, does it look like its data, and does it hurt when it is compressed?

    python -m models.demo.video.evaluate obedience [MODEL] --seeds 1
    python -m models.demo.video.evaluate compression --seeds 3
    python -m models.demo.video.evaluate residual --seeds 3
    python -m models.demo.video.evaluate policies --seeds 3

MODEL is a checkpoint (the shipped one) or an artifact. `obedience`: the 64 held-out triples, a static camera; colour
and direction are read off the pixels by models/demo/video/measure.py, whose own figures on rendered clips stand beside.
Gradient energies are ratios to the same captions' rendered clips. `compression`: held-out prompts against full
precision in float32, same seed; mean over prompts and seeds, `error` the least and the most. `residual`: sparse
attention with and without what it loses cached, against the dense film of the same W8A8 model; `error` tells the
density too, dense steps counted, and norms at the refreshes beside the dense answer's: what was `lost`, and how far off
each order of the refresh before was by then. `policies`: ways to choose the blocks that are kept, of the same model and
against the same film; `error` tells the density of the sparse steps, `sparse`, and of all. Rows as in
quant_runtime/report.py, in docs/results/demo_video_NAME-DEVICE.jsonl.
"""

from __future__ import annotations

import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from models import compress, load, registry
from models.base import VideoInputs
from models.compress import Recipe
from models.demo.video import captions, measure, render
from models.demo.video.captions import Clips
from models.precision import fast_float
from models.wan import Wan, WanModel
from quant_runtime import artifact, quality, report
from quant_runtime.attention import AttentionPlan, Density
from quant_runtime.formats import W16A16, QuantFormat
from quant_runtime.kernels._cpu import keep_freed_memory
from quant_runtime.methods import Keep, Rtn
from quant_runtime.residual import Residual
from quant_runtime.sparsity.bands import Bands
from quant_runtime.sparsity.base import Policy
from quant_runtime.sparsity.tiles import Tiles
from quant_runtime.sparsity.topk import TopK
from quant_runtime.sparsity.topp import TopP


def opened(folder: Path, device: str) -> WanModel:
    """An artifact as a worker opens it; a checkpoint in bfloat16 where the device multiplies that itself."""
    if (folder / artifact.MANIFEST).is_file():
        model = load.load(folder, device)
        assert isinstance(model, WanModel)
        return model
    return Wan().load(folder, device, fast_float(device))


def film(model: WanModel, prompt: str, seed: int) -> Tensor:
    """uint8 [T, H, W, 3], defaults throughout."""
    size = model.limits()
    inputs = VideoInputs(
        prompt=prompt, width=size.width, height=size.height, frames=size.frames, fps=size.fps, steps=size.steps,
        guidance=size.guidance, seed=seed,
    )  # fmt: skip
    return torch.from_numpy(model.film(inputs, lambda done, of: None).frames)


def as_video(frames: Tensor) -> Tensor:
    """uint8 [T, H, W, 3] to float [1, 3, T, H, W] in [-1, 1], the form of the renderer and of the measuring program."""
    return frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1


def right(video: Tensor, clips: Clips) -> tuple[bool, bool]:
    """Of one clip: is the colour as said, is the direction?"""
    reading = measure.read(video)
    return bool(reading.colour == clips.colour[:, 0]), bool(reading.direction == clips.direction)


def obedience(model: WanModel, seeds: int, count: int) -> Iterator[dict[str, Any]]:
    """Of every seed the first `count` of the 64 held-out triples."""
    size = model.limits()
    tally: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        tally.setdefault(name, []).append(value)

    for seed in range(seeds):
        all_clips = captions.held_out(seed)
        lines = captions.describe(all_clips, seed)
        for i in range(count):
            clip, other = (all_clips[slice(n, n + 1)] for n in (i, (i + 29) % len(all_clips)))
            true = render.render(clip, size.frames, size.height, size.width).cpu()
            seen, moved = right(true, clip)
            note("rendered: colour and direction", seen and moved)
            note("rendered, another's caption", all(right(true, other)))
            made = as_video(film(model, lines[i], 64 * seed + i))
            seen, moved = right(made, clip)
            note("colour", seen)
            note("direction", moved)
            note("colour and direction", seen and moved)
            for name, got, want in zip(
                ("spatial", "temporal"), measure.gradient_energy(made), measure.gradient_energy(true), strict=True
            ):
                note(f"{name} energy", got)
                note(f"{name} energy, rendered", want)
            print(f"{seed} {i:2} {'right' if seen and moved else 'wrong'} {lines[i]}", flush=True)
    for name, values in tally.items():
        if "energy" not in name:
            yield report.row("held-out triples", name, 100 * mean(values), "%", "higher", samples=len(values))
    for name in ("spatial energy", "temporal energy"):
        got, want = mean(tally[name]), mean(tally[f"{name}, rendered"])
        yield report.row(
            "held-out triples", f"{name}, ratio to rendered", got / want, "", "higher", samples=len(tally[name])
        )


RECIPES = {
    "W8A8 by RTN, dense": Recipe(Rtn(), QuantFormat.parse("w8a8"), judging_samples=0),
    "W4A4 by RTN, dense": Recipe(Rtn(), QuantFormat.parse("w4a4"), judging_samples=0),
    "16 bits, 15 % density": Recipe(Keep(), W16A16, AttentionPlan(TopK(0.15), qk_bits=16), judging_samples=0),
}


def compression(checkpoint: Path, device: str, seeds: int, prompts: int, aside: Path) -> Iterator[dict[str, Any]]:
    """Against full precision: each of RECIPES, another seed of the same prompt, bfloat16 where the device has it."""
    model = Wan().load(checkpoint, device, torch.float32)
    lines = model.serving.judging[:prompts]
    full = {(line, seed): film(model, line, seed) for line in lines for seed in range(seeds + 1)}
    cases = [(line, seed) for line in lines for seed in range(seeds)]
    yield _closeness("another seed", [(full[line, seed], full[line, seed + 1]) for line, seed in cases])
    del model
    if fast_float(device) == torch.bfloat16:
        half = opened(checkpoint, device)
        yield _closeness("bfloat16", [(full[case], film(half, *case)) for case in cases])
        del half
    for number, (name, recipe) in enumerate(RECIPES.items()):
        folder = aside / str(number)
        compress.compress(
            Wan(), checkpoint, recipe, folder, base="demo-video", device=device, on_progress=lambda *_: None
        )
        small = load.load(folder, device)
        assert isinstance(small, WanModel)
        yield _closeness(name, [(full[case], film(small, *case)) for case in cases])


DENSITIES = (0.15, 0.25)
WARMUP = 0.1  # two steps of twenty; with an interval of 5, five of them run dense
SAME_DENSE = 0.25  # a warm-up of as many
RANK = 16


def residuals(model: WanModel, seeds: int, prompts: int) -> Iterator[dict[str, Any]]:
    """Of each density: without a residual, with as many dense steps in front, by the first order and by the second."""
    cases = [(line, seed) for line in model.serving.judging[:prompts] for seed in range(seeds)]
    model.attend(AttentionPlan(dense_qk_bits=8))
    dense = {case: film(model, *case) for case in cases}
    size: int = model.network.config.attention_head_dim
    kinds = {
        "no residual": (WARMUP, None),
        "no residual, as many dense steps, in front": (SAME_DENSE, None),
        "first order": (WARMUP, Residual(order=1)),
        "second order": (WARMUP, Residual(rank=size)),
        f"second order, rank {RANK}": (WARMUP, Residual(rank=RANK)),
    }
    for density in DENSITIES:
        for name, (warmup, residual) in kinds.items():
            model.attend(AttentionPlan(TopK(density), warmup, dense_qk_bits=8, residual=residual))
            pairs, ran = [], []
            for case in cases:
                pairs.append((dense[case], film(model, *case)))
                ran.append(model.attention.density())
            row = _closeness(f"density {density}, {name}", pairs)
            yield row | {"error": row["error"] | _seen(ran)}


POLICIES: dict[str, Callable[[float], Policy]] = {
    "top-k": TopK,
    "bands, heads choose": Bands,
    "bands and first frame, heads choose": lambda density: Bands(density, first_frame=True),
    "bands, from a table": Bands,
    "tiles": Tiles,
    "tiles and first frame": lambda density: Tiles(density, first_frame=True),
}
MASSES = {"top-p": (0.0, (0.6, 0.78)), "top-p, guarded": (0.3, (0.6,))}  # of what is kept; its threshold of likeness


def policies(model: WanModel, seeds: int, prompts: int) -> Iterator[dict[str, Any]]:
    """Each policy at each density; top-p at masses that come near them, its guard off and on. `sparse` is the density
    of the steps that are not dense.
    """
    cases = [(line, seed) for line in model.serving.judging[:prompts] for seed in range(seeds)]
    model.attend(AttentionPlan(dense_qk_bits=8))
    dense = {case: film(model, *case) for case in cases}
    plans = {
        f"density {density}, {name}": policy(density) for density in DENSITIES for name, policy in POLICIES.items()
    }
    plans |= {f"mass {mass}, {name}": TopP(mass, alike) for name, (alike, masses) in MASSES.items() for mass in masses}
    for name, policy in plans.items():
        plan = AttentionPlan(policy, WARMUP, dense_qk_bits=8)
        if name.endswith("table"):
            plan = compress.tabled(model, plan, 1, lambda *_: None)
        model.attend(plan)
        pairs, ran = [], []
        for case in cases:
            pairs.append((dense[case], film(model, *case)))
            ran.append(model.attention.density())
        row = _closeness(name, pairs)
        sparse = mean(one.sparse for one in ran if one.sparse is not None)
        yield row | {"error": row["error"] | {"sparse": report.rounded(sparse)} | _seen(ran)}


def _seen(ran: list[Density]) -> dict[str, float]:
    """The density, and what was lost at the refreshes that had one before them: norms beside the dense answer's."""
    seen = {"effective_density": report.rounded(mean(one.effective for one in ran))}
    refreshes = [refresh for one in ran if one.residual for refresh in one.residual.refreshes]
    for name in ("lost", "first_error", "second_error"):
        values = [value for value in (getattr(refresh, name) for refresh in refreshes) if value is not None]
        if values:
            seen[name] = report.rounded(mean(values))
    return seen


def _closeness(name: str, pairs: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    values = [quality.psnr(want, got) for want, got in pairs]
    print(f"{name:24} {mean(values):6.2f} dB", flush=True)
    error = {"least": report.rounded(min(values)), "most": report.rounded(max(values))}
    return report.row(name, "PSNR", mean(values), "dB", "higher", samples=len(values), error=error)


def main() -> None:
    parser = ArgumentParser(prog="python -m models.demo.video.evaluate", description=__doc__)
    parser.add_argument("name", choices=("obedience", "compression", "residual", "policies"))
    parser.add_argument("model", nargs="?", default="demo-video", help="a checkpoint, or for obedience an artifact")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=64, help="of the held-out ones, at most")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    given = parser.parse_args()
    keep_freed_memory()
    device = torch.device(given.device)
    folder = registry.checkpoint(given.model)
    path = given.out / f"demo_video_{given.name}-{device.type}.jsonl"
    command = ["python", "-m", "models.demo.video.evaluate", *sys.argv[1:]]
    with tempfile.TemporaryDirectory() as aside:
        if given.name == "obedience":
            found = obedience(opened(folder, given.device), given.seeds, given.prompts)
        elif given.name in ("residual", "policies"):
            recipe = RECIPES["W8A8 by RTN, dense"]
            small = Path(aside) / "artifact"
            compress.compress(
                Wan(), folder, recipe, small, base="demo-video", device=given.device, on_progress=lambda *_: None
            )
            compared = residuals if given.name == "residual" else policies
            found = compared(opened(small, given.device), given.seeds, given.prompts)
        else:
            found = compression(folder, given.device, given.seeds, given.prompts, Path(aside))
        report.write(path, f"demo_video_{given.name}", found, command, device)
    print(path)


if __name__ == "__main__":
    main()
