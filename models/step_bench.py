"""python -m models.step_bench NAME: one denoising step of a published network at its true size, beside bfloat16.

The network has random weights: time and memory do not depend on what they are. Everything runs in one process on one
GPU, the baseline first: diffusers' own network in bfloat16, its attention through cuDNN and without the mask that it
would build (all text is real here, and a mask slows it), eagerly and with its blocks compiled. Then its layers are
quantized in place, and the same step runs once dense and once at each density. Of either side a pass of few tokens is
launched as one. `error` is relative, against the eager baseline's answer: of random weights it shows that the same
function is computed, not what a film loses. "compiling" is what a run of ours waited for the first time, of kernels
that those before it had no use for.

With --steps a whole run of so many steps at the first density is timed besides, its dense steps among them: those of
--warmup, and with --refresh N one behind every N sparse ones, at which what they lose is cached anew.
"""

from __future__ import annotations

import inspect
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch import Tensor, nn

from models import registry, timing
from models.published import PUBLISHED
from models.video import VideoModel
from quant_runtime import fields, report
from quant_runtime.attention import AttentionPlan
from quant_runtime.compiles import recorded
from quant_runtime.graphs import MOST_TOKENS, ByGraph
from quant_runtime.residual import Residual
from quant_runtime.sparsity import POLICIES
from quant_runtime.sparsity.base import Policy

BASELINE = "bfloat16 cuDNN"


def network(name: str, device: str) -> Any:
    """A published network in bfloat16 with random weights: linear ones as large as their inputs are many, norms 1."""
    made: Any = PUBLISHED[name].on_meta().to(torch.bfloat16).to_empty(device=device).eval()
    made.requires_grad_(False)
    if isinstance(made, WanTransformer3DModel):  # its angles are made when it is, and are in no checkpoint
        config = made.config
        made.rope = WanRotaryPosEmbed(config.attention_head_dim, config.patch_size, config.rope_max_seq_len).to(device)
    for key, tensor in made.state_dict().items():
        if tensor.dim() > 1:
            tensor.normal_(std=(tensor.numel() / len(tensor)) ** -0.5)
        else:
            tensor.fill_(1.0 if key.endswith("weight") else 0.0)
    return made


def hunyuan_inputs(config: Any, width: int, height: int, frames: int, device: str) -> dict[str, Any]:
    """256 real tokens of text."""
    return {
        "hidden_states": _noise(device, 1, config.in_channels, (frames - 1) // 4 + 1, height // 8, width // 8),
        "timestep": torch.tensor([500.0], device=device),
        "encoder_hidden_states": _noise(device, 1, 256, config.text_embed_dim),
        "encoder_attention_mask": torch.ones(1, 256, device=device, dtype=torch.bfloat16),
        "pooled_projections": _noise(device, 1, config.pooled_projection_dim),
        "guidance": torch.tensor([6000.0], device=device),
        "return_dict": False,
    }


def wan_inputs(config: Any, width: int, height: int, frames: int, device: str) -> dict[str, Any]:
    """512 tokens of text, which Wan pads to and does not mask."""
    return {
        "hidden_states": _noise(device, 1, config.in_channels, (frames - 1) // 4 + 1, height // 8, width // 8),
        "timestep": torch.tensor([500], device=device),
        "encoder_hidden_states": _noise(device, 1, 512, config.text_dim),
        "return_dict": False,
    }


def cogvideox_inputs(config: Any, width: int, height: int, frames: int, device: str) -> dict[str, Any]:
    """A batch of two, with a prompt and without: so it is guided. 226 tokens of text, padded to and not masked."""
    latents, patch = (frames - 1) // 4 + 1, config.patch_size
    grid = (height // 8 // patch, width // 8 // patch)
    crop = get_resize_crop_region_for_grid(grid, config.sample_width // patch, config.sample_height // patch)
    places = get_3d_rotary_pos_embed(config.attention_head_dim, crop, grid, latents, device=torch.device(device))
    return {
        "hidden_states": _noise(device, 2, latents, config.in_channels, height // 8, width // 8),
        "timestep": torch.tensor([500, 500], device=device),
        "encoder_hidden_states": _noise(device, 2, config.max_text_seq_length, config.text_embed_dim),
        "image_rotary_emb": places,
        "return_dict": False,
    }


def _noise(device: str, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device, dtype=torch.bfloat16)


class WithoutMask(HunyuanVideoAttnProcessor2_0):
    """diffusers' own, whose mask hides nothing here."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        return super().__call__(attn, hidden_states, encoder_hidden_states, None, image_rotary_emb)


INPUTS = {
    "hunyuan-video": hunyuan_inputs,
    "wan-2.1-14b": wan_inputs,
    "wan-2.1-1.3b": wan_inputs,
    "cogvideox-5b": cogvideox_inputs,
}


def model_of(name: str, made: nn.Module, device: str) -> VideoModel:
    """As a worker has it, without encoders and autoencoder."""
    family: Any = registry.family(PUBLISHED[name].family)
    pipeline = family.pipelines[0]
    parts = dict.fromkeys(inspect.signature(pipeline.__init__).parameters.keys() - {"self"})
    return family.model(pipeline(**parts | {"transformer": made}), family.serving(), device)


def compile_blocks(made: Any, device: torch.device, tokens: int) -> None:
    """As diffusers' compile_repeated_blocks does, which CogVideoX does not name its blocks for.

    A pass of few tokens is launched as one besides, as ours is.
    """
    repeated = made._repeated_blocks or [type(made.transformer_blocks[0]).__name__]
    for part in made.modules():
        if type(part).__name__ in repeated:
            part.compile(fullgraph=True)
    if device.type == "cuda" and tokens <= MOST_TOKENS:
        made.forward = ByGraph(made.forward, tuple, lambda **given: True, compiled=True)


def stock(made: Any) -> None:
    """As it was before compile_blocks."""
    made.__dict__.pop("forward", None)
    for part in made.modules():
        part._compiled_call_impl = None


def tokens_of(name: str, config: Any, inputs: dict[str, Any]) -> int:
    """Of a pass; of the text those that lie among them."""
    latents, text = inputs["hidden_states"], 0 if name.startswith("wan") else inputs["encoder_hidden_states"].shape[1]
    height, width = latents.shape[3:]
    frames, patch = latents.shape[1 if name.startswith("cogvideox") else 2], config.patch_size
    sides = patch if isinstance(patch, (tuple, list)) else (getattr(config, "patch_size_t", None) or 1, patch, patch)
    return len(latents) * ((frames // sides[0]) * (height // sides[1]) * (width // sides[2]) + text)


def rows(name: str, chosen: Any) -> Iterator[dict[str, Any]]:
    device, where = chosen.device, torch.device(chosen.device)
    width, height = (int(n) for n in chosen.size.split("x"))
    case = f"{name} {width}x{height}x{chosen.frames}"
    torch.manual_seed(0)
    made = network(name, device)
    inputs = INPUTS[name](made.config, width, height, chosen.frames, device)
    tokens = tokens_of(name, made.config, inputs)  # few are recorded behind the second pass

    def step() -> Tensor:
        answer: Tensor = made(**inputs)[0]
        return answer

    baseline: timing.Baseline = None
    want: Tensor | None = None

    def measured(run: str) -> list[dict[str, Any]]:
        nonlocal want
        answer, seconds = timing.timed(step, chosen.rounds, where, 2 if tokens <= MOST_TOKENS else 1)
        error = None if want is None else timing.relative(answer, want)
        if want is None and run.startswith(BASELINE):
            want = answer
        return [*timing.rows(f"{case} {run}", "step", seconds, where, baseline, error)]

    if not chosen.no_baseline:
        for part in made.modules():
            if isinstance(getattr(part, "processor", None), HunyuanVideoAttnProcessor2_0):
                part.set_processor(WithoutMask())
        with timing.cudnn(where):
            found = [] if chosen.no_eager else measured(BASELINE)
            if not chosen.no_compile:
                compile_blocks(made, where, tokens)
                found += measured(f"{BASELINE}, blocks compiled")
                stock(made)
        if not found:
            raise ValueError("--no-eager and --no-compile leave no baseline: --no-baseline says so")
        best = min((one for one in found if one["metric"] == "step"), key=lambda one: one["value"])
        baseline = (best["case"].removeprefix(f"{case} "), best["value"])
        yield from found

    model = model_of(name, made, device)
    timing.quantize(model.network, model.layers(), chosen.method, chosen.bits)
    model.fuse_projections()
    if where.type == "cuda":
        model.launch_as_one()
    torch.cuda.empty_cache()
    densities = [float(d) for d in chosen.densities.split(",")]
    for density in densities if chosen.no_dense else (None, *densities):
        plan = AttentionPlan(dense_qk_bits=8, pv_bits=8)
        if density is not None:
            plan = AttentionPlan(policy(chosen.policy, density), pv_bits=8)
        model.attend(plan)
        run = f"{chosen.bits.upper()} {chosen.method} " + ("dense" if density is None else said(chosen.policy, density))
        with recorded() as compiles:
            found = measured(run)
        yield from found
        if compiles:
            told = {"kernels": len(compiles), "of these read from the disk": sum(one.cached for one in compiles)}
            took = sum(one.seconds for one in compiles)
            yield report.row(f"{case} {run}", "compiling", took, "s", "lower", samples=1, error=told)
        if chosen.profile is not None:
            profile(step, chosen.profile / f"{name}-{density or 'dense'}.txt")

    if chosen.steps:
        residual = None
        first = f"first {chosen.warmup:.0%} dense"
        run = f"{chosen.bits.upper()} {chosen.method} {said(chosen.policy, densities[0])}, {first}"
        if chosen.refresh:
            its = (chosen.residual_order, chosen.residual_rank, chosen.residual_bits, chosen.residual_place)
            residual = Residual(chosen.refresh, *its)
            run += f", {residual.words()}, {residual.place}"
        sparse = policy(chosen.policy, densities[0])
        plan = AttentionPlan(sparse, chosen.warmup, dense_qk_bits=8, pv_bits=8, residual=residual)
        if residual is not None:  # what a first, a second and a third refresh run is compiled before the clock runs
            model.attend(replace(plan, warmup=0.0, residual=replace(residual, interval=1)))
            film(model, step, 6)
        model.attend(plan)
        timing.forget_peak(where)
        _, took = timing.clocked(lambda: film(model, step, chosen.steps), where)
        whole = baseline and (f"{chosen.steps} x {baseline[0]}", chosen.steps * baseline[1])
        ran = model.attention.density()
        error = {"effective_density": round(ran.effective, 4)}
        yield report.row(
            f"{case} {run}", f"{chosen.steps} steps", took, "s", "lower", samples=1, baseline=whole, error=error
        )
        yield from timing.peak(f"{case} {run}", where)
        if ran.residual is not None:
            kept, place = ran.residual.bytes / 2**30, ran.residual.place
            yield report.row(f"{case} {run}", f"residual on the {place}", kept, "GiB", "lower", samples=1)


def policy(name: str, density: float) -> Policy:
    """At this density, or what its first field is."""
    return fields.build(POLICIES, name, {fields.names(POLICIES[name])[0]: density})


def said(name: str, density: float) -> str:
    return f"density {density}" if name == "topk" else f"{name} {density}"


def film(model: VideoModel, step: Callable[[], Tensor], steps: int) -> None:
    """So many steps, one after another, the plan's dense ones and its refreshes among them."""
    model.attention.start(steps)
    for number in range(steps):
        model.attention.at(number)
        step()
    model.attention.finish()


def profile(step: Callable[[], Tensor], path: Path) -> None:
    """Which kernels a step's time goes to, as a table in a file."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(found.key_averages().table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=80))


def main() -> None:
    parser = ArgumentParser(prog="python -m models.step_bench", description="One denoising step at the true size.")
    parser.add_argument("name", choices=INPUTS)
    parser.add_argument("--size", default="1280x720")
    parser.add_argument("--frames", type=int, default=129)
    parser.add_argument("--method", default="rtn")
    parser.add_argument("--bits", default="w4a8")
    parser.add_argument("--policy", choices=[name for name in POLICIES if name != "dense"], default="topk")
    parser.add_argument("--densities", default="0.25,0.15,0.1", help="masses, of topp")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=0, help="of a whole run at the first density, besides")
    parser.add_argument("--warmup", type=float, default=0.1, help="the fraction of those that is dense")
    parser.add_argument("--refresh", type=int, default=0, help="of a whole run: sparse steps between two refreshes")
    parser.add_argument("--residual-order", type=int, default=2)
    parser.add_argument("--residual-rank", type=int, default=16)
    parser.add_argument("--residual-bits", type=int, default=8)
    parser.add_argument("--residual-place", choices=("device", "host"), default="device")
    parser.add_argument("--no-dense", action="store_true", help="leave our dense step out")
    parser.add_argument("--no-baseline", action="store_true")
    parser.add_argument("--no-eager", action="store_true", help="leave the baseline out that is not compiled")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled baseline out")
    parser.add_argument("--profile", type=Path, default=None, help="a folder for tables of kernel times")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    chosen = parser.parse_args()

    command = ["python", "-m", "models.step_bench", *sys.argv[1:]]
    path = chosen.out / f"{'film' if chosen.steps else 'step'}-{chosen.name}.jsonl"
    with torch.inference_mode():
        report.write(path, "step", timing.told(rows(chosen.name, chosen)), command, torch.device(chosen.device))
    print(path)


if __name__ == "__main__":
    main()
