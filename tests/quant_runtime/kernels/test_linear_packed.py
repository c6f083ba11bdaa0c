import pytest
import torch
from torch import library

from quant_runtime.formats import pack
from quant_runtime.kernels import linear_packed as op
from quant_runtime.kernels import linear_w8a8
from quant_runtime.kernels.unpack import WIDTHS
from tests.quant_runtime.kernels.inputs import FP32_ROUNDING, whole
from tests.support import relative_error

SHAPES = [(1, 1, 1), (16, 64, 64), (65, 130, 101), (20, 96, 257), (70, 33, 2050)]


def inputs(m, n, k, device, bits=4):
    w = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (n, k), dtype=torch.int8, device=device)
    return whole(m, k, device), w, torch.rand(m, device=device) + 0.5, torch.rand(n, device=device) + 0.5


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_it_answers_what_the_unpacked_weights_answer(m, n, k, bits, device):
    x, w, x_scale, w_scale = inputs(m, n, k, device, bits)
    bias = torch.randn(n, device=device)
    got = op.linear_packed(x, pack(w, bits), bits, x_scale, w_scale, bias, torch.float32)
    assert torch.equal(got, linear_w8a8.linear_w8a8(x, w, x_scale, w_scale, bias, torch.float32))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_the_cpu_version_agrees_with_the_reference(m, n, k, bits):
    x, w, x_scale, w_scale = inputs(m, n, k, "cpu", bits)
    args = (x, pack(w, bits), bits, x_scale, w_scale, torch.randn(n), torch.float32)
    assert relative_error(op.on_cpu(*args), op.reference(*args)) < FP32_ROUNDING


@pytest.mark.skipif(op.triton is None, reason="Triton is not installed")
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("version", [op.launch, op.launch_few_rows])
def test_triton_agrees_with_the_reference(m, n, k, bits, version, device):
    x, w, x_scale, w_scale = inputs(m, n, k, device, bits)
    args = (x, pack(w, bits), bits, x_scale, w_scale, torch.randn(n, device=device), torch.float32)
    assert relative_error(version(*args), op.reference(*args)) < FP32_ROUNDING


def test_weights_packed_for_another_layer_are_refused():
    x, w, x_scale, w_scale = inputs(2, 4, 24, "cpu")
    with pytest.raises(ValueError, match=r"for 24 inputs of 4 bits; got torch.uint8 \[4, 8\]"):
        op.linear_packed(x, pack(w[:, :16], 4), 4, x_scale, w_scale)


def test_torch_accepts_the_op(device):
    x, w, x_scale, w_scale = inputs(5, 7, 32, device)
    args = (x, pack(w, 4), 4, x_scale, w_scale, None, torch.float32)
    library.opcheck(torch.ops.quant_runtime.linear_packed.default, args)
