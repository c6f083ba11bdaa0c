import copy
import threading

import pytest
import torch
from torch import nn

from quant_runtime import formats
from quant_runtime.formats import QuantFormat
from quant_runtime.linear import LinearSpec, QuantLinear, fuse
from quant_runtime.methods import METHODS
from tests.quant_runtime.kernels.test_linear_fp8 import FAST_SUMS
from tests.quant_runtime.layers import observed, quantized, tokens
from tests.support import relative_error

FORMATS = [
    *(formats.W8A8, formats.W4A8, formats.W4A6, formats.W4A4, formats.W3A8, formats.W3A6, formats.W2A8),
    *(QuantFormat(bits, 8) for bits in (5, 6, 7)),
    *(formats.FP8, formats.W4AFP8, *(QuantFormat(bits, 8, activation_kind="fp8") for bits in (2, 3, 5))),
]
EIGHT_BITS = 0.03  # on inputs with outlier channels; measured: 0.019 by rtn, the others less
FP8_BITS = 0.05  # an operand is off by 2**-4 of itself at most, and random ones add few up; measured: 0.037 by rtn
FP32_ROUNDING = 1e-6  # the answer's one rounding, and those of the scales in the fake-quantized operands
ROUNDING = {torch.float32: FP32_ROUNDING, torch.float16: 2**-10, torch.bfloat16: 2**-8}


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("method", ["rtn", "smoothquant", "quarot"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_low_bit_path_is_fake_quantization(fmt, method, dtype, device):
    layer, x = quantized(method, fmt, 96, 70, device), tokens(96, device, dtype)
    y, want = layer(x), layer.fake_quant_forward(x)
    assert y.dtype == dtype
    assert y.shape == (2, 37, 70)
    fast = fmt.activation_kind == "fp8" and device == "cuda"
    assert relative_error(y, want) < (FAST_SUMS if fast else ROUNDING[dtype])


@pytest.mark.parametrize(("fmt", "limit"), [(formats.W8A8, EIGHT_BITS), (formats.FP8, FP8_BITS)], ids=str)
@pytest.mark.parametrize("method", ["rtn", "smoothquant", "quarot"])
def test_eight_bits_stay_close_to_the_float_layer(method, fmt, limit, device):
    layer, stats = observed(96, 70, device)
    x = tokens(96, device)
    quantized_layer = METHODS[method]().quantize(layer, stats, fmt)
    assert relative_error(quantized_layer(x), layer(x).detach()) < limit


def test_channels_beside_an_outlier_keep_their_bits_in_fp8_alone(device):
    """A step of int8 is a part of the largest entry; one of e4m3 is a part of the entry itself."""
    layer, stats = observed(96, 70, device)
    x = torch.randn(50, 96, device=device)
    x[:, 5] = 1000
    with torch.no_grad():
        layer.weight[:, 5] = 0  # the outlier itself counts for nothing
    whole, fp8 = (METHODS["rtn"]().quantize(layer, stats, fmt) for fmt in (formats.W8A8, formats.FP8))
    assert relative_error(whole(x), layer(x).detach()) > 0.5
    assert relative_error(fp8(x), layer(x).detach()) < FP8_BITS


def test_fake_quantization_is_written_without_our_kernels(device):
    """With plain weights: round both operands by hand, multiply in float64."""
    layer, x = quantized("rtn", formats.W4A6, 33, 20, device), tokens(33, device)
    step = x.abs().amax(dim=-1, keepdim=True) / 31
    want = (x / step).round().mul(step).double() @ layer.dequantized().double().T + layer.bias.double()
    assert relative_error(layer(x), want) < 1e-5  # x / step and x * (1 / step) may fall to two sides of a half


@pytest.mark.parametrize("fmt", [formats.W8A8, formats.W4A8, formats.FP8, formats.W4AFP8], ids=str)
@pytest.mark.parametrize("method", ["rtn", "smoothquant", "quarot"])
def test_casts_leave_the_scales_as_they_are(fmt, method, device):
    layer, x = quantized(method, fmt, 96, 70, device, bias=False), tokens(96, device)
    cast = copy.deepcopy(layer).to(torch.bfloat16).half()
    assert torch.equal(cast(x), layer(x))


@pytest.mark.parametrize("method", ["rtn", "smoothquant", "quarot"])
def test_floats_that_are_held_are_those_that_are_stored_and_are_not_written(method, device):
    layer, x = quantized(method, formats.W4A8, 96, 70, device, bias=False), tokens(96, device)
    want, written = layer(x), set(layer.state_dict())
    layer.hold_floats()
    assert torch.equal(layer(x), want)
    assert torch.equal(copy.deepcopy(layer).to(torch.bfloat16)(x), want)
    assert set(layer.state_dict()) == written


@pytest.mark.parametrize("shape", [(96,), (5, 96), (1, 2, 3, 96), (0, 96)])
def test_any_leading_dimensions_do(shape, device):
    layer = quantized("quarot", formats.W4A8, 96, 70, device)
    assert layer(torch.zeros(shape, device=device)).shape == (*shape[:-1], 70)


@pytest.mark.parametrize("fmt", [formats.W4A8, formats.W3A6, formats.W2A8, formats.FP8, formats.W4AFP8], ids=str)
@pytest.mark.parametrize("method", ["rtn", "smoothquant", "quarot"])
def test_a_state_loads_into_an_empty_layer(method, fmt, device):
    layer, x = quantized(method, fmt, 97, 70, device), tokens(97, device)
    empty = QuantLinear(97, 70, layer.spec, device=device)
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(x), layer(x))
    half = layer.to(torch.bfloat16).state_dict().values()
    assert layer.stored_bytes() == sum(t.numel() * t.element_size() for t in half)


def test_three_bits_are_stored_in_three(device):
    layer = quantized("rtn", formats.W3A6, 256, 70, device, bias=False)
    assert layer.stored_bytes() == 70 * (256 * 3 // 8 + 2)


@pytest.mark.parametrize(("fmt", "inputs"), [(formats.FP8, 256), (formats.W4AFP8, 128)], ids=str)
def test_fp8_takes_a_byte_a_weight_and_whole_weights_beside_it_their_bits(fmt, inputs, device):
    layer = quantized("rtn", fmt, 256, 70, device)
    assert layer.qweight.dtype == torch.uint8
    assert layer.stored_bytes() == 70 * (inputs + 2 + 2)


def test_the_same_whole_weights_are_fed_in_either_kind(device):
    """What W4A8 stores, W4AFP8 stores; only what they round their input to differs."""
    whole, fp8 = (quantized_from(layer_of(96, 70, device), fmt) for fmt in (formats.W4A8, formats.W4AFP8))
    assert torch.equal(whole.qweight, fp8.qweight)
    assert torch.equal(whole.dequantized(), fp8.dequantized())
    assert not whole.rounds_like(fp8)
    assert fp8.rounds_like(quantized_from(layer_of(96, 70, device), formats.FP8))


def layer_of(inputs, outputs, device):
    torch.manual_seed(3)
    return nn.Linear(inputs, outputs, device=device)


def quantized_from(layer, fmt):
    return METHODS["rtn"]().quantize(layer, None, fmt)


@pytest.mark.parametrize("fmt", [formats.W8A8, formats.FP8], ids=str)
def test_weights_of_another_kind_are_refused(fmt, device):
    other = torch.zeros(4, 8, device=device).to(torch.float8_e4m3fn if fmt == formats.W8A8 else torch.int8)
    with pytest.raises(ValueError, match=f"weights of {fmt} are {fmt.weight_dtype}; got {other.dtype}"):
        QuantLinear.of(other, torch.ones(4, device=device).bfloat16(), LinearSpec(fmt))


@pytest.mark.parametrize("fmt", [formats.FP8, formats.W4AFP8, formats.W4A8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_answer_goes_where_it_is_wanted(fmt, dtype, device):
    layer, x = quantized("rtn", fmt, 96, 70, device), tokens(96, device, dtype).flatten(0, 1)
    held = torch.full((80, 70), torch.nan, dtype=dtype, device=device)
    out = layer.product(layer.rounded(x), dtype, held[3:77])
    assert torch.equal(out, layer(x))
    assert held[:3].isnan().all()
    assert held[77:].isnan().all()


@pytest.mark.parametrize("fmt", [formats.FP8, formats.W4AFP8], ids=str)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_nan_shows_in_its_row_alone(fmt, device):
    layer, x = quantized("rtn", fmt, 96, 70, device), tokens(96, device)
    x[0, 2, 5], x[1, 3, 7] = float("nan"), float("inf")
    broken = ~layer(x).isfinite().all(dim=-1)
    assert broken.nonzero().tolist() == [[0, 2], [1, 3]]


@pytest.mark.parametrize(("bits", "size"), [(8, 97), (4, 56), (3, 48), (2, 32)])
def test_a_state_of_another_width_is_refused(bits, size, device):
    state = quantized("rtn", QuantFormat(bits, 8), 97, 70, device).state_dict()
    for other in {8, 4, 3, 2} - {bits}:
        with pytest.raises(RuntimeError, match=rf"qweight: copying a param with shape torch.Size\(\[70, {size}\]\)"):
            QuantLinear(97, 70, LinearSpec(QuantFormat(other, 8)), device=device).load_state_dict(state)


@pytest.mark.parametrize("fmt", [formats.W4A8, formats.W3A6, formats.W2A8, formats.FP8, formats.W4AFP8], ids=str)
@pytest.mark.parametrize("method", ["rtn", "quarot"])
def test_fused_layers_answer_what_each_would(method, fmt, device):
    layers, x = [quantized(method, fmt, 96, n, device) for n in (16, 70, 33)], tokens(96, device)
    assert torch.equal(fuse(layers)(x), torch.cat([layer(x) for layer in layers], dim=-1))


def test_layers_that_treat_their_input_differently_are_not_fused(device):
    one, other = quantized("smoothquant", formats.W4A8, 96, 16, device), quantized("rtn", formats.W4A8, 96, 16, device)
    with pytest.raises(ValueError, match="treat their input alike"):
        fuse([one, other])
    with pytest.raises(ValueError, match="bias all or none"):
        fuse([other, quantized("rtn", formats.W4A8, 96, 16, device, bias=False)])
    with pytest.raises(ValueError, match="treat their input alike"):
        fuse([other, quantized("rtn", formats.W4AFP8, 96, 16, device)])


@pytest.mark.parametrize("written", ["w3a16", "w4a16", "w16a8", "w16a16"])
def test_a_format_without_a_kernel_is_refused_by_name(written):
    with pytest.raises(ValueError, match=f"kernels for W2 to W8 with A8, A6 and A4.*got {written.upper()}"):
        LinearSpec(QuantFormat.parse(written))


def test_a_group_of_inputs_has_no_kernel_yet():
    with pytest.raises(ValueError, match="W4A8 group=64"):
        LinearSpec(QuantFormat(4, 8, group=64))


@pytest.mark.parametrize("fmt", [formats.W4A8, formats.W3A6, formats.FP8, formats.W4AFP8], ids=str)
def test_dynamo_traces_it_whole(fmt, device):
    layer, x = quantized("smoothquant", fmt, 96, 70, device), tokens(96, device)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        assert torch.equal(compiled(x), layer(x))


def test_threads_do_not_share_scratch(device):
    layers = [quantized("quarot", fmt, 96, 200, device) for fmt in (formats.W4A8, formats.FP8)]
    inputs = [tokens(96, device) for _ in layers]
    alone = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
    wrong = []

    def repeat(number: int) -> None:
        wrong.extend(n for n in range(30) if not torch.equal(layers[number](inputs[number]), alone[number]))

    threads = [threading.Thread(target=repeat, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_module_prints_what_it_is(device):
    assert "96, 70, W4A8, rotation=32, bias=True" in repr(quantized("quarot", formats.W4A8, 96, 70, device))
    assert isinstance(quantized("rtn", formats.W8A8, 8, 8, device), nn.Module)
