import os
import platform
import subprocess
import sys
import threading

import pytest
import torch

from quant_runtime.kernels import _cpu

INT8_TESTS = ("_cpu", "linear_w8a8", "linear_packed", "attention_blocks")


@pytest.mark.parametrize("path", ["onednn", "float32"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (64, 64, 256), (33, 17, 1024), (5, 9, 3001)])
def test_products_of_the_largest_int8_are_exact(m, n, k, path, monkeypatch):
    if path == "onednn" and not _cpu._int_mm_is_exact():
        pytest.skip("oneDNN saturates on this CPU")
    monkeypatch.setattr(_cpu, "cpu_int8_path", lambda: path)
    a = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    b = torch.full((n, k), -128, dtype=torch.int8)
    a[0] = 127  # one sign throughout: sums grow as large as they can
    got = _cpu.products(_cpu.operand(a, "a"), _cpu.operand(b, "b"), torch.empty(m, n))
    assert torch.equal(got, (a.long() @ b.long().T).float())


def test_int8_is_exact_on_a_cpu_where_onednn_saturates():
    """oneDNN kept from VNNI adds pairs of products in 16 bits: what is exact there has not gone through it."""
    if os.environ.get("ONEDNN_MAX_CPU_ISA"):
        pytest.skip("this is that CPU")
    here = os.path.dirname(__file__)
    files = [os.path.join(here, f"test_{name}.py") for name in INT8_TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cpu_version or exact", *files]
    done = subprocess.run(command, env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize(
    ("error", "vnni", "path", "why"),
    [(0, True, "onednn", ""), (1, True, "float32", "not exact"), (0, False, "float32", "no fast")],
)
def test_a_wrong_or_a_slow_int8_matmul_is_not_used_and_the_log_says_why(error, vnni, path, why, monkeypatch, caplog):
    monkeypatch.setattr(_cpu.torch, "_int_mm", lambda a, b: (a.long() @ b.long()).int() + error)
    monkeypatch.setattr(_cpu, "_cpu_has", lambda *asked: vnni)
    assert _cpu.cpu_int8_path.__wrapped__() == path
    assert why in caplog.text
    assert bool(caplog.records) == (path == "float32")


def test_scratch_is_used_again_by_its_thread_and_by_no_other():
    first = _cpu.scratch("test", (4, 5), torch.float32)
    again = _cpu.scratch("test", (2, 10), torch.float32)
    other = _cpu.scratch("test", (4, 5), torch.int32)
    found = []
    thread = threading.Thread(target=lambda: found.append(_cpu.scratch("test", (4, 5), torch.float32)))
    thread.start()
    thread.join()
    assert again.data_ptr() == first.data_ptr()
    assert len({first.data_ptr(), other.data_ptr(), found[0].data_ptr()}) == 3


def test_scratch_made_in_inference_mode_can_be_written_outside_of_it():
    with torch.inference_mode():
        _cpu.scratch("inference", (8,), torch.float32).zero_()
    _cpu.scratch("inference", (8,), torch.float32).add_(1)


def test_a_large_buffer_is_not_kept(monkeypatch):
    monkeypatch.setattr(_cpu, "SCRATCH_ELEMENTS", 10)
    _cpu.scratch("large", (11,), torch.float32)
    assert ("large", torch.float32) not in _cpu._local.kept


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1000, 3), (10, _cpu.CHUNK_ELEMENTS * 2), (0, 5)])
def test_chunks_cover_all_rows_once_and_stay_small(rows, width):
    chunks = _cpu.row_chunks(rows, width)
    assert [row for chunk in chunks for row in range(rows)[chunk]] == list(range(rows))
    assert all((chunk.stop - chunk.start) * width <= max(width, _cpu.CHUNK_ELEMENTS) for chunk in chunks)


KEEP_AND_GIVE_BACK = """
import torch
from quant_runtime.kernels import _cpu

def held():  # MiB
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 >> 20

print(_cpu.keep_freed_memory())
before = held()
torch.ones(1 << 26)  # 256 MiB, freed at once
kept = held()
_cpu.give_back_freed_memory()
print(kept - before > 200, held() - before < 60)
"""


def test_freed_memory_is_kept_where_glibc_is_until_it_is_given_back():
    """In a process of its own: what it changes holds for the rest of a process."""
    command = [sys.executable, "-c", KEEP_AND_GIVE_BACK]
    agreed, kept, gone = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert agreed == str(platform.libc_ver()[0] == "glibc")
    if agreed == "True":
        assert (kept, gone) == ("True", "True")
