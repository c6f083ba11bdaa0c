import pytest
import torch
from torch import library

from quant_runtime.kernels import hadamard as op
from tests.quant_runtime.kernels.inputs import FP32_ROUNDING, TRITON_DTYPES, rows, signs
from tests.support import relative_error

SHAPES = [(1, 1, 1), (5, 6, 2), (7, 24, 8), (33, 384, 128), (9, 48, 16), (3, 768, 256), (2, 2048, 1024)]


@pytest.mark.parametrize(("m", "k", "block"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_cpu_version_agrees_with_the_reference(m, k, block, dtype):
    x, s = rows(m, k, "cpu", outliers=True, dtype=dtype), signs(k, "cpu")
    assert relative_error(op.on_cpu(x, s, block), op.reference(x, s, block)) < FP32_ROUNDING


@pytest.mark.skipif(op.triton is None, reason="Triton is not installed")
@pytest.mark.parametrize(("m", "k", "block"), SHAPES)
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_triton_agrees_with_the_reference(m, k, block, dtype, device):
    x, s = rows(m, k, device, outliers=True, dtype=dtype), signs(k, device)
    assert relative_error(op.launch(x, s, block), op.reference(x, s, block)) < FP32_ROUNDING


def test_turning_both_sides_leaves_a_product_as_it_was(device):
    x, w, s = rows(6, 96, device), rows(10, 96, device), signs(96, device)
    turned = op.hadamard(x, s, 32).double() @ op.hadamard(w, s, 32).double().T
    assert relative_error(turned, x.double() @ w.double().T) < FP32_ROUNDING


def test_turning_back_gives_the_input_back(device):
    x, s = rows(6, 96, device), signs(96, device)
    back = op.hadamard(op.hadamard(x, s, 32), torch.ones_like(s), 32) * s
    assert relative_error(back, x) < FP32_ROUNDING


def test_an_outlier_channel_is_spread_over_its_block(device):
    x = torch.zeros(1, 64, device=device)
    x[0, 5] = 64.0
    assert op.hadamard(x, signs(64, device), 64).abs().max().item() == pytest.approx(8.0)


@pytest.mark.parametrize(("inputs", "block"), [(384, 128), (768, 256), (13824, 512), (1024, 1024), (33, 1)])
def test_the_largest_block_is_the_largest_power_of_two_that_divides(inputs, block):
    assert op.largest_block(inputs) == block


@pytest.mark.parametrize("block", [0, 3, 64])
def test_a_block_that_does_not_divide_is_refused(block):
    with pytest.raises(ValueError, match=f"divides K=96; got {block}"):
        op.hadamard(torch.zeros(2, 96), torch.ones(96, dtype=torch.int8), block)


def test_signs_of_another_length_are_refused():
    with pytest.raises(ValueError, match="signs are int8"):
        op.hadamard(torch.zeros(2, 96), torch.ones(95, dtype=torch.int8), 32)


def test_torch_accepts_the_op(device):
    args = (rows(5, 48, device), signs(48, device), 16)
    library.opcheck(torch.ops.quant_runtime.hadamard.default, args)
