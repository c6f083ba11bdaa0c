import pytest
import torch
from torch import library
from torch.nn.functional import layer_norm, rms_norm

from models.video import rotated
from quant_runtime.kernels import pack_heads as op
from quant_runtime.kernels.attention_fp8 import unpacked_values
from tests.quant_runtime.kernels.inputs import FP32_ROUNDING, TRITON_DTYPES
from tests.support import relative_error

INT8 = 0.02  # rounding to steps of 1/127 of the largest of a token, or of a block
TWICE = 2**0.5 * INT8  # between two rounded by other steps: their errors are independent, and add up in squares
E4M3 = 0.04  # rounding to 3 bits behind the first
CANCELLED = 1e-5  # of directions that point everywhere, a mean is a tenth of one: its float32 is ten times as far off
FLIPS = 2e-3  # of the entries may fall to the other side of a half: a GPU fuses products and sums
INTERPRETED = 0.07  # Triton's interpreter rounds up to a power of two as down to half of it
SHAPES = [  # batch, heads, tokens, size, block, tokens that turn, first of them
    (1, 2, 200, 64, 64, 150, 0),
    (2, 1, 300, 32, 128, 0, 0),
    (1, 2, 130, 128, 64, 100, 30),
    (1, 1, 3, 48, 128, 3, 0),
    (2, 2, 150, 64, 128, 124, 26),
]


KINDS = ["heads", "together", "layer"]


def arguments(shape, device, dtype=torch.float32, kind="heads"):
    """q, k and v as a fused projection leaves them, norms of a kind (of both kinds of token, if of heads), angles."""
    batch, heads, tokens, size, block, turning, first = shape
    x = torch.randn(batch, tokens, 3, heads, size, device=device)
    x[..., ::64] *= 10
    x[:, :, 1] += 3 * torch.randn(size, device=device)
    q, k, v = x.to(dtype).permute(2, 0, 3, 1, 4)
    weights = [torch.rand(size, device=device, dtype=dtype) + 0.5 for _ in range(4)]
    biases = [None, None]
    if kind == "together":
        weights = [*(torch.rand(2, heads * size, device=device, dtype=dtype) + 0.5), None, None]
    if kind == "layer":
        weights, biases = [*weights[:2], None, None], [*torch.randn(2, size, device=device).to(dtype)]
    if not turning:
        return q, k, v, block, *weights[:2], None, None, 1e-6, None, None, 0, *biases
    angles = torch.rand(turning, size // 2, device=device) * 6
    return q, k, v, block, *weights, 1e-6, angles.cos(), angles.sin(), first, *biases


def shuffled(shape, device, shared=False):
    """An order of its own for every head, or one for all, expanded as a policy's is."""
    batch, heads, count, *_ = shape
    if shared:
        return torch.randperm(count, device=device).to(torch.int32).expand(batch, heads, count)
    return torch.rand(batch, heads, count, device=device).argsort(dim=2).to(torch.int32)


@pytest.mark.skipif(op.triton is None, reason="Triton is not installed")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("kind", "order"),
    [*((kind, "as they come") for kind in KINDS), ("heads", "of each head"), ("together", "of all heads")],
)
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_triton_agrees_with_the_reference(shape, kind, order, dtype, device):
    args = arguments(shape, device, dtype, kind)
    if order != "as they come":
        args = (*args, shuffled(shape, device, order == "of all heads"))
    got, want = op.Packed(*op.launch(*args)), op.Packed(*op.reference(*args))
    for name in ("q_scale", "k_scale", "v_scale", "q_means", "k_means"):
        assert relative_error(getattr(got, name), getattr(want, name)) < FP32_ROUNDING, name
    for name in ("q_alike", "k_alike"):
        assert relative_error(getattr(got, name), getattr(want, name)) < CANCELLED, name
    for name in ("q", "k"):
        apart = (getattr(got, name).int() - getattr(want, name).int()).abs()
        assert apart.max() <= 1, name
        assert apart.float().mean() < FLIPS, name
    assert relative_error(got.v.float(), want.v.float()) < (INT8 if device == "cuda" else INTERPRETED)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["heads", "layer"])
def test_the_reference_packs_what_diffusers_norms_and_rotation_give(shape, kind):
    args = arguments(shape, "cpu", kind=kind)
    q, k, v, block, norm_q, norm_k, other_q, other_k, eps, cos, sin, first, bias_q, bias_k = args
    packed = op.Packed(*op.reference(*args))
    _, _, tokens, size, _, turning, _ = shape

    def normed(x, norm, bias):
        return rms_norm(x, (size,), norm, eps) if bias is None else layer_norm(x, (size,), norm, bias, eps)

    def placed(x, norm, other, bias):
        middle = slice(first, first + turning)
        out = normed(x, norm if other is None else other, bias)
        if turning:
            doubled = (t.repeat_interleave(2, dim=1) for t in (cos, sin))
            out[:, :, middle] = rotated(normed(x[:, :, middle], norm, bias), *doubled)
        return out

    want_q, want_k = placed(q, norm_q, other_q, bias_q), placed(k, norm_k, other_k, bias_k)
    assert relative_error(packed.q * packed.q_scale[..., None], want_q) < INT8
    got_k = (packed.k.unflatten(2, (-1, block)) * packed.k_scale[..., None, None]).flatten(2, 3)
    apart = want_k - got_k[:, :, :tokens]
    assert relative_error(apart, apart.mean(dim=2, keepdim=True).expand_as(apart)) < 0.1, "a centre was taken away"
    center = apart.mean(dim=2, keepdim=True)
    assert relative_error(got_k[:, :, :tokens], want_k - center) < INT8, "one scale serves a block"
    assert not got_k[:, :, tokens:].any()
    assert relative_error(unpacked_values(packed.v, packed.v_scale, tokens), v) < E4M3
    assert relative_error(packed.q_means[:, :, 0], want_q[:, :, :block].mean(dim=2)) < FP32_ROUNDING
    assert relative_error(packed.k_means[:, :, -1], want_k[:, :, (tokens - 1) // block * block :].mean(dim=2)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_places_hold_the_tokens_they_are_told_to_with_their_norms_and_angles(kind, device):
    shape = (2, 2, 150, 32, 64, 100, 30)
    args, tokens = arguments(shape, device, kind=kind), shuffled(shape, device)
    plain, placed = op.Packed(*op._op(*args, None)), op.Packed(*op._op(*args, tokens))
    assert torch.equal(placed.q, op.in_places(plain.q, tokens))
    assert torch.equal(placed.q_scale, plain.q_scale.gather(2, tokens.long()))
    assert torch.equal(placed.v_scale, plain.v_scale)

    def keys(packed):
        return (packed.k.unflatten(2, (-1, 64)) * packed.k_scale[..., None, None]).flatten(2, 3)[:, :, :150]

    assert relative_error(keys(placed), op.in_places(keys(plain), tokens)) < TWICE, "other blocks have other scales"
    values = [unpacked_values(packed.v, packed.v_scale, 150) for packed in (placed, plain)]
    assert torch.equal(values[0], op.in_places(values[1], tokens))
    first = op.in_places(plain.q * plain.q_scale[..., None], tokens)[:, :, :64]
    assert relative_error(placed.q_means[:, :, 0], first.mean(dim=2)) < INT8
    assert not torch.equal(placed.k_alike, plain.k_alike)


def test_a_norm_of_all_heads_together_is_that_of_their_channels_side_by_side(device):
    q, k, v, block, norm_q, norm_k, *_ = arguments((2, 3, 20, 32, 64, 0, 0), device, kind="together")
    packed = op.pack_heads(q, k, v, block, (norm_q, norm_k))
    want = rms_norm(q.transpose(1, 2).flatten(2), (96,), norm_q, 1e-6).unflatten(2, (3, 32)).transpose(1, 2)
    assert relative_error(packed.q * packed.q_scale[..., None], want) < INT8


@pytest.mark.parametrize("version", [op.reference, op.launch])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy says so when the interpreter meets a NaN
def test_what_is_not_finite_shows_where_it_is(version, device):
    args = list(arguments((1, 3, 128, 32, 64, 0, 0), device))
    args[4] = args[5] = None
    for number, head in ((0, 0), (1, 1), (2, 2)):
        args[number] = args[number].clone()
        args[number][0, head, 70, 3] = float("nan")
    packed = op.Packed(*version(*args))
    assert packed.q_scale.isfinite().all(dim=2).tolist() == [[False, True, True]]
    assert packed.k_scale[0, 0].isfinite().all()
    assert packed.k_scale[0, 1, 1].isnan()
    assert packed.v[0, :2].float().isfinite().all()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"v": torch.zeros(1, 2, 8, 32)}, r"\[1, 2, 8, 32\]"),
        ({"block": 32}, "32"),
        ({"norm": (torch.ones(32), torch.ones(31))}, r"norm is two weights \[32\] or \[64\]"),
        ({"others": (torch.ones(32), torch.ones(32))}, "others"),
        ({"bias": (torch.ones(32), torch.ones(32))}, "bias is of a layer norm"),
        ({"norm": (torch.ones(64), torch.ones(64)), "bias": (torch.ones(32), torch.ones(32))}, r"norm \[64\]"),
        ({"norm": (torch.ones(32), torch.ones(32)), "bias": (torch.ones(64), torch.ones(64))}, "bias is two weights"),
        ({"rope": (torch.zeros(9, 16), torch.zeros(10, 16))}, r"\[9, 16\]"),
        ({"rope": (torch.zeros(9, 16), torch.zeros(9, 16)), "first": 4}, "first=4"),
        ({"tokens": torch.zeros(1, 2, 9)}, r"tokens as int32 \[1, 2, 9\]; got torch.float32"),
        ({"tokens": torch.zeros(1, 9, dtype=torch.int32)}, r"got torch.int32 \[1, 9\]"),
    ],
)
def test_operands_that_do_not_fit_are_refused_by_name(change, named):
    args = {name: torch.zeros(1, 2, 9, 32) for name in "qkv"}
    with pytest.raises(ValueError, match=named):
        op.pack_heads(**args | change)


@pytest.mark.parametrize("kind", KINDS)
def test_torch_accepts_the_op(kind, device):
    library.opcheck(torch.ops.quant_runtime.pack_heads.default, arguments(SHAPES[0], device, kind=kind))
