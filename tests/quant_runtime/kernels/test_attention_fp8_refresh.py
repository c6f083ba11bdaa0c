"""Dense attention and what the kept blocks lack of it, in one pass: by every version that the device has."""

import pytest
import torch
from torch import library

from quant_runtime.kernels import _cuda, attention_fp8_sm90
from quant_runtime.kernels import attention_fp8 as op
from quant_runtime.kernels.pack_heads import pack_heads
from tests.quant_runtime.kernels.inputs import FP8_CHECKS, FP32_ROUNDING, ROUNDING
from tests.quant_runtime.kernels.test_attention_fp8 import (
    SCORES_ROUNDED,
    SHAPES,
    limit,
    placed,
    refresh_arguments,
    shuffled,
)
from tests.support import relative_error

SIZES = tuple(attention_fp8_sm90.PROGRAMS)
HOPPER_SHAPES = [
    (batch, heads, tokens, size, 128)
    for size in SIZES
    for batch, heads, tokens in ((1, 2, 1000), (2, 3, 517), (1, 1, 128), (4, 50, 517))
]  # at last more than three tiles a program
PLAIN = {op.refresh_on_cpu: op.on_cpu, op.refresh_launch: op.launch, op.refresh_launch_hopper: op.launch_hopper}
CASES = [
    (version, shape)
    for version in PLAIN
    for shape in (HOPPER_SHAPES if version is op.refresh_launch_hopper else SHAPES[:3])
]
FEWER_ROWS = [(2, 3, 300, size, 128) for size in SIZES]  # for an interpreter: three, the last of them ragged
SMALL = (1, 2, 5 * 128 - 20, 64, 128)  # blocks that any version takes, the last of them ragged
GROWN = 0.1  # weights of another largest score lie elsewhere between e4m3's steps
HALF_A_STEP = {torch.float16: 2**-11, torch.bfloat16: 2**-8}  # of a number, at most
LEFT = {torch.float16: 2**-20, torch.bfloat16: 2**-15}  # of a number that waits, as two halves
SUBNORMAL = 2**-23  # two steps of float16 where it has no more bits to give


def here(version, device):
    if version is op.refresh_on_cpu and device != "cpu":
        pytest.skip("the CPU version runs on CPU tensors")
    if version is op.refresh_launch and op.triton is None:
        pytest.skip("Triton is not installed")
    if version is op.refresh_launch_hopper and not _cuda.is_hopper(torch.device(device)):
        pytest.skip("sm_90a runs on a Hopper, with CUDA's bindings for Python")
    return version


def without_rounding_weights(version):
    return version is op.refresh_on_cpu or version is op.refresh_reference


def counted(shape, device, out_dtype):
    """As refresh_arguments, but row n keeps n blocks, the last row all: blocks n - 1, n - 2 ... of a ring."""
    args = list(refresh_arguments(shape, device, out_dtype))
    blocks = args[6].shape[3]
    ring = torch.arange(blocks, device=device)
    kept = [((row - 1 - ring[: row + (row == blocks - 1)]) % blocks).sort().values for row in range(blocks)]
    full = [torch.cat([mine, ring[~torch.isin(ring, mine)]]) for mine in kept]
    args[6] = torch.stack(full).int().expand(args[6].shape)
    args[7] = torch.tensor([len(mine) for mine in kept], dtype=torch.int32, device=device).expand(args[7].shape)
    return tuple(args)


@pytest.mark.parametrize(("version", "shape"), CASES)
@pytest.mark.parametrize("arguments", [refresh_arguments, counted])
def test_it_answers_dense_attention_and_what_the_kept_blocks_lack_of_it(version, shape, arguments, device):
    args = arguments(shape, device, torch.float32)
    dense, lost = here(version, device)(*args)
    blocks, counts = args[6].shape[3], args[7]
    every = torch.arange(blocks, dtype=torch.int32, device=device).expand(args[6].shape)
    whole = (*args[:6], every, torch.full_like(counts, blocks), *args[8:], None, None)
    exact = without_rounding_weights(version)
    order = SCORES_ROUNDED if exact else limit(device) / 2
    assert relative_error(dense, PLAIN[version](*whole)) < order, "weights are rounded beside another largest score"
    sparse = PLAIN[version](*args, None, None)
    order = SCORES_ROUNDED if exact else FP32_ROUNDING  # a CPU's sums are in the order of the blocks it is given
    assert (dense - lost - sparse).norm() < order * dense.norm()
    for got, want in zip((dense, lost), op.refresh_reference(*args), strict=True):
        assert (got - want).norm() < (SCORES_ROUNDED if exact else limit(device)) * dense.norm()
        assert got.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(("version", "shape"), CASES)
@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16])
def test_what_waits_in_16_bits_is_as_good_as_in_32(version, shape, out_dtype, device):
    if out_dtype == torch.bfloat16 and device == "cpu" and version is op.refresh_launch:
        pytest.skip("Triton's interpreter computes bfloat16 wrongly")
    args = refresh_arguments(shape, device, out_dtype)
    dense, lost = here(version, device)(*args)
    exact, exact_lost = version(*args[:11], torch.float32, args[12])
    assert relative_error(dense, exact) < ROUNDING[out_dtype]
    allowed = HALF_A_STEP[out_dtype] * exact_lost.abs() + LEFT[out_dtype] * (exact - exact_lost).abs() + SUBNORMAL
    assert ((lost.float() - exact_lost).abs() <= allowed).all()


@pytest.mark.parametrize("version", [*PLAIN, op.refresh_reference])
@pytest.mark.parametrize("size", SIZES)
def test_nothing_is_lost_where_nothing_is_left_out_and_everything_where_nothing_is_kept(version, size, device):
    shape = (1, 2, 5 * 128 - 20, size, 128)
    packed = pack_heads(*torch.randn(3, *shape[:4], device=device), 128)  # of like scores: every block has a part
    operands = (packed.q, packed.k, packed.v, packed.q_scale, packed.k_scale, packed.v_scale)
    args = (*operands, *counted(shape, device, torch.float16)[6:])
    dense, lost = here(version, device)(*args)
    some = (args[7] < args[6].shape[3]).repeat_interleave(128, dim=2)[:, :, : lost.shape[2]]
    assert torch.equal(lost.any(dim=3), some)
    assert torch.equal(lost[:, :, :128], dense[:, :, :128]), "row 0 keeps none"


@pytest.mark.parametrize(
    ("version", "shape"),
    [
        (version, shape)
        for version in (*PLAIN, op.refresh_reference)
        for shape in (SHAPES[0], *(HOPPER_SHAPES[1:8:4] if version is op.refresh_launch_hopper else FEWER_ROWS))
    ],
)
@pytest.mark.parametrize("shared", [False, True])
def test_it_answers_by_tokens(version, shared, shape, device):
    args, tokens = refresh_arguments(shape, device, torch.float16), shuffled(shape, device, shared)
    for got, want in zip(here(version, device)(*args, tokens), version(*args), strict=True):
        assert torch.equal(placed(got, tokens), want)
        assert got.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("version", PLAIN)
@pytest.mark.parametrize("growth", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("size", SIZES)
def test_scores_of_other_blocks_may_be_of_another_size(version, growth, size, device):
    """Smaller, alike, or so much larger that what was kept is next to nothing."""
    q, k, v = torch.randn(3, 1, 2, SMALL[2], size, device=device)
    odd = torch.arange(SMALL[2], device=device) // 128 % 2 == 1
    packed = pack_heads(q, torch.where(odd[:, None], growth * k, k), v, 128)
    kept = torch.tensor([0, 2, 4, 1, 3], dtype=torch.int32, device=device).expand(1, 2, 5, 5)
    counts = torch.full((1, 2, 5), 3, dtype=torch.int32, device=device)
    operands = (packed.q, packed.k, packed.v, packed.q_scale, packed.k_scale, packed.v_scale, kept, counts)
    args = (*operands, SMALL[2], 128, 128, torch.float32, size**-0.5)
    want = op.refresh_reference(*args)
    for got, wanted in zip(here(version, device)(*args), want, strict=True):
        assert (got - wanted).norm() < GROWN * want[0].norm()


@pytest.mark.parametrize("version", [*PLAIN, op.refresh_reference])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy says so when the interpreter meets a NaN
def test_what_is_not_finite_shows(version, device):
    args = list(counted(SMALL, device, torch.float16))
    args[4] = args[4].clone()
    args[4][0, 0, 2] = float("nan")  # the scale of a block of keys of one head
    dense, lost = here(version, device)(*args)
    assert dense[0, 0].isnan().all(), "every row sees every block"
    assert lost[0, 0, : 4 * 128].isnan().all(), "in front or behind"
    assert not lost[0, 0, 4 * 128 :].any(), "the last row keeps every block"
    assert dense[0, 1].isfinite().all()
    assert lost[0, 1].isfinite().all()


@pytest.mark.parametrize("version", PLAIN)
def test_padding_behind_the_last_key_does_not_matter(version, device):
    """The last block is kept by some rows and not by others."""
    args = list(counted(SMALL, device, torch.float16))
    before = here(version, device)(*args)
    args[1], args[2] = args[1].clone(), args[2].clone()
    args[1][:, :, SMALL[2] :] = 127
    args[2].view(torch.uint8)[..., op.slots(640) >= SMALL[2]] = 0x77  # 240
    for got, want in zip(version(*args), before, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("size", SIZES)
def test_by_hand_it_is_what_runs_on_a_hopper_and_the_same_each_time(size, device):
    here(op.refresh_launch_hopper, device)
    args = refresh_arguments((2, 24, 1000, size, 128), device, torch.bfloat16)
    lost = torch.empty_like(op.attention_fp8(*args))
    dense = attention_fp8_sm90.launch(*args[:9], *args[11:], None, None, None, lost=lost)
    for _ in range(20):
        for got, want in zip(op.attention_fp8_refresh(*args), (dense, lost), strict=True):
            assert torch.equal(got, want)


def test_lists_of_some_blocks_are_refused():
    args = list(refresh_arguments(SHAPES[0], "cpu"))
    args[6] = args[6][..., :3]
    with pytest.raises(ValueError, match="lists of all 4 blocks of keys; got lists of 3"):
        op.attention_fp8_refresh(*args)


def test_torch_accepts_the_op(device):
    refresh = torch.ops.quant_runtime.attention_fp8_refresh.default
    library.opcheck(refresh, refresh_arguments(SHAPES[3], device), test_utils=FP8_CHECKS)
