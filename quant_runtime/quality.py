"""The numbers a report quotes: how far an answer is from the one it stands for."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

SAME_FRAME_DB = 100.0  # what a frame without any difference counts in a mean; one step in one channel of 8K is 98 dB
AT_ONCE = 1 << 20  # numbers that are float64 at a time: a layer of a large model has a hundred million


def sqnr(want: Tensor, got: Tensor) -> float:
    """Signal to quantization noise in dB: 10 log10(|want|² / |want - got|²), in float64. inf for equal tensors."""
    signal = noise = 0.0
    for some, its in zip(want.detach().flatten().split(AT_ONCE), got.detach().flatten().split(AT_ONCE), strict=True):
        wide = some.double()
        signal += float(wide.square().sum())
        noise += float((wide - its.double()).square().sum())
    return math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal else -math.inf


def psnr(want: Tensor, got: Tensor) -> float:
    """Peak signal to noise in dB of uint8 frames [..., H, W, 3], mean over frames.

    Each frame's squared error is averaged over its pixels and channels and turned into dB, and then the dB are
    averaged: the papers leave the order open. A frame without difference counts 100 dB.
    """
    _check_frames(want, got)
    error = (want.double() - got.double()).square().flatten(-3).mean(dim=-1)
    decibels = 10 * torch.log10(255.0**2 / error)
    return float(decibels.clamp(max=SAME_FRAME_DB).mean())


def ssim(want: Tensor, got: Tensor) -> float:
    """Structural similarity of uint8 frames [..., H, W, 3] of at least 11 by 11: mean over places, channels and frames.

    Wang et al. 2004: 11 by 11 Gaussian window of sigma 1.5, K1 = 0.01, K2 = 0.03, L = 255, only windows that lie
    inside.
    """
    _check_frames(want, got)
    if min(want.shape[-3:-1]) < 11:
        raise ValueError(f"ssim looks through windows of 11 by 11; got frames of {list(want.shape)}")
    x, y = (frames.reshape(-1, *frames.shape[-3:]).movedim(-1, 1).double() for frames in (want, got))
    mean_x, mean_y = _blurred(x), _blurred(y)
    var_x, var_y = _blurred(x * x) - mean_x**2, _blurred(y * y) - mean_y**2
    shared = _blurred(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    likeness = (2 * mean_x * mean_y + c1) * (2 * shared + c2)
    return float((likeness / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())


def _blurred(x: Tensor) -> Tensor:
    offsets = torch.arange(11, dtype=x.dtype, device=x.device) - 5
    window = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = window / window.sum()
    one_channel = x.flatten(0, 1)[:, None]
    rows = F.conv2d(one_channel, window.view(1, 1, -1, 1))
    return F.conv2d(rows, window.view(1, 1, 1, -1)).view(*x.shape[:2], x.shape[2] - 10, x.shape[3] - 10)


def _check_frames(want: Tensor, got: Tensor) -> None:
    if want.dtype != torch.uint8 or got.dtype != torch.uint8 or want.shape != got.shape or want.shape[-1] != 3:
        found = f"{want.dtype} {list(want.shape)} and {got.dtype} {list(got.shape)}"
        raise ValueError(f"frames are compared as uint8 [..., H, W, 3] of one shape; got {found}")
