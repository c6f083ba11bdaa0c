"""What kernel tests are fed: rows whose channels are even, and rows that have the outliers of real activations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

BF16_ROUNDING = 2**-8  # half a step of bfloat16 is 2**-8 of a number at most, 2**-9 at least
FP16_ROUNDING = 2**-10  # half a step of float16 is 2**-11 of a number
FP32_ROUNDING = 1e-6  # sums of a few hundred float32, each rounded at 6e-8
NO_BF16 = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU: Triton's interpreter computes bfloat16 wrongly"
)
TRITON_DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=NO_BF16)]
FP8_CHECKS = ("test_autograd_registration", "test_faketensor")  # opcheck's others multiply what they meet, FP8 too
ROUNDING = {torch.float32: FP32_ROUNDING, torch.float16: FP16_ROUNDING, torch.bfloat16: BF16_ROUNDING}


def rows(m: int, k: int, device: str, outliers: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random [m, k]; with outliers, one channel in 64 is 30 times as large."""
    x = torch.randn(m, k, device=device)
    if outliers:
        x[:, ::64] *= 30
    return x.to(dtype)


def whole(m: int, k: int, device: str, top: int = 127) -> Tensor:
    return torch.randint(-top, top + 1, (m, k), dtype=torch.int8, device=device)


def signs(k: int, device: str) -> Tensor:
    return torch.randint(0, 2, (k,), dtype=torch.int8, device=device) * 2 - 1


def lists(batch: int, heads: int, rows: int, blocks: int, device: str) -> tuple[Tensor, Tensor]:
    """(kept, counts) as attention_blocks takes them: row 0 sees every block, row 1 none, the others some."""
    scores = torch.rand(batch, heads, rows, blocks, device=device)
    counts = torch.randint(1, blocks + 1, (batch, heads, rows), dtype=torch.int32, device=device)
    counts[:, :, 0] = blocks
    counts[:, :, 1:2] = 0
    place = scores.argsort(dim=3)
    chosen = torch.where(torch.arange(blocks, device=device) < counts[..., None], place, blocks + 999)
    return chosen.sort(dim=3).values.to(torch.int32), counts


def fp8_steps(got: Tensor, want: Tensor, interpreted: bool) -> Tensor:
    """How many numbers of e4m3 lie from one to the other, int [...].

    Triton's interpreter rounds up to a power of two as down to half of it, and below 2**-6, where e4m3 has fewer bits,
    it cuts them off. Where it ran, and that is all that is wrong, it counts as none.
    """
    bits = [tensor.view(torch.uint8).int() for tensor in (got, want)]
    places = [torch.where(its < 128, its, 128 - its) for its in bits]
    apart = (places[0] - places[1]).abs()
    if not interpreted:
        return apart
    halved = (got.float() * 2 == want.float()) & (torch.frexp(want.float()).mantissa.abs() == 0.5)
    cut = (want.float().abs() <= 2**-6) & (got.float().abs() <= want.float().abs()) & (apart == 1)
    return torch.where(halved | cut, 0, apart)
