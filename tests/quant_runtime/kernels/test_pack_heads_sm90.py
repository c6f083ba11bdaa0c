"""On a Hopper alone: no interpreter runs these instructions."""

import pytest
import torch

from quant_runtime.kernels import _cuda, pack_heads_sm90
from quant_runtime.kernels import pack_heads as op
from tests.quant_runtime.kernels.inputs import FP32_ROUNDING
from tests.quant_runtime.kernels.test_pack_heads import CANCELLED, FLIPS, INT8, KINDS, arguments, shuffled
from tests.support import relative_error

SHAPES = [  # batch, heads, tokens, size, block, tokens that turn, first of them
    (1, 2, 200, 64, 64, 150, 0),
    (2, 2, 150, 64, 128, 124, 26),
    (1, 2, 130, 128, 64, 100, 30),
    (2, 3, 1300, 128, 128, 1100, 50),
    (1, 1, 3, 128, 128, 3, 0),
    (1, 2, 5000, 128, 128, 0, 0),
    (1, 2, 5000, 64, 128, 4900, 20),
]


@pytest.fixture(autouse=True)
def _hopper(device):
    if not _cuda.is_hopper(torch.device(device)):
        pytest.skip("sm_90a runs on a Hopper, with CUDA's bindings for Python")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["as they come", "of each head", "of all heads"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_agrees_with_the_reference(shape, kind, order, dtype, device):
    args = arguments(shape, device, dtype, kind)
    if order != "as they come":
        args = (*args, shuffled(shape, device, order == "of all heads"))
    assert pack_heads_sm90.takes(*args[:3])
    got, want = op.Packed(*op.launch_hopper(*args)), op.Packed(*op.reference(*args))
    for name in ("q_scale", "k_scale", "v_scale", "q_means", "k_means"):
        assert relative_error(getattr(got, name), getattr(want, name)) < FP32_ROUNDING, name
    for name in ("q_alike", "k_alike"):
        assert relative_error(getattr(got, name), getattr(want, name)) < CANCELLED, name
    for name in ("q", "k"):
        apart = (getattr(got, name).int() - getattr(want, name).int()).abs()
        assert apart.max() <= 1, name
        assert apart.float().mean() < FLIPS, name
    assert relative_error(got.v.float(), want.v.float()) < INT8


@pytest.mark.parametrize("angles", [torch.float16, torch.float32])
def test_it_answers_what_triton_does_and_the_same_every_time(angles, device):
    """Sums of more samples than one piece has are added up in one order, whoever comes first."""
    args = list(arguments(SHAPES[3], device, torch.bfloat16))
    args[9], args[10] = args[9].to(angles), args[10].to(torch.float16)  # each of its own kind, perhaps
    got, again, want = (op.Packed(*run(*args)) for run in (op.launch_hopper, op.launch_hopper, op.launch))
    for name in op.Packed._fields:
        assert torch.equal(getattr(got, name).float(), getattr(again, name).float()), name
    assert relative_error(got.k.float() * got.k_scale.mean(), want.k.float() * want.k_scale.mean()) < INT8


def test_heads_of_more_blocks_than_there_are_programs_are_packed_as_triton_packs_them(device):
    """As those of large films: runs of several pieces, and a head's values behind its largest ones."""
    args = arguments((1, 2, 40_000, 128, 128, 39_000, 0), device, torch.bfloat16)
    got, want = (op.Packed(*run(*args)) for run in (op.launch_hopper, op.launch))
    for name in ("v", "v_scale"):
        assert torch.equal(getattr(got, name).float(), getattr(want, name).float()), name
    for name in ("q", "k"):
        apart = (getattr(got, name).int() - getattr(want, name).int()).abs()
        assert apart.max() <= 1, name
        assert apart.float().mean() < FLIPS, name
    for name in ("q_scale", "k_scale", "q_means", "k_means"):
        assert relative_error(getattr(got, name), getattr(want, name)) < FP32_ROUNDING, name


@pytest.mark.parametrize("number", [0, 1, 2])
def test_what_is_not_finite_shows_where_it_is(number, device):
    args = list(arguments((1, 3, 256, 128, 128, 0, 0), device, torch.bfloat16))
    args[number] = args[number].clone()
    args[number][0, 1, 200, 3] = float("nan")
    packed = op.Packed(*op.launch_hopper(*args))
    assert packed.q_scale.isfinite().all(dim=2).tolist() == [[True, number != 0, True]]
    assert packed.k_scale[0, 1, 1].isfinite() == (number != 1)
    assert packed.k_scale[0, ::2].isfinite().all()
    assert packed.v.float().isfinite().all(dim=3).all(dim=2).tolist() == [[True, number != 2, True]]
    assert packed.v_scale.isfinite().all()


def test_other_heads_and_rows_at_odd_places_run_by_triton(device):
    q = torch.randn(1, 2, 200, 128, device=device)
    assert not pack_heads_sm90.takes(q, q, q)
    half = q.bfloat16()
    assert pack_heads_sm90.takes(half, half, half)
    assert not pack_heads_sm90.takes(*[half[..., :96]] * 3)
    odd = torch.empty(1, 2, 200, 132, device=device, dtype=torch.bfloat16)[..., :128].copy_(half)
    assert not pack_heads_sm90.takes(half, odd, half)
    args = (half, odd, half, 128, None, None, None, None, 1e-6, None, None, 0, None, None)
    got, want = op.launch_hopper(*args), op.launch(*args)
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(got, want, strict=True))


def test_it_is_what_runs_there(device):
    args = arguments(SHAPES[3], device, torch.bfloat16)
    ran, want = op._op(*args, None), op.launch_hopper(*args)
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(ran, want, strict=True))
