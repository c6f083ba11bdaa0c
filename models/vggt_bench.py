"""python -m models.vggt_bench: VGGT-1B at its true size beside bfloat16, the aggregator alone and from end to end.

The network has random weights: time and memory do not depend on what they are. Everything runs in one process on one
GPU, the baseline first: our own network in bfloat16, dense heads too, four taps kept, its attention through cuDNN,
eagerly and with its blocks compiled. Then its layers are quantized in place, its blocks packed and its dense heads run
by passes, and the same views run once dense and once at each density. Of either side few views are launched as one,
heads too. The camera head is float32, as it is served; there is no point head, as none is served. `error` is relative,
against the eager baseline's last tap, or its logarithm of depth: of random weights it shows that the same function is
computed, not what a scene loses.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from models import timing
from models.vggt import VGGT_LIMITS, VIEWS_AT_ONCE, VggtModel, settle
from models.vggt_blocks import pack_blocks
from models.vggt_graph import LaunchedAggregator, launch_heads
from models.vggt_maps import pass_maps
from models.vggt_net import VGGT, VGGTConfig, fill_constants
from quant_runtime import report
from quant_runtime.attention import AttentionPlan
from quant_runtime.sparsity.topk import TopK

VGGT_1B = VGGTConfig(point_head=False)
BASELINE = "bfloat16 cuDNN"
COMPILED = f"{BASELINE}, blocks compiled"


def network(config: VGGTConfig, device: torch.device) -> VGGT:
    """Random weights as served in bfloat16: linear ones as large as their inputs are many, norms and LayerScale 1."""
    with torch.device("meta"):
        made = VGGT(config)
    made.to_empty(device=device)
    fill_constants(made)
    settle(made, device, torch.bfloat16, torch.bfloat16)
    for name, tensor in made.named_parameters():
        if tensor.dim() > 1:
            tensor.normal_(std=(tensor.numel() / len(tensor)) ** -0.5)
        else:
            tensor.fill_(0.0 if name.endswith("bias") else 1.0)
    return made


def compile_blocks(made: VGGT, device: torch.device) -> Callable[[], None]:
    """The aggregator's, each size of input for itself, and launched as one; what is returned takes it back."""
    torch._dynamo.reset()  # what was compiled for another number of views is no use here, and counts against a limit
    inside: Any = made.aggregator
    if device.type == "cuda":
        inside.forward = LaunchedAggregator(inside, tuple, compiled=True)
        launch_heads(made, inside.forward)
    blocks = [*inside.patch_embed.blocks, *inside.frame_blocks, *inside.global_blocks]
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False)

    def back() -> None:
        for block in blocks:
            block._compiled_call_impl = None
        inside.__dict__.pop("forward", None)
        for part, name in ((made.camera_head, "rounds"), (made.depth_head, "mapped"), (made.point_head, "mapped")):
            if part is not None:
                part.__dict__.pop(name, None)

    return back


def rows(chosen: Any, config: VGGTConfig = VGGT_1B) -> Iterator[dict[str, Any]]:
    device = torch.device(chosen.device)
    width, height = (int(n) for n in chosen.size.split("x"))
    torch.manual_seed(0)
    made = network(config, device)
    images = torch.rand(1, max(*chosen.views, *chosen.whole), 3, height, width, device=device)

    def aggregated(views: int) -> list[Tensor]:
        return made.aggregator(images[:, :views])

    def reconstructed(views: int) -> list[Tensor]:
        depth = made(images[:, :views], chunk=VIEWS_AT_ONCE).depth
        assert depth is not None
        return [depth.log_()]  # of random weights some are too large to be summed

    cases = [(f"{views} views, aggregator", partial(aggregated, views)) for views in chosen.views]
    cases += [(f"{views} views, end to end", partial(reconstructed, views)) for views in chosen.whole]
    best: dict[str, timing.Baseline] = {}
    wanted: dict[str, Tensor] = {}

    def measured(case: str, call: Callable[[], list[Tensor]], run: str) -> list[dict[str, Any]]:
        answers, seconds = timing.timed(call, chosen.rounds, device, warmups=2)  # few are recorded behind the second
        error = timing.relative(answers[-1], wanted[case].to(device)) if case in wanted else None
        if run == BASELINE:
            wanted[case] = answers[-1].cpu()  # not on the device: a tap of 200 views is most of a gigabyte
        name = f"vggt-1b {chosen.size}, {case}, {run}"
        return [*timing.rows(name, "time", seconds, device, best.get(case), error)]

    if not chosen.no_baseline:
        with timing.cudnn(device, SDPBackend.MATH):  # the camera head's, which are float32 of a token a view
            for case, call in cases:
                found = measured(case, call, BASELINE)
                times = {BASELINE: found[0]["value"]}
                if not chosen.no_compile:
                    back = compile_blocks(made, device)
                    found += (compiled := measured(case, call, COMPILED))
                    times[COMPILED] = compiled[0]["value"]
                    back()
                best[case] = min(times.items(), key=lambda one: one[1])
                yield from found

    model = VggtModel(made, VGGT_LIMITS)
    timing.quantize(made, model.layers(), chosen.method, chosen.bits)
    pack_blocks(made)
    if device.type == "cuda":
        pass_maps(made)
        model.launch_as_one()
    torch.cuda.empty_cache()
    for density in (None, *chosen.densities):
        dense = AttentionPlan(dense_qk_bits=8, pv_bits=8)
        model.attend(dense if density is None else replace(dense, policy=TopK(density)))
        run = f"{chosen.bits.upper()} {chosen.method} " + ("dense" if density is None else f"density {density}")
        for case, call in cases:
            yield from measured(case, call, run)


def numbers(kind: type) -> Callable[[str], tuple[Any, ...]]:
    return lambda text: tuple(kind(part) for part in text.split(",") if part)


def arguments(given: list[str]) -> Any:
    parser = ArgumentParser(prog="python -m models.vggt_bench", description="VGGT-1B at its true size.")
    parser.add_argument("--views", type=numbers(int), default=(10, 50, 100, 200), help="of the aggregator alone")
    parser.add_argument("--whole", type=numbers(int), default=(20, 100), help="views from end to end")
    parser.add_argument("--size", default="518x336")
    parser.add_argument("--method", default="rtn")
    parser.add_argument("--bits", default="w4a8")
    parser.add_argument("--densities", type=numbers(float), default=(0.25,), help="besides dense; may be empty")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--no-baseline", action="store_true")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled baseline out")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    return parser.parse_args(given)


def main() -> None:
    chosen, command = arguments(sys.argv[1:]), ["python", "-m", "models.vggt_bench", *sys.argv[1:]]
    path = chosen.out / "vggt-1b.jsonl"
    with torch.inference_mode():
        report.write(path, "vggt", timing.told(rows(chosen)), command, torch.device(chosen.device))
    print(path)


if __name__ == "__main__":
    main()
