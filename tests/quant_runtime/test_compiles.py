"""What Triton compiles is heard of: new in one process, read from the disk in the next. No GPU is needed to compile."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from quant_runtime.compiles import recorded
from quant_runtime.kernels import quantize_rows
from quant_runtime.kernels._triton import triton
from tests.quant_runtime.kernels.test_compile import record_kernels


def compiled(cache):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.quant_runtime.test_compiles"]
    done = subprocess.run(
        command, env=environment | {"TRITON_CACHE_DIR": str(cache)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
def test_a_kernel_is_compiled_once_and_then_lies_in_the_cache_on_the_disk(tmp_path):
    cache = tmp_path / "cache"
    for expected in (False, True):
        before = written(cache)
        started = time.monotonic()
        ((name, cached, seconds),) = compiled(cache)
        assert (name, cached) == ("_quantize_rows", expected)
        assert 0 < seconds <= time.monotonic() - started  # a part of what the process took, in seconds
        assert (written(cache) == before) is expected


def written(cache):
    return {file: file.stat().st_mtime_ns for file in cache.rglob("*") if file.is_file()}


def main() -> None:
    record_kernels(quantize_rows, "Hopper")
    with recorded() as seen:
        quantize_rows.launch(torch.zeros(3, 64), 8, None)
    record = [(one.kernel, one.cached, one.seconds) for one in seen]
    print(json.dumps(record))


if __name__ == "__main__":
    main()
