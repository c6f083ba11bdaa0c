"""On a Hopper alone: no interpreter runs these instructions."""

import pytest
import torch

from quant_runtime.kernels import _cuda, hadamard_quantize_sm90
from quant_runtime.kernels import hadamard_quantize as op
from quant_runtime.kernels._fp8 import E4M3
from tests.quant_runtime.kernels.inputs import fp8_steps, rows, signs
from tests.quant_runtime.kernels.test_hadamard_quantize import FLIPS, FP8_SMALL, SAME_SCALE

SHAPES = [  # rows, columns, block: several rows of a program and one, a tile that no row fills, every number of threads
    (5, 3072, 128),
    (37, 3072, 1024),
    (300, 5120, 1024),
    (9, 12288, 4096),
    (7, 13824, 512),
    (5, 1536, 256),
    (3, 256, 32),
    (3, 4096, 2048),
    (2, 2048, 64),
    (3000, 3072, 1024),  # several turns of a program
    (1500, 5120, 1024),
    (700, 12288, 4096),
]


@pytest.fixture(autouse=True)
def _hopper(device):
    if not _cuda.is_hopper(torch.device(device)):
        pytest.skip("sm_90a runs on a Hopper, with CUDA's bindings for Python")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("m", "k", "block"), SHAPES)
def test_it_agrees_with_the_reference(m, k, block, dtype, device):
    x, s = rows(m, k, device, outliers=True, dtype=dtype), signs(k, device)
    assert hadamard_quantize_sm90.takes(x, block)
    for bits, factor in ((8, None), (4, torch.rand(k, device=device) + 0.1)):
        q, scale = op.launch_hopper(x, s, block, bits, factor)
        want_q, want_scale = op.reference(x, s, block, bits, factor)
        assert ((scale - want_scale).abs() <= SAME_SCALE * want_scale).all()
        assert (q.int() - want_q.int()).abs().max() <= 1
        assert (q != want_q).float().mean() < FLIPS
    q, scale = op.launch_hopper(x, s, block, 8, None, E4M3)
    want_q, want_scale = op.reference(x, s, block, 8, None, E4M3)
    assert ((scale - want_scale).abs() <= SAME_SCALE * want_scale).all()
    steps, sizes = fp8_steps(q, want_q, interpreted=False), want_q.float().abs()
    assert steps[sizes > FP8_SMALL].max() <= 1
    assert (steps[sizes > FP8_SMALL] > 0).float().mean() < FLIPS


@pytest.mark.parametrize("block", [128, 1024])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_the_scale_of_its_row_alone(bad, block, device):
    x = rows(7, 3072, device, dtype=torch.bfloat16)
    x[3, 1500] = bad
    _, scale = op.launch_hopper(x, signs(3072, device), block, 8, None)
    assert scale.isfinite().tolist() == [True, True, True, False, True, True, True]


def test_rows_of_zeros_have_a_scale_that_is_not_zero(device):
    q, scale = op.launch_hopper(torch.zeros(3, 3072, device=device).bfloat16(), signs(3072, device), 128, 8, None)
    assert not q.any()
    assert (scale > 0).all()


def test_what_it_does_not_take_runs_by_triton(device):
    x, s = rows(4, 384, device, dtype=torch.bfloat16), signs(384, device)
    assert not hadamard_quantize_sm90.takes(x, 128), "384 is no multiple of a thread's 256"
    assert not hadamard_quantize_sm90.takes(rows(4, 512, device), 128), "float32"
    assert not hadamard_quantize_sm90.takes(x.new_zeros(4, 8192), 8192), "blocks above two warps' columns"
    got, want = op.launch_hopper(x, s, 128, 8, None), op.launch(x, s, 128, 8, None)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_it_is_what_runs_there(device):
    x, s = rows(50, 3072, device, dtype=torch.bfloat16), signs(3072, device)
    ran, want = op.hadamard_quantize(x, s, 1024), op.launch_hopper(x, s, 1024, 8, None)
    assert all(torch.equal(a, b) for a, b in zip(ran, want, strict=True))
