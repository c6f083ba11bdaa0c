"""What stands between the convolutions of a dense head, in one pass over a map of features.

x             float [n, C, h, w], best channels last, as cuDNN answers it where its bias is left to this pass
size          (H, W): x resized to it, bilinear, corners on corners; None leaves it as it is
bias          float [C], added to every pixel
across, down  float32 [W, C / 2] and [H, C / 2], both or none: what the place of a pixel adds, in x to the first half of
              the channels and in y to the second
side, other   of x's dtype, [n, C, H, W]: maps that are added
rectified     what is below zero is zero then
y             [n, C, H, W] of x's dtype, channels last

map_answer closes the head: of such an x with its bias, rectified, the product with weight float32 [O, C], plus
its own bias float32 [O], as float32 [n, O, h, w].

All in float32, rounded once. NaN stays NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quant_runtime.kernels._triton import jit, tl, triton
from quant_runtime.kernels._versions import Op

LARGEST_C = 1024  # that map_answer takes: a pixel is held in registers
ELEMENTS = 2048  # of a program
CHANNELS = 256  # of a program, at most


def map_pass(
    x: Tensor,
    size: tuple[int, int] | None = None,
    bias: Tensor | None = None,
    places: tuple[Tensor, Tensor] | None = None,
    side: Tensor | None = None,
    other: Tensor | None = None,
    rectified: bool = False,
) -> Tensor:
    """y; `places` is (across, down). Refuses operands that do not fit."""
    if x.dim() != 4 or not x.is_floating_point() or 0 in x.shape:
        raise ValueError(f"map_pass takes a map float [n, C, h, w]; got {x.dtype} {list(x.shape)}")
    n, channels = x.shape[:2]
    height, width = x.shape[2:] if size is None else size
    if height < 1 or width < 1:
        raise ValueError(f"map_pass takes a size above zero; got {size}")
    _check_bias("map_pass", x, bias)
    across, down = (None, None) if places is None else places
    if places is not None and (
        [list(t.shape) for t in places] != [[width, channels // 2], [height, channels // 2]]
        or channels % 2
        or {t.dtype for t in places} != {torch.float32}
    ):
        found = " and ".join(f"{t.dtype} {list(t.shape)}" for t in places)
        raise ValueError(f"map_pass takes places of {height} × {width}, float32, C / 2 channels each; got {found}")
    for added in (side, other):
        if added is not None and (added.shape != (n, channels, height, width) or added.dtype != x.dtype):
            found = f"{added.dtype} {list(added.shape)}"
            raise ValueError(f"map_pass adds maps {x.dtype} {[n, channels, height, width]}; got {found}")
    y: Tensor = _op(x, height, width, bias, across, down, side, other, rectified)
    return y


def map_answer(x: Tensor, bias: Tensor | None, weight: Tensor, last: Tensor) -> Tensor:
    """float32 [n, O, h, w]. Refuses operands that do not fit, and C above 1,024."""
    if x.dim() != 4 or not x.is_floating_point() or 0 in x.shape or x.shape[1] > LARGEST_C:
        raise ValueError(f"map_answer takes float [n, C, h, w], C up to {LARGEST_C}; got {x.dtype} {list(x.shape)}")
    _check_bias("map_answer", x, bias)
    fits = weight.dim() == 2 and weight.shape[1] == x.shape[1] and last.shape == weight.shape[:1]
    if not fits or not weight.dtype == last.dtype == torch.float32:
        found = f"{weight.dtype} {list(weight.shape)} and {last.dtype} {list(last.shape)}"
        raise ValueError(f"map_answer takes weight float32 [O, {x.shape[1]}] and last float32 [O]; got {found}")
    y: Tensor = _answer(x, bias, weight, last)
    return y


def _check_bias(op: str, x: Tensor, bias: Tensor | None) -> None:
    if bias is not None and (bias.shape != x.shape[1:2] or not bias.is_floating_point()):
        raise ValueError(f"{op} takes bias as float [{x.shape[1]}] or None; got {bias.dtype} {list(bias.shape)}")


def reference(
    x: Tensor,
    height: int,
    width: int,
    bias: Tensor | None,
    across: Tensor | None,
    down: Tensor | None,
    side: Tensor | None,
    other: Tensor | None,
    rectified: bool,
) -> Tensor:
    real = x.float()
    if (height, width) != x.shape[2:]:
        real = F.interpolate(real, size=(height, width), mode="bilinear", align_corners=True)
    if bias is not None:
        real = real + bias.float()[:, None, None]
    if across is not None and down is not None:
        table = torch.cat((across.expand(height, -1, -1), down[:, None].expand(-1, width, -1)), dim=2)
        real = real + table.permute(2, 0, 1)
    for added in (side, other):
        real = real if added is None else real + added.float()
    real = real.relu() if rectified else real
    return real.to(x.dtype, memory_format=torch.channels_last, copy=True)


def reference_answer(x: Tensor, bias: Tensor | None, weight: Tensor, last: Tensor) -> Tensor:
    real = x.float() if bias is None else x.float() + bias.float()[:, None, None]
    # In float64: a GPU may have been told to multiply float32 with 11 bits.
    y = real.relu().permute(0, 2, 3, 1).double() @ weight.t().double() + last
    return y.float().permute(0, 3, 1, 2).contiguous()


@jit
def _map_pass(
    x,
    bias,
    across,
    down,
    side,
    other,
    y,
    C,
    h,
    w,
    H,
    W,
    x_n,
    step_y,
    step_x,
    RESIZE: tl.constexpr,
    BIAS: tl.constexpr,
    PLACES: tl.constexpr,
    SIDE: tl.constexpr,
    OTHER: tl.constexpr,
    RECTIFIED: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """BP pixels of one row of one map, BC channels of each."""
    parts, columns = tl.cdiv(C, BC), tl.cdiv(W, BP)
    row = tl.program_id(0) // (parts * columns)  # of all maps, one below the other
    rest = tl.program_id(0) % (parts * columns)
    at = (rest // parts) * BP + tl.arange(0, BP)
    c = (rest % parts) * BC + tl.arange(0, BC)
    n, down_there = (row // H).to(tl.int64), row % H
    there = (at < W)[:, None] & (c < C)[None, :]
    if RESIZE:
        from_y, from_x = step_y * down_there, step_x * at
        y0, x0 = tl.minimum(from_y.to(tl.int32), h - 1), tl.minimum(from_x.to(tl.int32), w - 1)
        y1, x1 = tl.minimum(y0 + 1, h - 1), tl.minimum(x0 + 1, w - 1)
        part_y, part_x = from_y - y0, (from_x - x0)[:, None]
        above, below = x + n * x_n + y0.to(tl.int64) * w * C, x + n * x_n + y1.to(tl.int64) * w * C
        left, right = x0[:, None] * C + c[None, :], x1[:, None] * C + c[None, :]
        upper = tl.load(above + left, mask=there, other=0.0).to(tl.float32) * (1.0 - part_x)
        upper += tl.load(above + right, mask=there, other=0.0).to(tl.float32) * part_x
        lower = tl.load(below + left, mask=there, other=0.0).to(tl.float32) * (1.0 - part_x)
        lower += tl.load(below + right, mask=there, other=0.0).to(tl.float32) * part_x
        real = upper * (1.0 - part_y) + lower * part_y
    else:
        mine = x + n * x_n + down_there.to(tl.int64) * W * C
        real = tl.load(mine + at.to(tl.int64)[:, None] * C + c[None, :], mask=there, other=0.0).to(tl.float32)
    if BIAS:
        real += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    if PLACES:
        half = C // 2
        first = there & (c < half)[None, :]
        real += tl.load(across + at[:, None] * half + c[None, :], mask=first, other=0.0)
        second = (c >= half) & (c < C)
        real += tl.load(down + down_there * half + c - half, mask=second, other=0.0)[None, :]
    to = (row.to(tl.int64) * W + at)[:, None] * C + c[None, :]
    if SIDE:
        real += tl.load(side + to, mask=there, other=0.0).to(tl.float32)
    if OTHER:
        real += tl.load(other + to, mask=there, other=0.0).to(tl.float32)
    if RECTIFIED:
        real = tl.where(real < 0.0, 0.0, real)  # a GPU's maximum passes over NaN
    tl.store(y + to, real.to(y.dtype.element_ty), mask=there)


def launch(x: Tensor, height: int, width: int, *others: Any) -> Tensor:
    bias, across, down, side, other, rectified = others
    n, channels, h, w = x.shape
    dense = (1, w * channels, channels)  # of channel, row and pixel; maps may lie apart
    x = x if x.stride()[1:] == dense else _last(x)
    side, other = (None if t is None else _last(t) for t in (side, other))
    y = torch.empty((n, channels, height, width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    maps, rows, columns, resize = n, height, width, (height, width) != (h, w)
    if not resize and across is None and (n == 1 or x.stride(0) == h * w * channels):
        maps, rows, columns = 1, 1, n * h * w  # one pixel is as another
    wide = min(CHANNELS, triton.next_power_of_2(channels))
    pixels = max(1, ELEMENTS // wide)
    _map_pass[(maps * rows * triton.cdiv(columns, pixels) * triton.cdiv(channels, wide),)](
        x,
        None if bias is None else bias.contiguous(),
        None if across is None else across.contiguous(),
        None if down is None else down.contiguous(),
        side,
        other,
        y,
        channels,
        h,
        w,
        rows,
        columns,
        x.stride(0),
        (h - 1) / (height - 1) if height > 1 else 0.0,
        (w - 1) / (width - 1) if width > 1 else 0.0,
        RESIZE=resize,
        BIAS=bias is not None,
        PLACES=across is not None,
        SIDE=side is not None,
        OTHER=other is not None,
        RECTIFIED=rectified,
        BP=pixels,
        BC=wide,
        num_warps=4,
    )
    return y


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@jit
def _map_answer(
    x, bias, weight, last, y, C, P, BIAS: tl.constexpr, OUT: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr
):
    """BP of the P pixels of one map."""
    blocks = tl.cdiv(P, BP)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    at, c = (tl.program_id(0) % blocks) * BP + tl.arange(0, BP), tl.arange(0, BC)
    there = (at < P)[:, None] & (c < C)[None, :]
    real = tl.load(x + (n * P + at)[:, None] * C + c[None, :], mask=there, other=0.0).to(tl.float32)
    if BIAS:
        real += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    real = tl.where(real < 0.0, 0.0, real)
    for o in tl.static_range(OUT):
        w = tl.load(weight + o * C + c, mask=c < C, other=0.0)
        tl.store(y + (n * OUT + o) * P + at, tl.sum(real * w[None, :], axis=1) + tl.load(last + o), mask=at < P)


def launch_answer(x: Tensor, bias: Tensor | None, weight: Tensor, last: Tensor) -> Tensor:
    n, channels, h, w = x.shape
    y = torch.empty(n, len(weight), h, w, dtype=torch.float32, device=x.device)
    wide = triton.next_power_of_2(channels)
    pixels = max(1, ELEMENTS // wide)
    _map_answer[(n * triton.cdiv(h * w, pixels),)](
        _last(x),
        None if bias is None else bias.contiguous(),
        weight.contiguous(),
        last.contiguous(),
        y,
        channels,
        h * w,
        BIAS=bias is not None,
        OUT=len(weight),
        BP=pixels,
        BC=wide,
        num_warps=4,
    )
    return y


def _fake(x: Tensor, height: int, width: int, *others: object) -> Tensor:
    shape = (*x.shape[:2], height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _fake_answer(x: Tensor, bias: Tensor | None, weight: Tensor, last: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], len(weight), *x.shape[2:]), dtype=torch.float32)


_op = Op("map_pass", reference, _fake, cuda={"Triton": launch})
_answer = Op("map_answer", reference_answer, _fake_answer, cuda={"Triton": launch_answer})
