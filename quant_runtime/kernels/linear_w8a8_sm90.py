"""linear_w8a8 by hand for Hopper (sm_90a), where rows are more than a few and answers are bfloat16 or float16.

The operands, and what is answered, are linear_w8a8's; the source beside this file says how. Others, and other cards,
run by Triton.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from quant_runtime.kernels import _cuda
from quant_runtime.kernels._triton import processors

ROWS, COLUMNS, STEP = 128, 256, 128  # of y, that a program makes at a time, and the channels that it takes at a time
CLUSTER = 2  # programs that have the same columns
THREADS = 3 * 128  # one group of warps brings the tiles, two multiply
STAGES = 4
CHUNK = (16, 64)  # of y, that a warp stores at a time; each of eight has two in memory
SHARED = STAGES * (ROWS + COLUMNS) * STEP + 8 * 2 * 16 * 64 * 2 + 8 * COLUMNS + 128  # tiles, y, scales, the rest
FEW_ROWS = 64  # up to here Triton has a smaller tile
KINDS = {torch.bfloat16: 1, torch.float16: 2}  # of the answer
BIASES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}  # 0 is none


def takes(x: Tensor, w: Tensor, y: Tensor, bias: Tensor | None) -> bool:
    """Whether it multiplies them. The copy engine wants rows and beginnings at multiples of 16 bytes."""
    placed = all(t.data_ptr() % 16 == 0 and t.shape[1] * t.element_size() % 16 == 0 and t.numel() for t in (x, w, y))
    return x.shape[0] > FEW_ROWS and placed and y.dtype in KINDS and (bias is None or bias.dtype in BIASES)


def launch(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Writes y. All are contiguous."""
    (m, k), n = x.shape, w.shape[0]
    tall, wide = -(-m // (CLUSTER * ROWS)), -(-n // COLUMNS)
    with torch.cuda.device(x.device):
        _kernel(x.device, KINDS[y.dtype], 0 if bias is None else BIASES[bias.dtype])(
            CLUSTER * min(processors(x.device) // CLUSTER, tall * wide),
            THREADS,
            _cuda.tiles(x, ROWS, STEP),
            _cuda.tiles(w, COLUMNS // CLUSTER, STEP),
            _cuda.tiles(y, *CHUNK),
            x_scale,
            w_scale,
            bias,
            m,
            n,
            -(-k // STEP),
            tall,
            wide,
        )


@functools.cache
def _kernel(device: torch.device, out: int, bias: int) -> _cuda.Kernel:
    defines = (("OUT", out), ("BIAS", bias), ("STAGES", STAGES), ("CLUSTER", CLUSTER))
    return _cuda.Kernel("linear_w8a8_sm90.cu", "linear_w8a8_sm90", SHARED, defines)
