"""pack_heads by hand for Hopper (sm_90a): heads of 64 or 128 channels of 16 bits, at multiples of 16 bytes.

The operands, and what is answered, are pack_heads'; the source beside this file says how. Others run by Triton.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from quant_runtime.kernels import _cuda
from quant_runtime.kernels._triton import processors

SIZES = (64, 128)
KINDS = {torch.bfloat16: 0, torch.float16: 1}  # of q, k and v
ANGLES = {torch.float16: 1, torch.float32: 2}
OWN = 16  # channels of a token that a thread has


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether 16 bytes of a token are a load of one thread, and pieces of work can be told by 32 bits."""
    aligned = all(
        t.stride(3) == 1 and t.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in t.stride()[:3])
        for t in (q, k, v)
    )
    batch, heads, count, size = q.shape
    few = (batch * heads) ** 2 * -(-count // SIZES[0]) < 1 << 32
    return size in SIZES and q.dtype in KINDS and aligned and few and q.numel() > 0


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block: int,
    weights: tuple[Tensor | None, ...],
    inverses: tuple[Tensor | None, Tensor | None],
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    first: int,
    tokens: Tensor | None,
    stride: int,
    tiny: float,
    nothing: float,
    outputs: tuple[Tensor, ...],
) -> None:
    """Fills outputs, which are pack_heads.Packed. weights: of q and k the norms, the others and the biases."""
    batch, heads, count, size = q.shape
    all_heads, blocks, samples = batch * heads, outputs[3].shape[2], -(-count // stride)
    weights = tuple(None if w is None else w.float().contiguous() for w in weights)
    sin = sin if sin is None or cos is None else sin.to(cos.dtype)
    cos, sin = (None if t is None else _cuda.aligned(t) for t in (cos, sin))
    tokens = tokens if tokens is None or tokens.stride(2) == 1 else tokens.contiguous()
    together = weights[0] is not None and len(weights[0]) > size
    kind = 0 if weights[0] is None else 3 if weights[4] is not None else 1 + together
    parts = torch.empty(all_heads * -(-samples // block) * size, dtype=torch.float32, device=q.device)
    center = torch.empty(all_heads * size, dtype=torch.float32, device=q.device)
    known = torch.zeros(all_heads * (size + 2) + 1, dtype=torch.int32, device=q.device)  # largest values, then counters
    with torch.cuda.device(q.device):
        kernel = _kernel(
            q.device, size, block, KINDS[q.dtype], kind, weights[2] is not None,
            0 if cos is None else ANGLES[cos.dtype], tokens is not None,
        )  # fmt: skip
        threads = _programs(size, block)[0]
        programs = min(kernel.at_once(threads) * processors(q.device), all_heads * blocks)
        kernel(
            programs,
            threads,
            q,
            k,
            v,
            *weights,
            *inverses,
            cos,
            sin,
            tokens,
            *outputs,
            parts,
            center,
            known,
            known[all_heads * size :],
            all_heads,
            heads,
            count,
            blocks,
            first,
            0 if cos is None else len(cos),
            stride,
            samples,
            min(blocks, programs),  # pieces between a head's largest values and its packing: these are known in time
            eps,
            tiny,
            nothing,
            [
                *(-(-(1 << 32) // divisor) for divisor in (all_heads, heads)),
                *q.stride()[:3],
                *k.stride()[:3],
                *v.stride()[:3],
                *((0, 0) if tokens is None else tokens.stride()[:2]),
            ],
            together=True,
        )


def _programs(size: int, block: int) -> tuple[int, int]:
    """(threads of a program, programs that a processor holds): a thread has some of four tokens of 128, else fewer.

    Of two, a block of 128 takes half as many instructions more: addresses and conditions, which are once a thread.
    """
    return (2 * size, 256 // size) if block == 128 else (256, 3)


@functools.cache
def _kernel(
    device: torch.device, size: int, block: int, half: int, norm: int, other: bool, rope: int, tokens: bool
) -> _cuda.Kernel:
    threads, programs = _programs(size, block)
    at_once, warps = threads * OWN // size, threads // 32  # tokens
    steps = block // at_once
    slots = 2 * max(steps, 2 * -(-block // 16 * (size // 64) // warps))
    angles = 4 * steps if rope == ANGLES[torch.float16] else 0
    shared = (16 * slots + 8 * angles) * threads + 4 * (at_once * size + 8 * size + warps + size // 32)
    defines = (
        ("D", size), ("BT", block), ("THREADS", threads), ("PROGRAMS", programs), ("HALF", half),
        ("NORM", norm), ("OTHER", int(other)), ("ROPE", rope), ("TOKENS", int(tokens)),
    )  # fmt: skip
    return _cuda.Kernel("pack_heads_sm90.cu", "pack_heads_sm90", shared, defines)
