import pytest
import torch
from torch.nn import functional as F

from quant_runtime.kernels import map_pass as op
from tests.quant_runtime.kernels.inputs import FP32_ROUNDING, TRITON_DTYPES
from tests.support import relative_error

PLACED = 1e-5  # float32 maps resized: where a pixel comes from is told in float32, of hundreds, and a GPU fuses it
ROUNDING = {torch.float32: FP32_ROUNDING, torch.float16: 2**-10, torch.bfloat16: 2**-8}  # of the answer's dtype
triton_only = pytest.mark.skipif(op.triton is None, reason="Triton is not installed")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What a kernel does not write is NaN."""
    empty = torch.empty

    def filled(*shape, **kind):
        made = empty(*shape, **kind)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(op.torch, "empty", filled)


def drawn(*shape, device, dtype=torch.float32):
    """A map, channels last; one channel in 16 is 30 times as large, as real ones are."""
    x = torch.randn(shape, device=device)
    x[:, ::16] *= 30
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def everything(x, size, device):
    n, channels = x.shape[:2]
    across, down = (torch.randn(side, channels // 2, device=device) for side in reversed(size))
    more = [drawn(n, channels, *size, device=device, dtype=x.dtype) for _ in range(2)]
    return torch.randn(channels, device=device).to(x.dtype), across, down, *more


@triton_only
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((2, 16, 3, 5), (6, 9)),
        ((1, 20, 7, 70), (11, 131)),  # ragged to a program's pixels and channels
        ((2, 300, 4, 4), (7, 3)),  # channels of two programs; one side grows, one shrinks
        ((1, 32, 5, 6), (1, 1)),
        ((3, 8, 1, 1), (4, 5)),
        ((2, 300, 3, 45), (3, 45)),
    ],
)
def test_triton_agrees_with_the_reference(shape, size, dtype, device):
    x = drawn(*shape, device=device, dtype=dtype)
    bias, across, down, side, other = everything(x, size, device)
    for operands in (
        (None, None, None, None, None, False),
        (bias, None, None, None, None, True),
        (None, across, down, None, None, False),
        (bias, None, None, side, None, False),
        (bias, across, down, side, other, True),
    ):
        got, want = op.launch(x, *size, *operands), op.reference(x, *size, *operands)
        assert got.dtype == dtype
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert relative_error(got, want) < (PLACED if dtype == torch.float32 and size != shape[2:] else ROUNDING[dtype])


@triton_only
@pytest.mark.parametrize(("size", "placed"), [((6, 10), False), ((3, 5), True), ((3, 5), False)])
def test_maps_may_lie_in_any_order_and_apart(size, placed, device):
    """As tokens do that have others in front of them."""
    tokens = torch.randn(2, 4 + 15, 8, device=device)
    apart = tokens[:, 4:].transpose(1, 2).unflatten(2, (3, 5))
    bias, across, down, side, _ = everything(apart, size, device)
    places = (across, down) if placed else (None, None)
    want = op.reference(apart, *size, bias, *places, side, None, True)
    for x in (apart, apart.contiguous()):
        for added in (side, side.contiguous()):
            assert relative_error(op.launch(x, *size, bias, *places, added, None, True), want) < FP32_ROUNDING


@triton_only
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize(("shape", "out"), [((2, 32, 7, 23), 2), ((1, 20, 3, 3), 4), ((3, 64, 1, 70), 1)])
@pytest.mark.parametrize("biased", [True, False])
def test_the_last_product_agrees_with_the_reference(shape, out, dtype, biased, device):
    x, weight, last = drawn(*shape, device=device, dtype=dtype), torch.randn(out, shape[1]), torch.randn(out)
    bias = torch.randn(shape[1], device=device).to(dtype) if biased else None
    operands = (x, bias, weight.to(device), last.to(device))
    got, want = op.launch_answer(*operands), op.reference_answer(*operands)
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    assert relative_error(got, want) < FP32_ROUNDING


def test_it_is_a_resize_and_sums(device):
    x = drawn(2, 8, 3, 5, device=device)
    bias, across, down, side, other = everything(x, (7, 9), device)
    want = F.interpolate(x.double(), size=(7, 9), mode="bilinear", align_corners=True) + side + other
    want += bias[:, None, None]
    want[:, :4] += across.t()[:, None]
    want[:, 4:] += down.t()[:, :, None]
    got = op.map_pass(x, (7, 9), bias, (across, down), side, other)
    assert relative_error(got, want) < FP32_ROUNDING
    assert relative_error(op.map_pass(x, (7, 9), bias, (across, down), side, other, True), want.relu()) < FP32_ROUNDING
    assert torch.equal(op.map_pass(x), x)


@pytest.mark.parametrize("version", [op.reference, pytest.param(op.launch, marks=triton_only)])
def test_what_is_not_a_number_stays_none(version, device):
    """Whoever asks for a scene is told that there is none, instead of being given zeros."""
    x = torch.zeros(1, 4, 2, 2, device=device)
    x[0, 1, 1, 1] = torch.nan
    assert torch.equal(version(x, 2, 2, None, None, None, None, None, True).isnan(), x.isnan())
    answer = op.reference_answer if version is op.reference else op.launch_answer
    assert answer(x, None, torch.ones(1, 4, device=device), torch.zeros(1, device=device)).isnan().sum() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fake_answers_are_like_the_real_ones(dtype, device):
    x = drawn(2, 8, 3, 5, device=device, dtype=dtype)
    for size in (None, (6, 9)):
        operands = (x, *(size or x.shape[2:]), *[None] * 5, True)
        real, fake = op.map_pass(x, size, rectified=True), op._fake(*operands)
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
    operands = (x, None, torch.randn(2, 8, device=device), torch.randn(2, device=device))
    real, fake = op.map_answer(*operands), op._fake_answer(*operands)
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def test_operands_that_do_not_fit_are_refused():
    x, half = torch.zeros(1, 4, 2, 3), torch.zeros(3, 2)
    for refused, words in (
        (lambda: op.map_pass(x[0]), r"\[n, C, h, w\]"),
        (lambda: op.map_pass(x.int()), "int32"),
        (lambda: op.map_pass(x, (0, 3)), "above zero"),
        (lambda: op.map_pass(x, bias=torch.zeros(3)), "bias"),
        (lambda: op.map_pass(x, places=(half, half)), "places of 2 × 3"),
        (lambda: op.map_pass(x, places=(half.double(), half[:2].double())), "float32"),
        (lambda: op.map_pass(x, side=x[..., :2]), "adds maps"),
        (lambda: op.map_pass(x, other=x.half()), "adds maps"),
        (lambda: op.map_answer(x, None, torch.zeros(2, 3), torch.zeros(2)), "weight float32"),
        (lambda: op.map_answer(x, None, torch.zeros(2, 4).half(), torch.zeros(2)), "weight float32"),
        (lambda: op.map_answer(x, torch.zeros(5), torch.zeros(2, 4), torch.zeros(2)), "bias"),
        (lambda: op.map_answer(torch.zeros(1, 1025, 2, 3), None, torch.zeros(2, 1025), torch.zeros(2)), "1024"),
    ):
        with pytest.raises(ValueError, match=words):
            refused()
