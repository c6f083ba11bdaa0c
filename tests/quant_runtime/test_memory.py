from __future__ import annotations

import os

import pytest
import torch

from quant_runtime.memory import Room, host_room, room

MEMINFO = "MemTotal:        1000 kB\nMemFree:          10 kB\nMemAvailable:     600 kB\nHugePages_Total:       0\n"
UNLIMITED = 2**63 - 4096  # as the first version has it


def test_what_torch_holds_and_does_not_use_is_room_too_and_what_others_hold_may_come_back(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    assert room(torch.device("cuda")) == Room(now=130, ever=980)


def test_a_cpu_has_no_memory_of_its_own():
    assert room(torch.device("cpu")) is None


@pytest.fixture
def machine(tmp_path):
    """Its /proc and /sys/fs/cgroup, with files written as given."""

    def machine(cgroup: str, files: dict[str, str]):
        (tmp_path / "proc" / "self").mkdir(parents=True)
        (tmp_path / "proc" / "meminfo").write_text(MEMINFO)
        (tmp_path / "proc" / "self" / "cgroup").write_text(cgroup)
        for name, text in files.items():
            path = tmp_path / "sys" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path / "proc", tmp_path / "sys"

    return machine


def group(folder: str, most: str, used: int, stat: str) -> dict[str, str]:
    return {f"{folder}memory.max": most, f"{folder}memory.current": str(used), f"{folder}memory.stat": stat}


def test_the_host_has_what_its_kernel_says(machine):
    assert host_room(*machine("0::/\n", {})) == Room(600 * 1024, 1000 * 1024)


def test_the_tightest_group_that_the_process_is_in_counts_less_what_it_can_drop(machine):
    files = group("a/b/", "max", 9, "") | group("a/", "300000", 250000, "anon 7\ninactive_file 100000\n")
    files |= group("", "900000", 500000, "inactive_file 0\n")
    assert host_room(*machine("0::/a/b\n", files)) == Room(150000, 300000)


def test_a_group_that_is_full_leaves_nothing(machine):
    assert host_room(*machine("0::/\n", group("", "300000", 310000, ""))) == Room(0, 300000)


def test_groups_of_the_first_version_count_too(machine):
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
    job = ("300000", "200000", "inactive_file 1\ntotal_inactive_file 50000\n")
    texts = {"memory/job/": job, "memory/": (str(UNLIMITED), "5", "")}
    files = {folder + name: text for folder, its in texts.items() for name, text in zip(names, its, strict=True)}
    assert host_room(*machine("3:cpuset:/\n4:memory:/job\n0::/\n", files)) == Room(150000, 300000)


def test_pinned_memory_that_torch_keeps_and_does_not_use_is_room(machine, monkeypatch):
    held = {"allocated_bytes.current": 5000, "active_bytes.current": 2000}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "host_memory_stats", lambda: held)
    assert host_room(*machine("0::/\n", {})) == Room(600 * 1024 + 3000, 1000 * 1024)


def test_where_the_system_does_not_tell_nothing_is_known(tmp_path):
    assert host_room(tmp_path, tmp_path) is None


@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="Linux alone tells")
def test_this_host_has_some():
    found = host_room()
    assert found is not None
    assert 0 < found.now <= found.ever
