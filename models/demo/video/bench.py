"""python -m models.demo.video.bench: the demo model's denoise loop, {fp32, bf16} x {dense, sparse} x {float, W4A8}.

Steps, seed, prompt and allocator settings are the same for all; they take turns, round after round. `value` is the
median of the loops' seconds, `error` the PSNR in dB against dense float32. Rows as in quant_runtime/report.py, into
docs/results/demo_video_speed-DEVICE.jsonl; the sizes of the weights go with them.
"""

from __future__ import annotations

import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from models import compress, registry
from models.base import VideoInputs
from models.compress import Recipe
from models.demo import weights
from models.wan import Wan, WanModel
from quant_runtime import quality, report
from quant_runtime.attention import AttentionPlan
from quant_runtime.formats import QuantFormat
from quant_runtime.kernels._cpu import keep_freed_memory
from quant_runtime.methods import Rtn
from quant_runtime.sparsity.topk import TopK

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WARMUP, DENSITY = 0.2, 0.12  # four dense steps of twenty, which settle what is where: 0.29 effective
BASELINE = "float32 dense float"


def plan(sparse: bool, quantized: bool) -> AttentionPlan:
    """Quantized layers come with int8 q and k; float ones with 16-bit q and k."""
    bits = 8 if quantized else 16
    if sparse:
        return AttentionPlan(TopK(DENSITY), WARMUP, qk_bits=bits, dense_qk_bits=bits)
    return AttentionPlan(dense_qk_bits=bits)


def opened(folder: Path, device: str, dtype: torch.dtype) -> WanModel:
    """A checkpoint or an artifact with its transformer in `dtype`, and one and the same decoder for all."""
    model = Wan().load(folder, device, {"transformer": dtype, "default": torch.float32})
    model.fuse_projections()
    return model


def rows(checkpoint: Path, device: str, rounds: int, steps: int | None, artifact: Path) -> Iterator[dict[str, Any]]:
    recipe = Recipe(Rtn(), QuantFormat.parse("w4a8"), plan(sparse=True, quantized=True), judging_samples=0)
    made = compress.compress(
        Wan(), checkpoint, recipe, artifact, base="demo-video", device=device, on_progress=lambda *_: None
    )
    yield from weights.rows("W4A8", checkpoint / WEIGHTS, artifact / WEIGHTS, made)
    models = {
        (name, quantized): opened(artifact if quantized else checkpoint, device, dtype)
        for quantized in (False, True)
        for name, dtype in DTYPES.items()
    }
    limits = models["float32", False].limits()
    inputs = VideoInputs(
        prompt=models["float32", False].serving.judging[0], width=limits.width, height=limits.height,
        frames=limits.frames, fps=limits.fps, steps=steps or limits.steps, guidance=limits.guidance, seed=0,
    )  # fmt: skip
    times: dict[str, list[float]] = {}
    films: dict[str, np.ndarray] = {}
    densities: dict[str, float] = {}
    for number in range(rounds):
        for (dtype, quantized), model in models.items():
            for sparse in (False, True):
                name = f"{dtype} {'sparse' if sparse else 'dense'} {'W4A8' if quantized else 'float'}"
                model.attend(plan(sparse, quantized))
                film = model.film(inputs, lambda done, of: None)
                times.setdefault(name, []).append(film.seconds["denoise"])
                films[name], densities[name] = film.frames, model.attention.density().effective
                print(f"{number} {name:28} {film.seconds['denoise']:7.2f} s", flush=True)
    reference = torch.from_numpy(films[BASELINE])
    for name, seconds in times.items():
        psnr = None if name == BASELINE else report.rounded(quality.psnr(reference, torch.from_numpy(films[name])))
        yield report.row(
            name, "denoise loop", median(seconds), "s", "lower", samples=rounds,
            baseline=(BASELINE, median(times[BASELINE])), spread=max(seconds) - min(seconds),
            error={"psnr": psnr, "effective_density": round(densities[name], 4)},
        )  # fmt: skip


def main() -> None:
    parser = ArgumentParser(prog="python -m models.demo.video.bench", description="Times the demo video model.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of the loop; the model's default")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    given = parser.parse_args()
    keep_freed_memory()  # for the baselines as for ours
    device = torch.device(given.device)
    path = given.out / f"demo_video_speed-{device.type}.jsonl"
    command = ["python", "-m", "models.demo.video.bench", *sys.argv[1:]]
    with tempfile.TemporaryDirectory() as aside:
        checkpoint = registry.checkpoint("demo-video")
        found = rows(checkpoint, given.device, given.rounds, given.steps, Path(aside) / "artifact")
        report.write(path, "demo_video_speed", found, command, device)
    print(path)


if __name__ == "__main__":
    main()
