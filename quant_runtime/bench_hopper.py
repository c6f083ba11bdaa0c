"""python -m quant_runtime.bench_hopper NAME: the GPU's kernels at the size of HunyuanVideo at 720p, beside baselines.

119,056 tokens: 118,800 of video and 256 of text; 24 heads of 128, inner size 3072. `attention_vggt` and
`attention_cogvideox` have heads of 64, as many and as long as those of VGGT with 100 views and of CogVideoX-5B;
`attention_bfloat16` and `attention_bfloat16_vggt` are the same attentions in 16 bits throughout; `attention_refresh` is
what a refresh asks for. `fused_vggt` has the passes over memory of VGGT with 20 views of 336 x 518.

Rows as in quant_runtime/report.py, written to docs/results/NAME-cuda.jsonl. Rates are of the operations, or bytes, that
the op has to do, whatever it does; medians of CUDA events on random inputs. `error` is relative, against float64 on
some rows: of random inputs, and with one channel in 64 scaled by 30.
"""

from __future__ import annotations

import math
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from quant_runtime import report
from quant_runtime.bench import outliers
from quant_runtime.kernels import block_map
from quant_runtime.kernels._fp8 import E4M3
from quant_runtime.kernels._triton import triton
from quant_runtime.kernels.attention_blocks import attention_blocks
from quant_runtime.kernels.attention_fp8 import attention_fp8, attention_fp8_refresh, refresh_launch
from quant_runtime.kernels.blocks_by_mass import blocks_by_mass
from quant_runtime.kernels.gelu_quantize import gelu_quantize
from quant_runtime.kernels.hadamard_quantize import hadamard_quantize
from quant_runtime.kernels.linear_fp8 import linear_fp8
from quant_runtime.kernels.linear_w8a8 import linear_w8a8
from quant_runtime.kernels.norm_quantize import norm_quantize
from quant_runtime.kernels.pack_heads import pack_heads
from quant_runtime.kernels.quantize_rows import quantize_rows
from quant_runtime.kernels.unpack import unpack
from quant_runtime.sparsity.base import Blocks

TEXT = 256
TOKENS = 118_800 + TEXT
HEADS, SIZE = 24, 128
INNER = HEADS * SIZE
BLOCK = 128
GEMMS = ((INNER, 3 * INNER), (INNER, INNER), (INNER, 4 * INNER), (4 * INNER, INNER), (5 * INNER, INNER))
DENSITIES = (0.1, 0.15, 0.25)
MASSES = (0.5, 0.9)
FRAMES = 33  # of the video's tokens
SAMPLED = 256  # rows that an error is taken over
VIEWS, OF_VIEW = 20, 5 + 24 * 37  # VGGT's, and their tokens
HEAD_START = 40_000_000  # cycles of a GPU, some 20 ms

Rows = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class Shape:
    """Of one attention."""

    heads: int
    tokens: int
    size: int
    always: slice  # tokens that every query sees
    densities: tuple[float, ...]


HUNYUAN = Shape(HEADS, TOKENS, SIZE, slice(TOKENS - TEXT, TOKENS), DENSITIES)
VGGT = Shape(16, 100 * 1374, 64, slice(0, 100 * 5), (0.25,))  # 100 views of 518 x 518: 37 x 37 patches and five tokens
COGVIDEOX = Shape(48, 226 + 17_550, 64, slice(0, 226), (0.25,))  # 49 frames of 720 x 480, behind their text


def gemm(device: torch.device, rounds: int) -> Rows:
    """A layer's matmul with scales, bias and the answer in bfloat16; rounding the activations is another row."""
    for k, n in GEMMS:
        case, work = f"{TOKENS}x{k}->{n}", 2 * TOKENS * k * n
        w = torch.randn(n, k, device=device) / k**0.5
        x = torch.randn(TOKENS, k, device=device, dtype=torch.bfloat16)
        half_w, bias = w.bfloat16(), torch.randn(n, device=device, dtype=torch.bfloat16)
        best = timed(partial(F.linear, x, half_w, bias), rounds)
        yield rate(f"{case} bfloat16 cuBLAS", work, best, rounds, None)
        baseline = ("bfloat16 cuBLAS", work / median(best) / 1e9)
        fp8 = [(t / t.abs().amax(1, keepdim=True) * 448).to(torch.float8_e4m3fn) for t in (x, w)]
        ones = [torch.ones(len(t), 1, device=device) for t in fp8]

        def scaled_mm(a: Tensor = fp8[0], b: Tensor = fp8[1], s: list[Tensor] = ones) -> Tensor:
            return torch._scaled_mm(a, b.t(), s[0], s[1].t(), out_dtype=torch.bfloat16, use_fast_accum=True)

        yield rate(f"{case} FP8 _scaled_mm", work, timed(scaled_mm, rounds), rounds, baseline)
        del fp8
        for kind, multiply, dtype in (("INT8", linear_w8a8, torch.int8), ("FP8, ours", linear_fp8, E4M3)):
            low_w, w_scale = quantize_rows(w, dtype=dtype)
            error = {}
            for name, given in (("random", x), ("outliers", outliers(x))):
                q, scale = quantize_rows(given, dtype=dtype)
                got = multiply(q, low_w, scale, w_scale, bias)
                some = torch.randint(TOKENS, (SAMPLED,), device=device)
                rounded = (q[some].double() * scale[some, None]) @ (low_w.double() * w_scale[:, None]).T + bias
                full = given[some].double() @ w.double().T + bias
                error[name] = short(relative(got[some], full))
                error[f"{name}, of the rounded operands"] = short(relative(got[some], rounded))
            q, scale = quantize_rows(x, dtype=dtype)
            ours = timed(partial(multiply, q, low_w, scale, w_scale, bias), rounds)
            yield rate(f"{case} {kind}", work, ours, rounds, baseline, error)


def attention(device: torch.device, rounds: int, of: Shape = HUNYUAN) -> Rows:
    """Dense and block-sparse; in 8 bits with its packing and its choice of blocks inside the time, and without."""
    qkv = torch.randn(1, of.tokens, 3 * of.heads * of.size, device=device, dtype=torch.bfloat16)
    q, k, v = heads_of(qkv, of)
    dense, few = 4 * of.tokens**2 * of.heads * of.size, max(3, rounds // 8)
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        best = timed(lambda: F.scaled_dot_product_attention(q, k, v), few)
    yield rate("dense, bfloat16 cuDNN", dense, best, few, None)
    baseline = ("bfloat16 cuDNN", dense / median(best) / 1e9)
    every, all_ = every_list(of, device)

    def attend(qkv: Tensor, lists: tuple[Tensor, Tensor] | None = None) -> Tensor:
        p = pack_heads(*heads_of(qkv, of), BLOCK)
        kept, counts = lists or (every, all_)
        return attention_fp8(p.q, p.k, p.v, p.q_scale, p.k_scale, p.v_scale, kept, counts, of.tokens)

    error = {
        name: short(attention_error(attend(given), given, of))
        for name, given in (("random", qkv), ("outliers", outliers(qkv)))
    }
    ours = timed(lambda: attend(qkv), few)
    yield rate("dense, INT8 and FP8, packing included", dense, ours, few, baseline, error)

    packed = pack_heads(q, k, v, BLOCK)
    operands = (packed.q, packed.k, packed.v, packed.q_scale, packed.k_scale, packed.v_scale)
    yield rate("dense, INT8 and FP8", dense, timed(lambda: attention_fp8(*operands, every, all_, of.tokens), few),
               few, baseline)  # fmt: skip
    for density in of.densities:
        kept, counts = chosen_lists(packed.q_means, packed.k_means, density, of)
        work = 4 * int(counts.sum()) * BLOCK * BLOCK * of.size
        flex = flex_attention(q, k, v, kept, counts, rounds)
        yield rate(f"density {density}, bfloat16 FlexAttention", work, flex, rounds, None)
        sparse = timed(partial(attention_fp8, *operands, kept, counts, of.tokens), rounds)
        error = {}
        for name, given in (("random", qkv), ("outliers", outliers(qkv))):
            error[name] = short(attention_error(attend(given, (kept, counts)), given, of, (kept, counts)))
        beside = ("bfloat16 FlexAttention", work / median(flex) / 1e9)
        yield rate(f"density {density}, INT8 and FP8", work, sparse, rounds, beside, error)


def attention_bfloat16(device: torch.device, rounds: int, of: Shape = HUNYUAN) -> Rows:
    """Dense and block-sparse in 16 bits throughout: q, k and v as they lie in a projection, nothing packed."""
    qkv = torch.randn(1, of.tokens, 3 * of.heads * of.size, device=device, dtype=torch.bfloat16)
    q, k, v = heads_of(qkv, of)
    dense, few = 4 * of.tokens**2 * of.heads * of.size, max(3, rounds // 8)

    def attend(qkv: Tensor, lists: tuple[Tensor, Tensor]) -> Tensor:
        return attention_blocks(*heads_of(qkv, of), *lists, BLOCK, BLOCK)

    def errors(lists: tuple[Tensor, Tensor], seen: tuple[Tensor, Tensor] | None) -> dict[str, float]:
        inputs = {"random": qkv, "outliers": outliers(qkv).bfloat16()}
        return {name: short(attention_error(attend(given, lists), given, of, seen)) for name, given in inputs.items()}

    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        best = timed(lambda: F.scaled_dot_product_attention(q, k, v), few)
    yield rate("dense, bfloat16 cuDNN", dense, best, few, None)
    every = every_list(of, device)
    ours = timed(partial(attend, qkv, every), few)
    beside = ("bfloat16 cuDNN", dense / median(best) / 1e9)
    yield rate("dense, bfloat16", dense, ours, few, beside, errors(every, None))
    means = block_map.pool(q, BLOCK), block_map.pool(k, BLOCK)
    for density in of.densities:
        lists = chosen_lists(*means, density, of)
        work = 4 * int(lists[1].sum()) * BLOCK * BLOCK * of.size
        flex = flex_attention(q, k, v, *lists, rounds)
        yield rate(f"density {density}, bfloat16 FlexAttention", work, flex, rounds, None)
        sparse = timed(partial(attend, qkv, lists), rounds)
        beside = ("bfloat16 FlexAttention", work / median(flex) / 1e9)
        yield rate(f"density {density}, bfloat16", work, sparse, rounds, beside, errors(lists, lists))


def attention_refresh(device: torch.device, rounds: int, of: Shape = HUNYUAN, density: float = 0.15) -> Rows:
    """Dense attention and what few blocks lack of it: in one pass, by what runs and by Triton, and by two calls.

    They take turns: what a card has done before tells in what it does next. "sparse" is the error of dense - lost.
    """
    keys = -(-of.tokens // BLOCK)
    qkv, error = torch.randn(1, of.tokens, 3 * of.heads * of.size, device=device, dtype=torch.bfloat16), {}

    def packed(qkv: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
        p = pack_heads(*heads_of(qkv, of), BLOCK)
        return (p.q, p.k, p.v, p.q_scale, p.k_scale, p.v_scale), chosen_lists(p.q_means, p.k_means, density, of)

    def once(version: Callable[..., tuple[Tensor, Tensor]], qkv: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        its, (kept, counts) = packed(qkv)
        listed = Blocks(kept, counts, BLOCK, BLOCK, keys).all_listed()
        return partial(version, *its, listed, counts, of.tokens, BLOCK, BLOCK, torch.bfloat16, of.size**-0.5)

    for name, given in (("random", qkv), ("outliers", outliers(qkv))):
        dense, lost = once(attention_fp8_refresh, given)()
        error[f"{name}, dense"] = short(attention_error(dense, given, of))
        error[f"{name}, sparse"] = short(attention_error(dense.float() - lost.float(), given, of, packed(given)[1]))
        del dense, lost, given
    its, some = packed(qkv)
    every = every_list(of, device)
    calls: dict[str, Callable[[], object]] = {
        "dense alone": partial(attention_fp8, *its, *every, of.tokens),
        "one after the other": lambda: [attention_fp8(*its, *lists, of.tokens) for lists in (every, some)],
        "in one pass, Triton": once(refresh_launch, qkv),
        "in one pass": once(attention_fp8_refresh, qkv),
    }
    times = dict(zip(calls, in_turn([*calls.values()], rounds), strict=True))
    two = ("one after the other", median(times["one after the other"]))
    for name, its_own in times.items():
        both = name if name == "dense alone" else f"dense and density {density}, {name}"
        baseline = two if name.startswith("in one pass") else None
        yield milliseconds(both, its_own, rounds, baseline, error if name == "in one pass" else None)


def every_list(of: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    keys = -(-of.tokens // BLOCK)
    every = torch.arange(keys, dtype=torch.int32, device=device).expand(1, of.heads, keys, keys)
    return every, torch.full((1, of.heads, keys), keys, dtype=torch.int32, device=device)


def chosen_lists(q_means: Tensor, k_means: Tensor, density: float, of: Shape) -> tuple[Tensor, Tensor]:
    keys = k_means.shape[2]
    forced = torch.zeros(keys, dtype=torch.bool, device=k_means.device)
    forced[of.always.start // BLOCK : -(-of.always.stop // BLOCK)] = True
    return block_map.choose(q_means, k_means, round(density * keys), forced)


def flex_attention(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, counts: Tensor, rounds: int) -> list[float]:
    """torch's own block-sparse attention over the same blocks of whole tokens: a ragged end is cut off."""
    from torch.nn.attention.flex_attention import BlockMask
    from torch.nn.attention.flex_attention import flex_attention as flex

    whole = q.shape[2] // BLOCK
    wide = torch.zeros(*kept.shape[:2], whole, whole, dtype=torch.int32, device=kept.device)
    wide[..., : kept.shape[3]] = kept[:, :, :whole].clamp(max=whole - 1)
    nothing = torch.zeros_like(counts[:, :, :whole])
    mask = BlockMask.from_kv_blocks(
        nothing, torch.zeros_like(wide), counts[:, :, :whole].contiguous(), wide, BLOCK_SIZE=BLOCK,
        seq_lengths=(whole * BLOCK, whole * BLOCK),
    )  # fmt: skip
    compiled = torch.compile(flex)
    some = slice(0, whole * BLOCK)
    q, k, v = (t[:, :, some].contiguous() for t in (q, k, v))
    return timed(lambda: compiled(q, k, v, block_mask=mask), rounds)


def fused(device: torch.device, rounds: int) -> Rows:
    """Passes over memory, in bytes that they must read and write, beside a copy of the same bytes in the same run."""
    x, y = torch.randn(2, 1, TOKENS, INNER, device=device, dtype=torch.bfloat16)[:, None].unbind(0)
    x, y = x.view(1, TOKENS, INNER), y.view(1, TOKENS, INNER)
    shift, scale, gate = torch.randn(3, 1, INNER, device=device, dtype=torch.bfloat16)
    inner = torch.randn(TOKENS, 4 * INNER, device=device, dtype=torch.bfloat16)
    signs = torch.randint(0, 2, (INNER,), device=device, dtype=torch.int8) * 2 - 1
    qkv = torch.randn(1, TOKENS, 3 * INNER, device=device, dtype=torch.bfloat16)
    angles = torch.rand(TOKENS - TEXT, SIZE // 2, device=device) * 6
    rope = (angles.cos().half(), angles.sin().half())
    ones = torch.ones(SIZE, device=device, dtype=torch.bfloat16)
    video = torch.arange(TOKENS - TEXT, dtype=torch.int32, device=device).view(FRAMES, -1).T.flatten()
    text = torch.arange(TOKENS - TEXT, TOKENS, dtype=torch.int32, device=device)
    by_patch = torch.cat([video, text]).expand(1, HEADS, TOKENS).contiguous()  # an order for each head
    packed_w = torch.randint(0, 256, (4 * INNER, INNER // 2), device=device, dtype=torch.uint8)
    packed_3 = packed_w[:, : 3 * INNER // 8].contiguous()
    wide_signs = signs.repeat(4)
    values = TOKENS * INNER
    copied = timed(lambda: inner.clone(), rounds)
    speed = 16 * values / median(copied) / 1e6
    yield report.row("copy", "rate", speed, "GB/s", "higher", samples=rounds)
    alike = torch.empty(3 * INNER * INNER, dtype=torch.uint8, device=device)  # a layer's: the cache holds most of it
    small = 2 * alike.numel() / median(timed(lambda: alike.clone(), rounds)) / 1e6
    yield report.row("copy of a layer's weights", "rate", small, "GB/s", "higher", samples=rounds)
    for name, moved, call in (
        ("norm, modulate, quantize", 3 * values, lambda: norm_quantize(x, shift, scale)[0]),
        ("residual, norm, modulate, quantize", 7 * values,
         lambda: norm_quantize(x, shift, scale, y, gate)[0]),
        ("quantize", 3 * values, lambda: quantize_rows(x[0])[0]),
        ("quantize to FP8", 3 * values, lambda: quantize_rows(x[0], dtype=E4M3)[0]),
        ("norm, modulate, quantize to FP8", 3 * values, lambda: norm_quantize(x, shift, scale, dtype=E4M3)[0]),
        ("GELU, quantize to FP8", 12 * values, lambda: gelu_quantize(inner, dtype=E4M3)[0]),
        ("GELU, quantize", 12 * values, lambda: gelu_quantize(inner)[0]),
        ("attention, and GELU, quantize", 15 * values, lambda: gelu_quantize(inner, x[0])[0]),
        ("Hadamard of 128, quantize", 3 * values, lambda: hadamard_quantize(x[0], signs, 128)[0]),
        ("Hadamard of 1024, quantize", 3 * values, lambda: hadamard_quantize(x[0], signs, 1024)[0]),
        ("Hadamard of 4096, quantize", 12 * values, lambda: hadamard_quantize(inner, wide_signs, 4096)[0]),
        ("norm of q and k, rotation, pack q, k, v", 9 * values,
         lambda: pack_heads(*heads_of(qkv), BLOCK, (ones, ones), (ones, ones), 1e-6, rope).q),
        ("the same, patch by patch", 9 * values,
         lambda: pack_heads(*heads_of(qkv), BLOCK, (ones, ones), (ones, ones), 1e-6, rope, tokens=by_patch).q),
        ("unpack 4 bits", 6 * INNER * INNER, lambda: unpack(packed_w, INNER, 4)),
        ("unpack 4 bits to FP8", 6 * INNER * INNER, lambda: unpack(packed_w, INNER, 4, E4M3)),
        ("unpack 3 bits", 11 * INNER * INNER // 2, lambda: unpack(packed_3, INNER, 3)),
    ):  # fmt: skip
        times = timed(call, rounds)
        beside = ("copy of a layer's weights", small) if name.startswith("unpack") else ("copy", speed)
        yield report.row(name, "rate", moved / median(times) / 1e6, "GB/s", "higher", samples=rounds,
                         baseline=beside, spread=spread(times, moved / 1e6))  # fmt: skip


def fused_vggt(device: torch.device, rounds: int) -> Rows:
    """As `fused`, of VGGT's layers: what a view or a scene of few views has, in float32 norms and the exact GELU."""
    tokens, width = VIEWS * OF_VIEW, VGGT.heads * VGGT.size
    x, y = torch.randn(2, 1, tokens, width, device=device, dtype=torch.bfloat16).unbind(0)
    shift, scale, gate = torch.randn(3, 1, width, device=device)
    inner = torch.randn(tokens, 4 * width, device=device, dtype=torch.bfloat16)
    qkv = torch.randn(1, tokens, 3 * width, device=device, dtype=torch.bfloat16)
    frames = qkv.view(VIEWS, OF_VIEW, -1)
    norm_q, norm_k, bias_q, bias_k = torch.randn(4, VGGT.size, device=device).unbind(0)
    angles = torch.rand(OF_VIEW, VGGT.size // 2, device=device) * 6
    one = (angles.cos().half(), angles.sin().half())
    every = (one[0].repeat(VIEWS, 1), one[1].repeat(VIEWS, 1))
    orders = torch.stack([torch.randperm(tokens, device=device, dtype=torch.int32) for _ in range(VGGT.heads)])[None]
    values = tokens * width
    speed = 16 * values / median(timed(lambda: inner.clone(), rounds)) / 1e6
    yield report.row("copy", "rate", speed, "GB/s", "higher", samples=rounds)
    pack = partial(pack_heads, block=BLOCK, norm=(norm_q, norm_k), bias=(bias_q, bias_k))
    for name, moved, call in (
        ("norm, quantize", 3 * values, lambda: norm_quantize(x, shift, scale)[0]),
        ("norm, quantize to FP8", 3 * values, lambda: norm_quantize(x, shift, scale, dtype=E4M3)[0]),
        ("residual, norm, quantize", 7 * values, lambda: norm_quantize(x, shift, scale, y, gate)[0]),
        ("residual, norm, quantize to FP8", 7 * values,
         lambda: norm_quantize(x, shift, scale, y, gate, dtype=E4M3)[0]),
        ("exact GELU, quantize", 12 * values, lambda: gelu_quantize(inner, exact=True)[0]),
        ("exact GELU, quantize to FP8", 12 * values, lambda: gelu_quantize(inner, exact=True, dtype=E4M3)[0]),
        ("norm, rotation, pack, each view", 9 * values, lambda: pack(*heads_of(frames, VGGT), rope=one).q),
        ("norm, rotation, pack, all views", 9 * values, lambda: pack(*heads_of(qkv, VGGT), rope=every).q),
        ("norm, rotation, pack, all views, in orders", 9 * values,
         lambda: pack(*heads_of(qkv, VGGT), rope=every, tokens=orders).q),
    ):  # fmt: skip
        times = timed(call, rounds)
        yield report.row(name, "rate", moved / median(times) / 1e6, "GB/s", "higher", samples=rounds,
                         baseline=("copy", speed), spread=spread(times, moved / 1e6))  # fmt: skip


def blockmap(device: torch.device, rounds: int) -> Rows:
    """Scores, choice and lists, of means that packing has left."""
    blocks = -(-TOKENS // BLOCK)
    means = torch.randn(2, 1, HEADS, blocks, SIZE, device=device)
    whole = torch.zeros(blocks, dtype=torch.bool, device=device)
    whole[-3:] = True
    for density in DENSITIES:
        times = timed(partial(_chosen, means, round(density * blocks), whole), rounds)
        yield report.row(f"density {density}", "time", median(times), "ms", "lower", samples=rounds)
    alike = torch.rand(2, 1, HEADS, blocks, device=device)
    for mass in MASSES:
        times = timed(partial(_by_mass, means, mass, whole, alike), rounds)
        yield report.row(f"mass {mass}, guarded", "time", median(times), "ms", "lower", samples=rounds)


def _chosen(means: Tensor, keep: int, whole: Tensor) -> Tensor:
    return block_map.choose(means[0], means[1], keep, whole, whole)[0]


def _by_mass(means: Tensor, mass: float, whole: Tensor, alike: Tensor) -> Tensor:
    return blocks_by_mass(means[0], means[1], mass, 1, None, whole, whole, alike[0], alike[1], 0.1)[0]


def heads_of(qkv: Tensor, of: Shape = HUNYUAN) -> tuple[Tensor, Tensor, Tensor]:
    """[B, N, 3 C] as q, k, v [B, H, N, D], views."""
    q, k, v = qkv.unflatten(2, (3, of.heads, of.size)).permute(2, 0, 3, 1, 4)
    return q, k, v


def attention_error(got: Tensor, qkv: Tensor, of: Shape, lists: tuple[Tensor, Tensor] | None = None) -> float:
    """Of three heads' rows of one block of queries, each against float64 over the keys that they see."""
    q, k, v = heads_of(qkv, of)
    apart, size = 0.0, 0.0
    for head, row in ((0, 0), (5, 7), (of.heads - 1, of.tokens // BLOCK - 1)):
        rows, keys = slice(row * BLOCK, (row + 1) * BLOCK), torch.arange(of.tokens, device=q.device)
        if lists is not None:
            kept, counts = lists
            listed = kept[0, head, row, : int(counts[0, head, row])].long()
            keys = (listed[:, None] * BLOCK + torch.arange(BLOCK, device=q.device)).flatten()
            keys = keys[keys < of.tokens]
        one = (q[:, head, rows].double(), k[:, head, keys].double(), v[:, head, keys].double())
        want = F.scaled_dot_product_attention(*one)
        apart += float((got[:, head, rows].double() - want).square().sum())
        size += float(want.square().sum())
    return math.sqrt(apart / size)


def timed(call: Callable[[], object], rounds: int) -> list[float]:
    """Milliseconds of `rounds` calls, after two that warm up."""
    return in_turn([call], rounds)[0]


def in_turn(calls: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Milliseconds of each call in `rounds` rounds of all of them, after two that warm up.

    The GPU gets them all at once, behind a pause: else it would wait for the CPU between two short ones, and the time
    of a call would be what launching it takes.
    """
    events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in calls]
    for number in range(rounds + 2):
        if number == 2:
            torch.cuda._sleep(HEAD_START)
        for call, its in zip(calls, events, strict=True):
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            call()
            after.record()
            if number >= 2:
                its.append((before, after))
    torch.cuda.synchronize()
    return [[before.elapsed_time(after) for before, after in its] for its in events]


def median(times: list[float]) -> float:
    return sorted(times)[len(times) // 2]


def spread(times: list[float], work: float) -> float:
    """Between the quartiles of work / time."""
    ordered = sorted(times)
    return work / ordered[len(ordered) // 4] - work / ordered[len(ordered) * 3 // 4]


def rate(
    case: str, work: int, times: list[float], rounds: int, baseline: tuple[str, float] | None, error: Any = None
) -> dict[str, Any]:
    found = spread(times, work / 1e9)
    rate_ = work / median(times) / 1e9
    return report.row(case, "rate", rate_, "TFLOP/s", "higher", samples=rounds, baseline=baseline, spread=found,
                      error=error)  # fmt: skip


def milliseconds(
    case: str, times: list[float], rounds: int, baseline: tuple[str, float] | None = None, error: Any = None
) -> dict[str, Any]:
    ordered = sorted(times)
    found = ordered[len(ordered) * 3 // 4] - ordered[len(ordered) // 4]
    return report.row(case, "time", median(times), "ms", "lower", samples=rounds, baseline=baseline, spread=found,
                      error=error)  # fmt: skip


def relative(got: Tensor, want: Tensor) -> float:
    apart, size = torch.linalg.vector_norm(got.double() - want), torch.linalg.vector_norm(want)
    return float(apart / size)


def short(error: float) -> float:
    return float(f"{error:.3g}")


BENCHES: dict[str, Callable[[torch.device, int], Rows]] = {
    "gemm": gemm,
    "attention_720p": attention,
    "attention_vggt": partial(attention, of=VGGT),
    "attention_cogvideox": partial(attention, of=COGVIDEOX),
    "attention_bfloat16": attention_bfloat16,
    "attention_bfloat16_vggt": partial(attention_bfloat16, of=VGGT),
    "attention_refresh": attention_refresh,
    "fused": fused,
    "fused_vggt": fused_vggt,
    "blockmap": blockmap,
}


def main() -> None:
    parser = ArgumentParser(prog="python -m quant_runtime.bench_hopper", description="Times kernels at full size.")
    parser.add_argument("name", choices=BENCHES)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    chosen = parser.parse_args()
    if triton is None or not torch.cuda.is_available():
        raise SystemExit("these are a GPU's kernels at a GPU's sizes: torch sees none here")
    torch.manual_seed(0)
    device = torch.device("cuda")

    def told() -> Rows:
        for row in BENCHES[chosen.name](device, chosen.rounds):
            beside = row["baseline"]
            against = f"{row['value'] / beside['value']:5.2f}x {beside['name']}" if beside else ""
            print(f"{row['case']:48} {row['value']:9.4g} {row['unit']}  {against}  {row['error'] or ''}", flush=True)
            yield row

    path = chosen.out / f"{chosen.name}-cuda.jsonl"
    with torch.inference_mode():
        report.write(path, chosen.name, told(), ["python", "-m", "quant_runtime.bench_hopper", *sys.argv[1:]], device)
    print(path)


if __name__ == "__main__":
    main()
