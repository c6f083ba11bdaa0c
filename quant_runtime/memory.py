"""How much memory there is to be had, of a device and of its host."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch


class Room(NamedTuple):
    """In bytes."""

    now: int  # that could be taken at this moment
    ever: int  # and if nobody else held any: at most


def room(device: torch.device) -> Room | None:
    """What torch could still take on a GPU, what it holds and does not use among it.

    None on a CPU: its memory is the host's.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    used = torch.cuda.memory_allocated(device)
    return Room(free + torch.cuda.memory_reserved(device) - used, total - used)


def host_room(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> Room | None:
    """What this process could take on the host, inside the limits of the control groups that it is in.

    Pages of files that can be dropped count as room, and so does pinned memory that torch holds and does not use. None
    where the system does not tell, as on macOS.
    """
    try:
        lines = (line.split() for line in (proc / "meminfo").read_text().splitlines())
        meminfo = {name.rstrip(":"): int(value) * 1024 for name, value, *_ in lines}
        rooms = [Room(meminfo["MemAvailable"], meminfo["MemTotal"]), *_limits(proc, cgroups)]
    except (OSError, KeyError):
        return None
    return Room(min(one.now for one in rooms) + _idle_pinned(), min(one.ever for one in rooms))


def _limits(proc: Path, cgroups: Path) -> Iterator[Room]:
    """Of each group that holds this process and has a limit, in either version of control groups."""
    for line in (proc / "self" / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, most, used, droppable = cgroups, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, most, used = cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            droppable = "total_inactive_file"
        else:
            continue
        inside = root / path.lstrip("/")
        for group in (inside, *inside.parents):
            if group.is_relative_to(root) and (group / most).is_file():  # a container may see its root alone
                limit = (group / most).read_text().strip()
                if limit != "max":
                    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                    held = int((group / used).read_text()) - int(stat.get(droppable, 0))
                    yield Room(max(int(limit) - held, 0), int(limit))


def _idle_pinned() -> int:
    if not torch.cuda.is_initialized():
        return 0
    stats = torch.cuda.host_memory_stats()
    idle = int(stats["allocated_bytes.current"] - stats["active_bytes.current"])
    return max(idle, 0)  # of little, torch has counted more as active than as allocated
