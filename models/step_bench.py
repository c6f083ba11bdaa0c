"""python -m models.step_bench NAME: one denoising step of a published network at its true size, beside bfloat16.

The network has random weights: time and memory do not depend on what they are. Everything runs in one process on one
GPU, the baseline first: diffusers' own network in bfloat16, its attention through cuDNN and without the mask that it
would build (all text is real here, and a mask slows it), eagerly and with its blocks compiled. Then its layers are
quantized in place, and the same step runs once dense and once at each density. `error` is relative, against the eager
baseline's answer: of random weights it shows that the same function is computed, not what a film loses.

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
from statistics import median, quantiles
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from models import registry
from models.published import PUBLISHED
from models.video import VideoModel
from quant_runtime import report
from quant_runtime.attention import AttentionPlan, Density
from quant_runtime.formats import QuantFormat
from quant_runtime.methods import METHODS, Streamable
from quant_runtime.residual import Residual
from quant_runtime.sparsity.topk import TopK


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


def hunyuan_inputs(width: int, height: int, frames: int, device: str) -> dict[str, Any]:
    """256 real tokens of text."""
    return {
        "hidden_states": _noise(device, 16, (frames - 1) // 4 + 1, height // 8, width // 8),
        "timestep": torch.tensor([500.0], device=device),
        "encoder_hidden_states": _noise(device, 256, 4096),
        "encoder_attention_mask": torch.ones(1, 256, device=device, dtype=torch.bfloat16),
        "pooled_projections": _noise(device, 768),
        "guidance": torch.tensor([6000.0], device=device),
        "return_dict": False,
    }


def wan_inputs(width: int, height: int, frames: int, device: str) -> dict[str, Any]:
    """512 tokens of text, which Wan pads to and does not mask."""
    return {
        "hidden_states": _noise(device, 16, (frames - 1) // 4 + 1, height // 8, width // 8),
        "timestep": torch.tensor([500], device=device),
        "encoder_hidden_states": _noise(device, 512, 4096),
        "return_dict": False,
    }


def _noise(device: str, *shape: int) -> Tensor:
    return torch.randn(1, *shape, device=device, dtype=torch.bfloat16)


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


INPUTS = {"hunyuan-video": hunyuan_inputs, "wan-2.1-14b": wan_inputs, "wan-2.1-1.3b": wan_inputs}


def model_of(name: str, made: nn.Module, device: str) -> VideoModel:
    """As a worker has it, without encoders and autoencoder."""
    family: Any = registry.family(PUBLISHED[name].family)
    pipeline = family.pipelines[0]
    parts = dict.fromkeys(inspect.signature(pipeline.__init__).parameters.keys() - {"self"})
    return family.model(pipeline(**parts | {"transformer": made}), family.serving(), device)


def quantize(model: VideoModel, method: str, bits: str) -> None:
    """Every layer that shrinks, in place, without data."""
    how, format_ = METHODS[method](), QuantFormat.parse(bits)
    if not isinstance(how, Streamable) or how.calibrated:
        raise ValueError(f"{method} needs calibration, and random weights have nothing to be calibrated for")
    for name in model.layers():
        layer = model.network.get_submodule(name)
        model.network.set_submodule(name, how.quantize(layer, None, format_))
    model.fuse_projections()


def timed(call: Callable[[], Tensor], rounds: int) -> tuple[Tensor, list[float]]:
    """What the last of `rounds` answered, and their seconds, after one that warms up."""
    call()
    seconds = []
    for _ in range(rounds):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        answer = call()
        after.record()
        torch.cuda.synchronize()
        seconds.append(before.elapsed_time(after) / 1e3)
    return answer, seconds


def rows(name: str, chosen: Any) -> Iterator[dict[str, Any]]:
    device = chosen.device
    width, height = (int(n) for n in chosen.size.split("x"))
    case = f"{name} {width}x{height}x{chosen.frames}"
    torch.manual_seed(0)
    made = network(name, device)
    inputs = INPUTS[name](width, height, chosen.frames, device)

    def step() -> Tensor:
        answer: Tensor = made(**inputs)[0]
        return answer

    baseline: tuple[str, float] | None = None
    want: Tensor | None = None

    def measured(run: str, answer: Tensor, seconds: list[float]) -> list[dict[str, Any]]:
        error = None if want is None else float(f"{relative(answer, want):.3g}")
        quarters = quantiles(seconds, n=4) if len(seconds) > 1 else [0.0] * 3
        time = report.row(
            f"{case} {run}", "step", median(seconds), "s", "lower", samples=len(seconds), baseline=baseline,
            spread=quarters[2] - quarters[0], error=error,
        )  # fmt: skip
        peak = torch.cuda.max_memory_allocated() / 2**30
        return [time, report.row(f"{case} {run}", "peak memory", peak, "GiB", "lower", samples=1)]

    if not chosen.no_baseline:
        for part in made.modules():
            if isinstance(getattr(part, "processor", None), HunyuanVideoAttnProcessor2_0):
                part.set_processor(WithoutMask())
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
            torch.cuda.reset_peak_memory_stats()
            answer, seconds = timed(step, chosen.rounds)
            found = measured("bfloat16 cuDNN", answer, seconds)
            want = answer
            if not chosen.no_compile:
                made.compile_repeated_blocks(fullgraph=True)
                answer, compiled = timed(step, chosen.rounds)
                found += measured("bfloat16 cuDNN, blocks compiled", answer, compiled)
                for block in made.modules():
                    block._compiled_call_impl = None
        best = min((one for one in found if one["metric"] == "step"), key=lambda one: one["value"])
        baseline = (best["case"].removeprefix(f"{case} "), best["value"])
        yield from found

    model = model_of(name, made, device)
    quantize(model, chosen.method, chosen.bits)
    torch.cuda.empty_cache()
    densities = [float(d) for d in chosen.densities.split(",")]
    for density in densities if chosen.no_dense else (None, *densities):
        plan = AttentionPlan(dense_qk_bits=8, pv_bits=8) if density is None else AttentionPlan(TopK(density), pv_bits=8)
        model.attend(plan)
        torch.cuda.reset_peak_memory_stats()
        answer, seconds = timed(step, chosen.rounds)
        run = f"{chosen.bits.upper()} {chosen.method} " + ("dense" if density is None else f"density {density}")
        yield from measured(run, answer, seconds)
        if chosen.profile is not None:
            profile(step, chosen.profile / f"{name}-{density or 'dense'}.txt")

    if chosen.steps:
        residual = None
        run = f"{chosen.bits.upper()} {chosen.method} density {densities[0]}, first {chosen.warmup:.0%} dense"
        if chosen.refresh:
            its = (chosen.residual_order, chosen.residual_rank, chosen.residual_bits, chosen.residual_place)
            residual = Residual(chosen.refresh, *its)
            run += f", {residual.words()}"
        plan = AttentionPlan(TopK(densities[0]), chosen.warmup, dense_qk_bits=8, pv_bits=8, residual=residual)
        if residual is not None:  # kernels of a first and of a second refresh are compiled before the clock runs
            model.attend(replace(plan, warmup=0.0, residual=replace(residual, interval=1)))
            film(model, step, 4)
        model.attend(plan)
        torch.cuda.reset_peak_memory_stats()
        took = film(model, step, chosen.steps)
        whole = baseline and (f"{chosen.steps} x {baseline[0]}", chosen.steps * baseline[1])
        ran = model.attention.density()
        error = {"effective_density": round(ran.effective, 4)}
        yield report.row(
            f"{case} {run}", f"{chosen.steps} steps", took, "s", "lower", samples=1, baseline=whole, error=error
        )
        yield from sizes(case, run, ran)


def sizes(case: str, run: str, ran: Density) -> Iterator[dict[str, Any]]:
    """Of a whole run: what it took at most, and what of that its residual was."""
    peak = torch.cuda.max_memory_allocated() / 2**30
    yield report.row(f"{case} {run}", "peak memory", peak, "GiB", "lower", samples=1)
    if ran.residual is not None:
        kept, place = ran.residual.bytes / 2**30, ran.residual.place
        yield report.row(f"{case} {run}", f"residual on the {place}", kept, "GiB", "lower", samples=1)


def film(model: VideoModel, step: Callable[[], Tensor], steps: int) -> float:
    """Seconds of so many steps, one after another, the plan's dense ones and its refreshes among them."""
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    model.attention.start(steps)
    before.record()
    for number in range(steps):
        model.attention.at(number)
        step()
    after.record()
    torch.cuda.synchronize()
    model.attention.finish()
    return before.elapsed_time(after) / 1e3


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


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
    parser.add_argument("--densities", default="0.25,0.15,0.1")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=0, help="of a whole run at the first density, besides")
    parser.add_argument("--warmup", type=float, default=0.1, help="the fraction of those that is dense")
    parser.add_argument("--refresh", type=int, default=0, help="of a whole run: sparse steps between two refreshes")
    parser.add_argument("--residual-order", type=int, default=2)
    parser.add_argument("--residual-rank", type=int, default=16)
    parser.add_argument("--residual-bits", type=int, default=8)
    parser.add_argument("--residual-place", default="device")
    parser.add_argument("--no-dense", action="store_true", help="leave our dense step out")
    parser.add_argument("--no-baseline", action="store_true")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled baseline out")
    parser.add_argument("--profile", type=Path, default=None, help="a folder for tables of kernel times")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    chosen = parser.parse_args()

    def told() -> Iterator[dict[str, Any]]:
        for found in rows(chosen.name, chosen):
            what = f"{found['value']:8.3f} {found['unit']}  {found['baseline'] or ''}  {found['error'] or ''}"
            print(f"{found['case']:64} {what}", flush=True)
            yield found

    command = ["python", "-m", "models.step_bench", *sys.argv[1:]]
    path = chosen.out / f"{'film' if chosen.steps else 'step'}-{chosen.name}.jsonl"
    with torch.inference_mode():
        report.write(path, "step", told(), command, torch.device(chosen.device))
    print(path)


if __name__ == "__main__":
    main()
