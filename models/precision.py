"""Which float a device computes in fastest."""

from __future__ import annotations

import torch

from quant_runtime.kernels._cpu import cpu_has_bfloat16


def fast_float(device: torch.device | str) -> torch.dtype:
    """bfloat16 where this device multiplies it itself, else float32."""
    on_cpu = torch.device(device).type == "cpu"
    return torch.float32 if on_cpu and not cpu_has_bfloat16() else torch.bfloat16
