"""Kernels in CUDA C++ compile for Hopper, of every source and kind, on a machine without a GPU."""

import itertools
import re
import sys
from pathlib import Path

import pytest
import torch

from quant_runtime.kernels import (
    _cuda,
    attention_blocks_sm90,
    attention_fp8_sm90,
    hadamard_quantize_sm90,
    linear_w8a8_sm90,
    pack_heads_sm90,
)

HOPPER = torch.device("cuda:0")  # none is asked for it here
SHARED = 227 << 10  # bytes that a program has
SPILLS = 128  # bytes of registers that a thread may put by: what is rarely run has some
SERIALIZED = "C7514"  # products that wait for each other, as nobody asked for: right, and several times as slow
HALVES = (torch.bfloat16, torch.float16)


ATTENTIONS = [  # (answer, residual, tokens, log-sum-exp, refresh)
    (0, 0, False, False, False),
    (1, 0, False, False, False),
    (2, 1, True, False, False),
    (1, 2, False, False, False),
    (1, 3, True, False, False),
    (1, 4, False, False, False),
    (1, 0, True, True, False),
    (0, 0, True, False, True),
    (1, 0, False, False, True),
    (1, 0, True, False, True),
    (2, 0, True, False, True),
]
ROTATIONS = [
    (256, 32),
    (3072, 128),
    (3072, 1024),
    (5120, 1024),
    (12288, 4096),
    (13824, 512),
]  # columns, and those of a block
PACKINGS = [  # (norm, others, angles, tokens)
    (0, False, 0, False),
    (1, True, 1, False),
    (2, False, 1, True),
    (3, False, 2, False),
]


def kernels():
    """Modules, and what their `_kernel` is asked for."""
    for asked in itertools.product(attention_blocks_sm90.SIZES, HALVES):
        yield attention_blocks_sm90, asked
    for size, asked in itertools.product(attention_fp8_sm90.PROGRAMS, ATTENTIONS):
        yield attention_fp8_sm90, (size, *asked)
    for asked in itertools.product(linear_w8a8_sm90.KINDS.values(), (0, *linear_w8a8_sm90.BIASES.values())):
        yield linear_w8a8_sm90, asked
    for (columns, block), fp8 in itertools.product(ROTATIONS, (False, True)):
        rows, tiles = hadamard_quantize_sm90.shape_of(columns)
        yield hadamard_quantize_sm90, (columns, block, rows, tiles, int(fp8), fp8, fp8)
    for size, block, asked in itertools.product(pack_heads_sm90.SIZES, (64, 128), PACKINGS):
        yield pack_heads_sm90, (size, block, int(block == 64), *asked)


class Assembled:
    """Stands where _cuda.Kernel stands, and loads nothing."""

    def __init__(self, file, entry, shared, defines=()):
        source = Path(_cuda.__file__).with_name(file)
        self.code, self.log = _cuda.assembled(source, defines, b"--ptxas-options=-v")
        self.entry, self.shared = entry, shared


@pytest.mark.timeout(300)
@pytest.mark.skipif(sys.platform != "linux", reason="NVIDIA's compiler comes with the tests on Linux alone")
@pytest.mark.parametrize("module", {module.__name__.rpartition(".")[2]: module for module, _ in kernels()})
def test_kernels_compile_for_hopper_within_its_memory_and_its_registers(module, monkeypatch):
    monkeypatch.setattr(_cuda, "Kernel", Assembled)
    made = [(its, asked) for its, asked in kernels() if its.__name__.endswith(f".{module}")]
    for its, asked in made:
        kernel = its._kernel.__wrapped__(HOPPER, *asked)
        assert kernel.entry.encode() in kernel.code
        assert kernel.shared <= SHARED
        assert SERIALIZED not in kernel.log, f"{module} {asked}: {kernel.log}"
        (spills,) = re.findall(r"(\d+) bytes spill stores", kernel.log)
        assert int(spills) <= SPILLS, f"{module} {asked}: {kernel.log}"


@pytest.mark.skipif(sys.platform != "linux", reason="NVIDIA's compiler comes with the tests on Linux alone")
def test_what_does_not_compile_is_told_with_the_compilers_words(tmp_path):
    source = tmp_path / "broken.cu"
    source.write_text("int f() { return missing; }")
    with pytest.raises(RuntimeError, match=r'broken.cu does not compile: (.|\n)*identifier "missing" is undefined'):
        _cuda.assembled(source, ())
