"""The table of versions: what runs by default, what takes its place, and that torch's own do right."""

import pytest
import torch
from torch import Tensor

from quant_runtime.formats import pack
from quant_runtime.kernels import (
    _versions,
    attention_blocks,
    attention_fp8,
    gelu_quantize,
    hadamard,
    hadamard_quantize,
    linear_fp8,
    linear_packed,
    linear_w8a8,
    quantize_rows,
)
from quant_runtime.kernels._versions import OPS, Op, examined, fallen
from tests.quant_runtime.kernels import test_attention_blocks, test_attention_fp8
from tests.quant_runtime.kernels.inputs import FP32_ROUNDING, rows, signs, whole
from tests.support import relative_error


def half(x: Tensor) -> Tensor:
    return x / 2


def wrong(x: Tensor) -> Tensor:
    return x * 3


@pytest.fixture
def halving():
    op = Op("a_test_halves", half, torch.empty_like, cpu={"wrong": wrong, "right": half}, cuda={"wrong": wrong})
    yield op
    del OPS[op.name]


def test_the_first_version_of_its_kind_of_device_runs_until_it_falls(halving, device):
    x = torch.ones(3, device=device)
    assert torch.equal(halving(x), 3 * x)
    assert fallen(device) == {}
    following = halving.fall(device, "it is wrong")
    assert torch.equal(halving(x), x / 2)
    assert str(following) == str(halving.running(device)) == ("right" if device == "cpu" else "torch")
    assert {name: fall.why for name, fall in fallen(device).items()} == {halving.name: "it is wrong"}
    halving.rise(device)
    assert torch.equal(halving(x), 3 * x)


def test_it_falls_as_far_as_torch_and_tells_the_first_reason(halving):
    assert [str(halving.fall("cpu", why)) for why in ("one", "two", "three")] == ["right", "torch", "None"]
    assert halving.fallen("cpu").why == "one"
    assert str(halving.running("cpu")) == "torch"
    halving.rise("cpu")


def test_what_falls_on_one_device_runs_on_another(halving):
    halving.fall("cuda:0", "it is wrong")
    assert str(halving.running("cuda:0")) == "torch"
    assert [str(halving.running(other)) for other in ("cuda:1", "cpu")] == ["wrong", "wrong"]


def test_a_version_runs_on_the_devices_that_it_is_for():
    there = {"tuned": lambda device: device.index == 1}
    op = Op("a_test_is_tuned", half, torch.empty_like, cuda={"tuned": wrong, "plain": half}, on=there)
    try:
        assert [str(op.running(device)) for device in ("cuda:0", "cuda:1", "cpu")] == ["plain", "tuned", "torch"]
        assert str(op.fall("cuda:1", "it is wrong")) == "plain"
        assert str(op.fall("cuda:0", "it is wrong")) == "torch"
    finally:
        del OPS[op.name]


def test_a_compiled_program_runs_by_the_version_that_runs_now(halving):
    program = torch.compile(lambda x: halving(x) + 1, backend="eager")
    x = torch.ones(3)
    assert program(x).tolist() == [4, 4, 4]
    halving.fall("cpu", "it is wrong")
    assert program(x).tolist() == [1.5, 1.5, 1.5]
    halving.rise("cpu")


def test_while_it_is_examined_an_op_answers_what_the_examiner_says(halving):
    seen = []

    def examine(op, device, args):
        seen.append((op.name, device.type, len(args)))
        return op.reference(*args)

    with examined(examine):
        assert halving(torch.ones(1)).item() == 0.5
    assert seen == [(halving.name, "cpu", 1)]
    assert halving(torch.ones(1)).item() == 3


@pytest.mark.parametrize("shape", test_attention_blocks.SHAPES)
@pytest.mark.parametrize("scales", [None, "token", "block"])
def test_attention_in_parts_answers_what_the_reference_does(shape, scales, device, monkeypatch):
    monkeypatch.setattr(attention_blocks, "PART_ELEMENTS", 2 * shape[5] * shape[3])  # two rows of blocks at a time
    args = test_attention_blocks.arguments(shape, device, scales=scales)
    assert relative_error(attention_blocks.in_parts(*args), attention_blocks.reference(*args)) < FP32_ROUNDING


@pytest.mark.parametrize("shape", test_attention_fp8.SHAPES)
def test_attention_of_packed_heads_in_parts_does_too(shape, device, monkeypatch):
    monkeypatch.setattr(attention_blocks, "PART_ELEMENTS", shape[4] * shape[2])
    args = test_attention_fp8.arguments(shape, device)
    assert relative_error(attention_fp8.in_parts(*args), attention_fp8.reference(*args)) < FP32_ROUNDING


@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_layers_in_parts_do_too(with_bias, device, monkeypatch):
    monkeypatch.setattr(linear_w8a8, "PART_ELEMENTS", 7 * 2050)  # seven rows at a time
    x, w = whole(33, 2050, device), whole(20, 2050, device, top=7)
    bias = torch.randn(20, device=device) if with_bias else None
    scales = torch.rand(33, device=device), torch.rand(20, device=device)
    for op, weights in ((linear_w8a8, (w,)), (linear_packed, (pack(w, 4), 4))):
        args = (x, *weights, *scales, bias, torch.float32)
        assert relative_error(op.in_parts(*args), op.reference(*args)) < FP32_ROUNDING
        out = torch.full((33, 20), torch.nan, device=device)
        op._into._versions["cpu"][-1].call(*args[:-1], out)
        assert torch.equal(out, op.in_parts(*args))


def test_a_layer_in_fp8_is_written_by_every_version_where_it_is_wanted(device, monkeypatch):
    monkeypatch.setattr(linear_fp8, "PART_ELEMENTS", 7 * 2050)
    x, w = (rows(n, 2050, device).to(torch.float8_e4m3fn) for n in (33, 20))
    args = (x, w, torch.rand(33, device=device), torch.rand(20, device=device), torch.randn(20, device=device))
    want = linear_fp8.reference(*args, torch.float32)
    for version in OPS["linear_fp8_into"].versions("cpu"):
        out = torch.full((33, 20), torch.nan, device=device)
        version.call(*args, out)
        assert relative_error(out, want) < FP32_ROUNDING


def test_rows_some_at_a_time_are_all_rows(device, monkeypatch):
    monkeypatch.setattr(_versions, "PART_ELEMENTS", 4 * 64)  # four rows at a time
    x, factor = rows(10, 64, device, outliers=True), torch.rand(64, device=device)
    calls = [
        (quantize_rows, (x, 8, factor)),
        (quantize_rows, (x, 8, None, torch.float8_e4m3fn)),
        (hadamard, (x, signs(64, device), 16)),
        (hadamard_quantize, (x, signs(64, device), 16, 4, None)),
        (gelu_quantize, (x, rows(10, 32, device), 8, None, False)),
        (gelu_quantize, (x, None, 8, factor, True)),
    ]
    for op, args in calls:
        got, want = OPS[op.__name__.rsplit(".", 1)[1]].versions(device)[-1].call(*args), op.reference(*args)
        pairs = [(got, want)] if isinstance(want, Tensor) else zip(got, want, strict=True)
        assert all(torch.equal(a.float(), b.float()) for a, b in pairs), op.__name__
