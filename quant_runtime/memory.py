"""How much of a device's memory there is to be had."""

from __future__ import annotations

import torch


def room(device: torch.device) -> int | None:
    """Bytes that torch could still take on a GPU, what it holds and does not use among them.

    None on a CPU: its memory is shared with all that runs there, and there is no telling.
    """
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
