import pytest
import torch

from quant_runtime import formats
from quant_runtime.formats import QuantFormat


@pytest.mark.parametrize(("text", "weight", "activation"), [("w4a8", 4, 8), ("W16A16", 16, 16), ("W3a6", 3, 6)])
def test_a_format_is_read_and_written(text, weight, activation):
    fmt = QuantFormat.parse(text)
    assert (fmt.weight_bits, fmt.activation_bits) == (weight, activation)
    assert str(fmt) == text.upper()
    assert QuantFormat.parse(str(fmt)) == fmt
    assert (fmt.weight_kind, fmt.activation_kind) == ("int", "int")


@pytest.mark.parametrize(
    ("text", "fmt"),
    [
        ("fp8", formats.FP8),
        ("FP8", formats.FP8),
        ("w4afp8", formats.W4AFP8),
        ("W4Afp8", formats.W4AFP8),
        ("W2AFP8", QuantFormat(2, 8, activation_kind="fp8")),
        ("W5AFP8", QuantFormat(5, 8, activation_kind="fp8")),
    ],
)
def test_fp8_is_read_and_written(text, fmt):
    assert QuantFormat.parse(text) == fmt
    assert str(fmt) == text.upper()
    assert fmt.quantized


def test_fp8_is_told_from_whole_numbers_of_as_many_bits():
    assert len({formats.FP8, formats.W8A8, formats.W4A8, formats.W4AFP8}) == 4
    assert (formats.FP8.weight_dtype, formats.W4AFP8.weight_dtype) == (torch.float8_e4m3fn, torch.int8)
    assert (formats.FP8.activation_dtype, formats.W4AFP8.activation_dtype) == (torch.float8_e4m3fn,) * 2
    assert (formats.FP8.weight_top, formats.W4AFP8.weight_top, formats.W4AFP8.activation_top) == (448, 7, 448)


@pytest.mark.parametrize("text", ["", "w4", "a8w4", "w4a8 ", "w4a8g128", "fp8 ", "fp16", "wfp8afp8", "w4fp8", "w4afp"])
def test_text_that_is_no_format_is_refused_with_what_was_given(text):
    with pytest.raises(ValueError, match=f"written like W4A8, W4AFP8 or FP8; got '{text}'"):
        QuantFormat.parse(text)


@pytest.mark.parametrize("text", ["w6afp8", "w8afp8", "w16afp8"])
def test_weights_that_fp8_does_not_hold_are_refused_beside_it(text):
    with pytest.raises(ValueError, match=f"weights of 2 to 5 bits.*W2AFP8 to W5AFP8; got {text.upper()}"):
        QuantFormat.parse(text)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"weight_bits": 8, "activation_bits": 8, "weight_kind": "fp8"}, "got WFP8A8"),
        ({"weight_bits": 4, "activation_bits": 8, "weight_kind": "fp8", "activation_kind": "fp8"}, "fp8 of 8 bits"),
        ({"weight_bits": 4, "activation_bits": 6, "activation_kind": "fp8"}, "fp8 of 8 bits"),
        ({"weight_bits": 4, "activation_bits": 8, "activation_kind": "fp4"}, "fp4"),
    ],
)
def test_kinds_that_do_not_go_together_are_refused(fields, named):
    with pytest.raises(ValueError, match=named):
        QuantFormat(**fields)


@pytest.mark.parametrize("text", ["w9a8", "w4a7", "w1a8"])
def test_widths_that_do_not_exist_are_refused_by_name(text):
    with pytest.raises(ValueError, match=text.upper()):
        QuantFormat.parse(text)


def test_the_largest_whole_numbers_are_symmetric():
    assert (formats.W4A6.weight_top, formats.W4A6.activation_top) == (7, 31)
    assert (formats.W8A8.weight_top, formats.W8A8.activation_top) == (127, 127)
    assert (formats.W3A6.weight_top, formats.W2A8.weight_top) == (3, 1)


@pytest.mark.parametrize("bits", [1, 9, 16])
def test_widths_without_a_packing_are_refused_by_name(bits):
    with pytest.raises(ValueError, match=f"weights of {bits} bits"):
        formats.pack(torch.zeros(2, 2, dtype=torch.int8), bits)


@pytest.mark.parametrize(
    ("bits", "inputs"), [(8, 7), *((bits, inputs) for bits in range(2, 8) for inputs in (1, 64, 65))]
)
def test_the_packed_shape_is_the_shape_of_what_is_packed(bits, inputs):
    weight = torch.ones(3, inputs, dtype=torch.int8)
    assert formats.pack(weight, bits).shape == formats.packed_shape(3, inputs, bits)


def test_fp8_weights_are_stored_as_their_bits():
    weight = torch.tensor([[448.0, -0.5], [2**-9, 0.0]]).to(torch.float8_e4m3fn)
    assert formats.pack(weight, 8).tolist() == [[0x7E, 0xB0], [0x01, 0x00]]


@pytest.mark.parametrize(("bits", "largest"), [(2, 1), (3, 3), (4, 7), (7, 63)])
def test_a_weight_that_its_bits_do_not_hold_is_refused(bits, largest):
    with pytest.raises(ValueError, match=f"int{bits} holds {-largest - 1} to {largest}; got 0 to {largest + 1}"):
        formats.pack(torch.tensor([[0, largest + 1]], dtype=torch.int8), bits)
    with pytest.raises(ValueError, match=f"got {-largest - 2} to 0"):
        formats.pack(torch.tensor([[0, -largest - 2]], dtype=torch.int8), bits)
