"""python -m quant_runtime.bench NAME: times an op beside its baselines and writes docs/results/NAME-DEVICE.jsonl.

Rows as in quant_runtime/report.py: `value` is a median, `spread` the distance between its quartiles. All runs of a case
take turns, round after round, so that a busy machine is busy for all of them; on a shared machine read the ratio to the
baseline and not the milliseconds. `error` is relative, |got - want| / |want|, against float64: on random inputs, and
with one channel in 64 scaled by 30.
"""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quant_runtime import report
from quant_runtime.attention import AttentionPlan, AttentionState, attend
from quant_runtime.calibrate import LayerStats
from quant_runtime.formats import QuantFormat
from quant_runtime.kernels._cpu import keep_freed_memory
from quant_runtime.methods import METHODS
from quant_runtime.sparsity.base import TokenLayout
from quant_runtime.sparsity.topk import TopK


@dataclass(frozen=True)
class Run:
    """One way to do a case: what is timed, and what it answers."""

    call: Callable[[Tensor], Tensor]  # from the case's input
    dtype: torch.dtype  # that it takes its input in


@dataclass(frozen=True)
class Case:
    name: str
    inputs: dict[str, Tensor]  # "random" and "outliers", float32
    want: Callable[[Tensor], Tensor]  # the float64 answer
    runs: dict[str, Run]
    baselines: tuple[str, ...]  # names of runs; each other run is held against the fastest of them


ROUNDED = (
    *(("rtn", bits) for bits in ("W8A8", "FP8", "W4A8", "W4AFP8")),
    *(("smoothquant", "W4A8"), ("quarot", "W4A8")),
)
LINEARS = ((2160, 384, 1152), (4320, 384, 384), (4320, 384, 1152), (4320, 384, 768), (4320, 768, 384), (2088, 128, 512))


def linear(device: torch.device) -> Iterator[Case]:
    """A layer as the demo models have it, rows x inputs -> outputs, activations rounded inside the time."""
    for rows, inputs, outputs in LINEARS:
        layer = nn.Linear(inputs, outputs, device=device)
        half = nn.Linear(inputs, outputs, device=device, dtype=torch.bfloat16)
        half.load_state_dict(layer.state_dict())
        x = torch.randn(rows, inputs, device=device)
        stats = LayerStats(x.abs().amax(dim=0).cpu(), layer.weight.abs().amax(dim=0).cpu(), rows, x[:1].cpu())
        runs = {"float32": Run(layer, torch.float32), "bfloat16": Run(half, torch.bfloat16)}
        for method, bits in ROUNDED:
            quantized = METHODS[method]().quantize(layer, stats, QuantFormat.parse(bits))
            for dtype in (torch.float32, torch.bfloat16):
                runs[f"{bits} {method} {_short(dtype)}"] = Run(quantized, dtype)

        def want(x: Tensor, layer: nn.Linear = layer) -> Tensor:
            assert layer.bias is not None
            return F.linear(x.double(), layer.weight.double(), layer.bias.double())

        case = f"{rows}x{inputs}->{outputs}"
        yield Case(case, {"random": x, "outliers": outliers(x)}, want, runs, ("float32", "bfloat16"))


ATTENTIONS = ((2, 3, TokenLayout(9, 12, 20), 128), (1, 2, TokenLayout(8, 16, 16, special=5), 64))


def attention(device: torch.device) -> Iterator[Case]:
    """Self-attention as the demo models have it. Sparse runs choose their blocks and round q and k inside the time.

    The error of a sparse run on random inputs tells nothing of its quality (random attention is not sparse): it is
    there for the dense ones. q, k and v come as [3, B, H, N, D].
    """
    for batch, heads, layout, size in ATTENTIONS:
        x = torch.randn(3, batch, layout.tokens, heads, size, device=device).transpose(2, 3)
        runs = {f"dense {_short(d)}": Run(_attend(AttentionPlan(), layout), d) for d in (torch.float32, torch.bfloat16)}
        baselines = tuple(runs)
        for dtype in (torch.float32, torch.bfloat16):
            runs[f"dense int8 {_short(dtype)}"] = Run(_attend(AttentionPlan(dense_qk_bits=8), layout), dtype)
        for density in (0.15, 0.3):
            for bits in (16, 8):
                plan = AttentionPlan(TopK(density), qk_bits=8 if bits == 8 else 16)
                words = "int8" if bits == 8 else "float"
                runs[f"top-k {density} {words} float32"] = Run(_attend(plan, layout), torch.float32)
                runs[f"top-k {density} {words} bfloat16"] = Run(_attend(plan, layout), torch.bfloat16)
        case = f"{batch}x{heads}x{layout.tokens}x{size}"
        yield Case(case, {"random": x, "outliers": outliers(x)}, _float64_attention, runs, baselines)


def _attend(plan: AttentionPlan, layout: TokenLayout) -> Callable[[Tensor], Tensor]:
    state = AttentionState(plan)

    def call(x: Tensor) -> Tensor:
        state.start(steps=1)
        q, k, v = x
        return attend(q, k, v, layer=0, layout=layout, state=state)

    return call


def _float64_attention(x: Tensor) -> Tensor:
    q, k, v = x.double()
    return F.scaled_dot_product_attention(q, k, v)


def outliers(x: Tensor) -> Tensor:
    """The same with one channel in 64 scaled by 30."""
    scale = torch.ones(x.shape[-1], device=x.device)
    scale[::64] = 30.0
    return x * scale


BENCHES: dict[str, Callable[[torch.device], Iterator[Case]]] = {"linear": linear, "attention": attention}


def measure(case: Case, rounds: int) -> list[dict[str, Any]]:
    """Rows of one case, without what is the same for all rows."""
    inputs = {run.dtype: case.inputs["random"].to(run.dtype) for run in case.runs.values()}
    times: dict[str, list[float]] = {name: [] for name in case.runs}
    for number in range(rounds + 2):  # the first two warm up
        for name, run in case.runs.items():
            seconds = _seconds(run.call, inputs[run.dtype])
            if number >= 2:
                times[name].append(seconds * 1e3)

    wanted = {name: case.want(x) for name, x in case.inputs.items()}
    best = min(case.baselines, key=lambda name: median(times[name]))
    rows = []
    for name, run in case.runs.items():
        got = {kind: run.call(x.to(run.dtype)) for kind, x in case.inputs.items()}
        quarters = quantiles(times[name], n=4)
        rows.append(
            report.row(
                f"{case.name} {name}", "time", median(times[name]), "ms", "lower", samples=rounds,
                baseline=(best, median(times[best])), spread=quarters[2] - quarters[0],
                error={kind: float(f"{_relative(got[kind], wanted[kind]):.3g}") for kind in got},
            )
        )  # fmt: skip
    return rows


def _seconds(call: Callable[[Tensor], Tensor], x: Tensor) -> float:
    if x.device.type != "cuda":
        start = time.perf_counter()
        call(x)
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    call(x)
    after.record()
    torch.cuda.synchronize()
    return float(before.elapsed_time(after)) / 1e3


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> None:
    parser = ArgumentParser(prog="python -m quant_runtime.bench", description="Times an op beside its baselines.")
    parser.add_argument("name", choices=BENCHES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    chosen = parser.parse_args()
    device = torch.device(chosen.device)
    torch.manual_seed(0)
    keep_freed_memory()  # for the baselines as for ours
    command = ["python", "-m", "quant_runtime.bench", *sys.argv[1:]]
    path = chosen.out / f"{chosen.name}-{device.type}.jsonl"
    with torch.inference_mode():
        report.write(path, chosen.name, _rows(chosen.name, device, chosen.rounds), command, device)
    print(path)


def _rows(name: str, device: torch.device, rounds: int) -> Iterator[dict[str, Any]]:
    for case in BENCHES[name](device):
        for row in measure(case, rounds):
            against = f"{row['baseline']['value'] / row['value']:5.2f}x {row['baseline']['name']}"
            print(f"{row['case']:48} {row['value']:9.3f} ms  {against}  {row['error']}")
            yield row


if __name__ == "__main__":
    main()
