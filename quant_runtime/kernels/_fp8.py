"""FP8 as matrix units take it: e4m3, a sign, four bits of exponent and three behind the first, up to 448."""

from __future__ import annotations

import functools

import torch

E4M3 = torch.float8_e4m3fn
FP8_TOP = 448.0  # the largest e4m3
FP8_WHOLE = 16  # whole numbers up to here are e4m3 numbers: four bits hold them, the first included


@functools.cache
def has_fp8(device: torch.device) -> bool:
    """Whether this device packs and multiplies e4m3: a CPU, and GPUs from Ada and Hopper on.

    Where torch sees no GPU that could be asked, one is taken to be such.
    """
    seen = device.type == "cuda" and torch.cuda.is_available()
    return not seen or torch.cuda.get_device_capability(device) >= (8, 9)
