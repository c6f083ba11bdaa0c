"""Trains the demo VGGT from scratch on scenes rendered as it goes.

    python -m models.demo.scene.train --seconds 480 --out out/vggt --evaluate 64
    python -m models.demo.scene.train --resume out/vggt/state.pt --seconds 480 --out out/vggt

The schedule (learning rate, picture size, number of views, spread of the azimuths) is driven by the share of the
wall-clock budget that is spent, so that a run of any length ends at the end of its cosine. `--end 0.5` stops half-way
through the schedule and `--resume` goes on from there; `--begin` goes back to an earlier point of it. `--steps` counts
steps instead of seconds, and then the same seed gives the same run.

On CUDA the whole step, rendering and optimizer included, is one CUDA graph for each shape of the schedule, with the
per-token halves of the blocks and the depth loss compiled by inductor. Where either cannot be had the
program says so and goes on without.

Out: `config.json` and `model.safetensors` (the averaged weights, float16), `state.pt`, `curve.jsonl`, `results.jsonl`.

The recipe is the paper's (§3.4: AdamW, warm-up and cosine, clipped gradients, L1 on the poses of every iteration,
confidence-weighted depth) with choices of our own, for a small network that has minutes: layer scales start at
`layer_scale` in place of 0.01; depth errors are taken in log depth; azimuths start close together; queries and keys of
the global blocks start alike; and two tasks are read off the taps by linear maps that are thrown away after training:
where each patch lies in the first view's frame, and which patch of the first view shows the same place. They stand in
for the point head and the track head at a hundredth of their price.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from models.cameras import encode_pose, relative_to_first, unproject
from models.demo.scene import evaluate, render, scenes, textures
from models.vggt_net import VGGT, Block, LayerScale, Prediction, VGGTConfig, load, save_config
from quant_runtime import report

DEMO = VGGTConfig(
    img_size=224,
    embed_dim=128,
    num_heads=2,
    encoder_depth=4,
    depth=6,
    taps=(1, 2, 4, 5),
    camera_depth=1,
    camera_heads=4,
    dpt_features=48,
    dpt_channels=(32, 64, 128, 128),
    point_head=False,
)
TINY = replace(
    DEMO, img_size=56, embed_dim=32, num_heads=1, encoder_depth=1, depth=4, taps=(0, 1, 2, 3),
    dpt_features=16, dpt_channels=(8, 8, 16, 16),
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    share: float  # of the schedule
    size: int  # side of the pictures
    shapes: tuple[tuple[int, int], ...]  # (views, scenes) of the batches, taken in turn


@dataclass(frozen=True)
class TrainConfig:
    net: VGGTConfig = DEMO
    stages: tuple[Stage, ...] = (
        Stage(
            0.6, 112, ((4, 120), (2, 240), (3, 160))
        ),  # one number of pictures: one compiled version of what is per token
        Stage(0.4, 224, ((4, 30), (2, 60), (8, 15), (3, 40))),
    )
    seed: int = 0
    peak_lr: float = 8e-4
    last_lr: float = 0.01  # of the peak
    warm_up: float = 0.03  # of the schedule
    weight_decay: float = 0.05
    clip: float = 1.0
    average: float = 0.002  # weight of the newest weights in their running mean
    layer_scale: float = 0.3
    spread: tuple[float, float] = (25.0, 60.0)  # degrees, at the start and from `spread_done` on
    spread_done: float = 0.35  # of the schedule
    samples: int = 5  # rays for a pixel's colour
    dense_views: int = 2  # of each scene, from the first on, that get depth: frames do not see each other in that head
    camera_weight: float = 5.0
    depth_weight: float = 1.0
    probe_weight: float = 2.0
    probe_taps: tuple[int, ...] = (1, 3)  # of the four
    match_weight: float = 0.3
    match_tap: int = 0  # of the four
    alike: bool = True  # see initialise
    bf16: bool = True
    log_every: int = 50


CONFIGS = {
    "demo": TrainConfig(),
    "tiny": TrainConfig(
        net=TINY,
        stages=(Stage(0.7, 28, ((2, 8),)), Stage(0.3, 56, ((3, 3),))),
        peak_lr=3e-3,
        average=0.05,
        samples=1,
        bf16=False,
        log_every=5,
    ),
}


# What is learnt from


@dataclass(frozen=True)
class Target:
    """Truth in the frame of view 0's camera, in units of the mean distance of all visible points from it."""

    pose: Tensor  # [B, S, 9]
    depth: Tensor  # [B, S, H, W]
    points: Tensor  # [B, S, H, W, 3]


def target_of(views: render.Views) -> Target:
    extrinsics = relative_to_first(views.extrinsics)
    points = unproject(views.depth, extrinsics, views.intrinsics)
    scale = points.norm(dim=-1).flatten(1).mean(dim=1)
    pose = encode_pose(extrinsics, views.intrinsics, (views.depth.shape[-2], views.depth.shape[-1]))
    pose = torch.cat((pose[..., :3] / scale[:, None, None], pose[..., 3:]), dim=-1)
    scale = scale[:, None, None, None]
    return Target(pose, views.depth / scale, points / scale[..., None])


def camera_loss(iterations: Tensor, pose: Tensor) -> Tensor:
    """L1 of the pose encodings of every iteration [4, B, S, 9], the earlier ones weighing less."""
    error = (iterations - pose).abs()
    each = error[..., :3].mean((1, 2, 3)) + error[..., 3:7].mean((1, 2, 3)) + 0.5 * error[..., 7:].mean((1, 2, 3))
    weights = torch.full_like(each, 0.6).pow(torch.arange(len(each) - 1, -1, -1, device=each.device))
    return (weights * each).mean()


def depth_loss(depth: Tensor, confidence: Tensor, want: Tensor) -> Tensor:
    """Error in log depth, the same weighted by confidence (whose logarithm earns 0.2), and the error's gradients.

    All [n, H, W]. The gradients are those of the error at four scales, each half as fine as the one before.
    """
    error = depth.clamp(min=1e-4).log() - want.log()
    residual = error.abs()
    loss = residual.mean() + (confidence * residual - 0.2 * confidence.log()).mean()
    for scale in range(4):
        coarse = error[:, :: 2**scale, :: 2**scale]
        loss = loss + 0.25 * (coarse.diff(dim=1).abs().mean() + coarse.diff(dim=2).abs().mean())
    return loss


class Probe(nn.Module):
    """Where the middle of each quarter of a patch lies in view 0's frame, by a linear map of the patch's token."""

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        self.patch, self.special = config.patch_size, config.special
        self.norm = nn.LayerNorm(2 * config.embed_dim)
        self.linear = nn.Linear(2 * config.embed_dim, 12)

    def loss(self, tap: Tensor, target: Target) -> Tensor:
        """tap [B, S, tokens, 2 * dim]: L1 of the points, each over 0.3 + its depth: far walls do not rule."""
        half = self.patch // 2
        places = [quarter * half + half // 2 for quarter in (0, 1)]
        want = target.points.unflatten(2, (-1, self.patch)).unflatten(4, (-1, self.patch))
        near = target.depth.unflatten(2, (-1, self.patch)).unflatten(4, (-1, self.patch))
        want = torch.stack([want[:, :, :, i, :, j] for i in places for j in places], dim=4)  # [B, S, h, w, 4, 3]
        near = torch.stack([near[:, :, :, i, :, j] for i in places for j in places], dim=4)
        got = self.linear(self.norm(tap[:, :, self.special :].float())).float().unflatten(-1, (4, 3))
        error = (got - want.flatten(2, 3)).abs().mean(-1)
        return (error / (0.3 + near.flatten(2, 3))).mean()


class Matcher(nn.Module):
    """Which patch of view 0 shows what a patch of another view shows, by the angle between maps of their tokens."""

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        self.patch, self.special = config.patch_size, config.special
        self.norm = nn.LayerNorm(2 * config.embed_dim)
        self.linear = nn.Linear(2 * config.embed_dim, 64)
        self.sharpness = nn.Parameter(torch.tensor(10.0))

    def loss(self, tap: Tensor, target: Target) -> Tensor:
        """tap [B, S, tokens, 2 * dim]: cross-entropy over view 0's patches, for patches whose middle it sees."""
        size, middle = target.depth.shape[-1], self.patch // 2
        places = target.points[:, 1:, middle :: self.patch, middle :: self.patch]  # [B, S - 1, h, w, 3]
        focal = (size / 2) / torch.tan(target.pose[:, 0, 8] / 2)
        x, y, z = places.unbind(-1)
        u, v = (
            (part / z.clamp(min=1e-3) * focal[:, None, None, None] + size / 2).round().clamp(-1, size).long()
            for part in (x, y)
        )
        inside = (u >= 0) & (u < size) & (v >= 0) & (v < size) & (z > 1e-3)
        u, v = u.clamp(0, size - 1), v.clamp(0, size - 1)
        first = target.depth[:, 0].flatten(1).gather(1, (v * size + u).flatten(1)).view_as(z)
        seen = (inside & ((first - z).abs() < 0.05 * z)).flatten(1).float()
        right = (v // self.patch * (size // self.patch) + u // self.patch).flatten(1)

        features = F.normalize(self.linear(self.norm(tap[:, :, self.special :].float())).float(), dim=-1)
        scores = features[:, 1:].flatten(1, 2) @ features[:, 0].transpose(-1, -2) * self.sharpness
        wrong = F.cross_entropy(scores.transpose(1, 2), right, reduction="none")
        return (wrong * seen).sum() / seen.sum().clamp(min=1)


def initialise(net: VGGT, layer_scale: float, alike: bool) -> None:
    """Weights to start from, in place: poses near the identity, fields of view above zero, below which relu is deaf.

    `alike` starts the global blocks with the same projection for queries and keys: a token first looks at its likes.
    """
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, LayerScale):
            nn.init.constant_(module.gamma, layer_scale)
    encoder = net.aggregator.patch_embed
    nn.init.xavier_uniform_(encoder.patch_embed.proj.weight.flatten(1))
    for table in (encoder.cls_token, encoder.pos_embed, encoder.register_tokens):
        nn.init.normal_(table, std=0.02)
    nn.init.normal_(net.aggregator.camera_token, std=0.5)
    nn.init.normal_(net.aggregator.register_token, std=0.5)
    if alike:
        with torch.no_grad():
            for block in net.aggregator.global_blocks:
                query, key, _ = block.attn.qkv.weight.chunk(3)
                key.copy_(query)
    last = net.camera_head.pose_branch.fc2
    with torch.no_grad():
        last.weight.mul_(0.1)
        last.bias[6:].fill_(0.25)  # w of the quaternion and both fields of view: 1 after the four rounds
        net.depth_head.scratch.output_conv2[2].weight.mul_(0.1)


# The schedule


def learning_rate(config: TrainConfig, progress: float) -> float:
    if progress < config.warm_up:
        return config.peak_lr * progress / config.warm_up
    along = (progress - config.warm_up) / (1 - config.warm_up)
    return config.peak_lr * (config.last_lr + (1 - config.last_lr) * 0.5 * (1 + math.cos(math.pi * min(along, 1.0))))


def spread_at(config: TrainConfig, progress: float) -> float:
    first, last = config.spread
    return first + (last - first) * min(progress / config.spread_done, 1.0)


def stage_at(config: TrainConfig, progress: float) -> int:
    end = 0.0
    for index, stage in enumerate(config.stages):
        end += stage.share
        if progress < end - 1e-9:
            return index
    return len(config.stages) - 1


# The step


METRICS = ("loss", "camera", "depth", "probe", "match", "rotation_deg", "absrel", "grad_norm")


@dataclass
class Run:
    """All that a step changes, and the functions that it calls. Buffers never move: CUDA graphs point at them."""

    config: TrainConfig
    device: str
    net: VGGT
    probes: nn.ModuleList  # of config.probe_taps, in order
    matcher: Matcher
    average: list[Tensor]
    optimizer: torch.optim.Optimizer
    lr: Tensor
    totals: Tensor
    pyramid: Tensor
    traced: render.Trace | None = None  # None: whatever is fastest on this device
    depth_loss: Callable[..., Tensor] = depth_loss
    graphs: dict[tuple[int, int, int], tuple[torch.cuda.CUDAGraph, scenes.Scenes]] = field(default_factory=dict)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [*self.net.parameters(), *self.probes.parameters(), *self.matcher.parameters()]


def start(config: TrainConfig, device: str) -> Run:
    torch.manual_seed(config.seed)
    net = VGGT(config.net)
    probes = nn.ModuleList(Probe(config.net) for _ in config.probe_taps)
    matcher = Matcher(config.net)
    initialise(net, config.layer_scale, config.alike)
    net, probes, matcher = net.to(device), probes.to(device), matcher.to(device)
    if device == "cuda":
        net.depth_head.to(memory_format=torch.channels_last)
    parameters = [*net.parameters(), *probes.parameters(), *matcher.parameters()]
    on_gpu = device == "cuda"
    lr = torch.zeros((), device=device)
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2 and p.shape[0] != 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2 or p.shape[0] == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr if on_gpu else 0.0, betas=(0.9, 0.95), fused=True, capturable=on_gpu)
    if on_gpu:
        for group in optimizer.param_groups:
            group["lr"] = lr  # this very tensor: a CUDA graph reads it
    return Run(
        config=config,
        device=device,
        net=net,
        probes=probes,
        matcher=matcher,
        average=[p.detach().clone() for p in net.parameters()],
        optimizer=optimizer,
        lr=lr,
        totals=torch.zeros(len(METRICS) + 1, device=device),
        pyramid=textures.load().to(device),
    )


def losses(run: Run, drawn: scenes.Scenes, size: int) -> tuple[Tensor, Tensor]:
    """The loss of one batch, and METRICS without the gradient's norm, detached."""
    config = run.config
    with torch.no_grad():
        views = render.render(drawn, size, run.pyramid, config.samples, run.traced)
        target = target_of(views)
    with torch.autocast(run.device, torch.bfloat16, enabled=config.bf16):
        taps = run.net.aggregator(views.images)
        got: Prediction = run.net.heads(taps, (size, size), config.dense_views, chunk=0)
    camera = camera_loss(got.pose_iterations, target.pose)
    probe = sum(
        (p.loss(taps[i], target) for i, p in zip(config.probe_taps, run.probes, strict=True)), camera.new_zeros(())
    )
    match = run.matcher.loss(taps[config.match_tap], target)
    if got.depth is None or got.depth_conf is None:
        raise ValueError("dense_views is at least 1: the depth head has to learn too")
    want = target.depth[:, : config.dense_views]
    depth = run.depth_loss(got.depth.flatten(0, 1), got.depth_conf.flatten(0, 1), want.flatten(0, 1))
    loss = (
        config.camera_weight * camera
        + config.depth_weight * depth
        + config.probe_weight * probe
        + config.match_weight * match
    )
    with torch.no_grad():
        chord = (F.normalize(got.pose[..., 1:, 3:7], dim=-1) * target.pose[..., 1:, 3:7]).sum(-1).abs().clamp(max=1)
        rotation = torch.rad2deg(2 * torch.acos(chord)).mean()
        relative = ((got.depth - want).abs() / want).mean()
        facts = torch.stack((loss, camera, depth, probe, match, rotation, relative)).detach()
    return loss, facts


def step(run: Run, drawn: scenes.Scenes, size: int) -> None:
    """One step on `drawn`: render, forward, backward, clip, update, average. Does not wait for the device."""
    loss, facts = losses(run, drawn, size)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(run.parameters, run.config.clip)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        torch._foreach_lerp_(run.average, [p.detach() for p in run.net.parameters()], run.config.average)
        run.totals += torch.cat((facts, norm[None].float(), torch.ones_like(norm)[None]))


def compile_parts(run: Run) -> None:
    """Let inductor fuse what is elementwise: between the attentions, and in the depth loss."""
    # Symbolic sizes: compiled once for all stages. A version for each would be a little faster and take a minute more.
    before, after = (torch.compile(part, dynamic=True) for part in (Block.before, Block.after))
    for block in run.net.aggregator.modules():
        if isinstance(block, Block):
            # On the instance, where plain_parts can take it away again; one compiled version serves all blocks.
            block.__dict__["before"] = types.MethodType(before, block)
            block.__dict__["after"] = types.MethodType(after, block)
    run.depth_loss = torch.compile(depth_loss, dynamic=True)


def plain_parts(run: Run) -> None:
    """Undo compile_parts."""
    for block in run.net.aggregator.modules():
        if isinstance(block, Block):
            block.__dict__.pop("before", None)
            block.__dict__.pop("after", None)
    run.depth_loss = depth_loss


def shapes_of(config: TrainConfig, begin: float, end: float) -> list[tuple[int, int, int]]:
    """(size, views, scenes) of every batch between two points of the schedule, without repeats."""
    wanted = range(stage_at(config, begin), stage_at(config, max(begin, end - 1e-6)) + 1)
    every = [(config.stages[i].size, views, count) for i in wanted for views, count in config.stages[i].shapes]
    return list(dict.fromkeys(every))


def prepare(run: Run, shapes: list[tuple[int, int, int]], use_compile: bool, use_graphs: bool) -> None:
    """Compile and capture for these shapes, ahead of the clock. Its steps leave no trace in the weights."""
    kept = snapshot(run)
    if use_compile:
        compile_parts(run)
        try:
            _warm_up(run, shapes)
        except Exception as error:  # whatever a compiler may throw: training slower beats losing the machine's time
            print(f"COMPILE FAILED, GOING ON UNCOMPILED: {type(error).__name__}: {error}", flush=True)
            plain_parts(run)
            use_compile = False
    if not use_compile:
        _warm_up(run, shapes)
    if use_graphs:
        pool = None
        for shape in shapes:
            size, views, count = shape
            static = scenes.draw(scenes.generator("train", run.config.seed, 0), count, views).to(run.device)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=pool):
                    step(run, static, size)
            except Exception as error:  # the same: a step that cannot be captured can still be run
                print(
                    f"CAPTURE OF {shape} FAILED, GOING ON WITHOUT GRAPHS: {type(error).__name__}: {error}", flush=True
                )
                run.graphs.clear()
                torch.cuda.synchronize()
                break
            pool = pool or graph.pool()
            run.graphs[shape] = (graph, static)
            milliseconds = _time(graph.replay)
            print(f"step at {size}² with {views} views of {count} scenes: {milliseconds:.2f} ms", flush=True)
    restore(run, kept)


def _warm_up(run: Run, shapes: list[tuple[int, int, int]]) -> None:
    side = torch.cuda.Stream() if run.device == "cuda" else None
    with torch.cuda.stream(side):
        for size, views, count in shapes:
            began = time.perf_counter()
            for attempt in range(3 if side else 1):
                step(
                    run,
                    scenes.draw(scenes.generator("train", run.config.seed, attempt), count, views).to(run.device),
                    size,
                )
            if side:
                side.synchronize()
            print(
                f"prepared {size}² with {views} views of {count} scenes in {time.perf_counter() - began:.1f} s",
                flush=True,
            )
    if side:
        torch.cuda.current_stream().wait_stream(side)


def _time(work: Callable[[], object], repeats: int = 10) -> float:
    """Milliseconds of device time for one call."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    work()
    first.record()
    for _ in range(repeats):
        work()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / repeats


def snapshot(run: Run) -> dict[str, object]:
    """A copy of all that training has changed; only tensors and plain values, so that it loads with weights_only."""
    return {
        "net": {key: value.detach().clone() for key, value in run.net.state_dict().items()},
        "probes": {key: value.detach().clone() for key, value in run.probes.state_dict().items()},
        "matcher": {key: value.detach().clone() for key, value in run.matcher.state_dict().items()},
        "average": [value.clone() for value in run.average],
        "moments": [
            {
                name: value.detach().clone()
                for name, value in run.optimizer.state[p].items()
                if isinstance(value, Tensor)
            }
            for p in run.parameters
        ],
    }


@torch.no_grad()
def restore(run: Run, kept: dict[str, Any]) -> None:
    """Bring back a snapshot, in place. Moments that it does not have become zero."""
    run.net.load_state_dict(kept["net"])
    run.probes.load_state_dict(kept["probes"])
    run.matcher.load_state_dict(kept["matcher"])
    for value, old in zip(run.average, kept["average"], strict=True):
        value.copy_(old)
    for parameter, old in zip(run.parameters, kept["moments"], strict=True):
        state = run.optimizer.state[parameter]
        for name, value in old.items():
            if isinstance(state.get(name), Tensor):
                state[name].copy_(value)
            else:
                state[name] = value.to(parameter.device) if name != "step" or run.device == "cuda" else value.cpu()
        for name in state.keys() - old.keys():
            state[name].zero_()
    run.totals.zero_()


def train(
    run: Run,
    out: Path,
    seconds: float = math.inf,
    steps: int | None = None,
    begin: float = 0.0,
    end: float = 1.0,
    use_compile: bool = False,
    use_graphs: bool = False,
    resume: dict[str, Any] | None = None,
    state: Path | None = None,
) -> list[dict[str, float]]:
    """Follow the schedule from `begin` to `end` in `seconds` of wall clock, preparations included, or in `steps` steps.

    Writes the curve as it goes, and once a minute and at the end the averaged weights into `out` and all that is needed
    to go on into `state`. Returns the curve.
    """
    if (steps is None) == math.isinf(seconds):
        raise ValueError("give either seconds or steps")
    config, origin = run.config, time.perf_counter()
    first = int(resume["step"]) if resume else 0
    if resume:
        restore(run, resume)
    prepare(run, shapes_of(config, begin, end), use_compile, use_graphs)
    began = time.perf_counter()
    budget = max(1.0, seconds - (began - origin) - 5.0)  # five seconds to save
    print(
        f"prepared in {began - origin:.1f} s; training for {f'{steps} steps' if steps else f'{budget:.0f} s'}",
        flush=True,
    )

    curve: list[dict[str, float]] = []
    seen = int(resume["scenes"]) if resume else 0
    done, noted, noted_at, told_at, saved_at = 0, 0, began, -math.inf, began
    with (out / "curve.jsonl").open("a") as file:
        while True:
            spent = done / steps if steps else (time.perf_counter() - began) / budget
            progress = begin + (end - begin) * spent
            if spent >= 1:
                break
            stage = config.stages[stage_at(config, progress)]
            views, count = stage.shapes[(first + done) % len(stage.shapes)]
            rate = learning_rate(config, progress)
            if run.device == "cuda":
                run.lr.fill_(rate)
            else:
                for group in run.optimizer.param_groups:
                    group["lr"] = rate
            drawn = scenes.draw(
                scenes.generator("train", config.seed, first + done), count, views, spread_at(config, progress)
            ).to(run.device)
            shape = (stage.size, views, count)
            if shape in run.graphs:
                graph, static = run.graphs[shape]
                static.copy_(drawn)
                graph.replay()
            else:
                step(run, drawn, stage.size)
            done, seen = done + 1, seen + count
            if done % config.log_every == 0 or done == steps:
                *sums, number = run.totals.tolist()  # waits for the device
                run.totals.zero_()
                now = time.perf_counter()
                row = {
                    "step": first + done,
                    "scenes": seen,
                    "progress": round(progress, 4),
                    "size": stage.size,
                    "lr": rate,
                }
                row |= {name: round(value / number, 5) for name, value in zip(METRICS, sums, strict=True)}
                row |= {"seconds": round(now - began, 2), "ms_step": round((now - noted_at) * 1e3 / (done - noted), 2)}
                noted, noted_at = done, now
                curve.append(row)
                file.write(json.dumps(row) + "\n")
                file.flush()
                if steps or now - told_at > 10:
                    print(" ".join(f"{name}={value:g}" for name, value in row.items()), flush=True)
                    told_at = now
                if not math.isfinite(row["loss"]):
                    raise FloatingPointError(
                        f"the loss is {row['loss']} at step {row['step']}; what was saved is older"
                    )
                if now - saved_at > 60:  # a lent machine may be taken away
                    save(run, out, state, {"step": first + done, "scenes": seen, "progress": progress})
                    saved_at = now
    save(run, out, state, {"step": first + done, "scenes": seen, "progress": min(progress, end)})
    return curve


def averaged(run: Run) -> VGGT:
    """The network with the running mean of the weights, float32, on the run's device, uncompiled."""
    net = VGGT(run.config.net).to(run.device)
    with torch.no_grad():
        for parameter, mean in zip(net.parameters(), run.average, strict=True):
            parameter.copy_(mean)
    return net.eval()


def save(run: Run, out: Path, state: Path | None, where: dict[str, float]) -> None:
    """`config.json` and `model.safetensors`, float16, into `out`; a snapshot and where the run stands into `state`."""
    torch.save(snapshot(run) | where, state or out / "state.pt")
    weights = {key: value.half().cpu().contiguous() for key, value in averaged(run).state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    save_config(run.config.net, out / "config.json")
    print(f"{out / 'model.safetensors'}: {(out / 'model.safetensors').stat().st_size / 2**20:.2f} MiB", flush=True)


def configured(name: str, changes: list[str]) -> TrainConfig:
    """A named config with `field=value` changes, the values in JSON."""
    config = CONFIGS[name]
    names = {f.name for f in fields(TrainConfig)} - {"net"}
    for change in changes:
        key, _, value = change.partition("=")
        if key not in names:
            raise ValueError(f"--set takes one of {', '.join(sorted(names))}; got {change}")
        parsed = json.loads(value)
        if key == "stages":
            parsed = [Stage(share, size, tuple(tuple(shape) for shape in shapes)) for share, size, shapes in parsed]
        config = replace(config, **{key: tuple(parsed) if isinstance(parsed, list) else parsed})
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo VGGT.")
    parser.add_argument("--config", choices=sorted(CONFIGS), default="demo")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=JSON", help="change a field of the config")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--seconds", type=float, default=math.inf, help="wall clock, preparations and saving included")
    length.add_argument("--steps", type=int)
    parser.add_argument(
        "--begin", type=float, help="point of the schedule to begin at; by default where --resume left off"
    )
    parser.add_argument("--end", type=float, default=1.0, help="point of the schedule to end at")
    parser.add_argument("--resume", type=Path, help="a state.pt: weights, averages and moments")
    parser.add_argument("--weights", type=Path, help="begin with a folder's averaged weights, and no moments")
    parser.add_argument("--state", type=Path, help="where to leave the state (about 80 MB); by default in --out")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument(
        "--evaluate", type=int, default=0, metavar="N", help="measure on N held-out scenes per number of views"
    )
    arguments = parser.parse_args()

    config = configured(arguments.config, arguments.set)
    on_gpu = arguments.device == "cuda"
    if on_gpu:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.enable_cudnn_sdp(
            False
        )  # flash attention is as fast at these lengths and captures without plans
    arguments.out.mkdir(parents=True, exist_ok=True)
    run = start(config, arguments.device)
    if arguments.weights:
        given, _ = load(arguments.weights)
        run.net.load_state_dict(given.float().state_dict())
        run.average = [p.detach().clone() for p in run.net.parameters()]
    resume = (
        torch.load(arguments.resume, map_location=arguments.device, weights_only=True) if arguments.resume else None
    )
    begin = arguments.begin if arguments.begin is not None else (resume or {}).get("progress", 0.0)
    train(
        run,
        arguments.out,
        arguments.seconds,
        arguments.steps,
        begin,
        arguments.end,
        use_compile=on_gpu and not arguments.no_compile,
        use_graphs=on_gpu and not arguments.no_graphs,
        resume=resume,
        state=arguments.state,
    )
    if arguments.evaluate:
        predict = evaluate.predictor(averaged(run))
        found = evaluate.evaluate(
            {arguments.out.name: predict}, arguments.evaluate, config.stages[-1].size, arguments.device
        )
        command = ["python", "-m", "models.demo.scene.train", *sys.argv[1:]]
        device = torch.device(arguments.device)
        report.write(arguments.out / "results.jsonl", "demo_scene", evaluate.rows(found), command, device)


if __name__ == "__main__":
    main()
