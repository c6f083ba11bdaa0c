import pytest
import torch
from torch import library

from quant_runtime.kernels import quantize_heads as op

SHAPES = [(1, 1, 1, 3), (2, 3, 130, 16), (1, 2, 77, 24), (2, 1, 64, 128)]
VERSIONS = [op.on_cpu, pytest.param(op.launch, marks=pytest.mark.skipif(op.triton is None, reason="no Triton"))]


def heads(shape, device, dtype=torch.float32):
    """As a processor has them: [B, N, H, D] in memory, with outlier channels."""
    batch, count, tokens, size = shape
    x = torch.randn(batch, tokens, count, size, device=device)
    x[..., ::8] *= 10
    return x.to(dtype).transpose(1, 2)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_versions_agree_with_the_reference_to_the_last_bit(version, shape, dtype, device):
    if version is op.on_cpu and device != "cpu":
        pytest.skip("the CPU version runs on CPU tensors")
    x = heads(shape, device, dtype)
    for center in (None, op.key_center(x)):
        for share in (1, 16, 128):
            (q, scale), (want_q, want_scale) = version(x, center, share), op.reference(x, center, share)
            assert torch.equal(scale, want_scale)
            assert (q.int() - want_q.int()).abs().max() <= (device == "cuda"), (
                "a GPU may fuse the product and the rounding"
            )


def test_tokens_that_share_a_scale_have_the_largest_of_their_scales(device):
    x = heads((1, 2, 70, 16), device)
    each, shared = op.quantize_heads(x)[1], op.quantize_heads(x, share=16)[1]
    padded = torch.nn.functional.pad(each, (0, 10)).view(1, 2, 5, 16)
    assert torch.equal(shared, padded.amax(dim=3))


def test_centring_makes_the_steps_of_keys_with_a_common_part_finer(device):
    k = heads((1, 2, 70, 16), device) + 50
    assert op.quantize_heads(k, op.key_center(k))[1].mean() < op.quantize_heads(k)[1].mean() / 2


@pytest.mark.parametrize("version", [op.reference, *VERSIONS])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy says so when the interpreter meets a NaN
def test_a_nan_shows_in_the_scale_of_its_token_alone(version, device):
    x = heads((1, 1, 4, 16), device)
    x[0, 0, 2, 5] = float("nan")
    assert version(x, None, 1)[1][0, 0].isfinite().tolist() == [True, True, False, True]


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ((torch.zeros(2, 3, 4),), r"\[2, 3, 4\]"),
        ((torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)), "center"),
        ((torch.zeros(1, 2, 3, 4), None, 3), "share is a power of two; got 3"),
    ],
)
def test_what_it_cannot_round_is_refused_by_name(args, named):
    with pytest.raises(ValueError, match=named):
        op.quantize_heads(*args)


def test_torch_accepts_the_op(device):
    library.opcheck(torch.ops.quant_runtime.quantize_heads.default, (heads((1, 2, 20, 8), device), None, 16))
