import pytest
import torch
from torch import library

from quant_runtime.formats import pack
from quant_runtime.kernels import unpack as op
from quant_runtime.kernels._fp8 import E4M3

VERSIONS = [
    op.reference,
    op.on_cpu,
    pytest.param(op.launch, marks=pytest.mark.skipif(op.triton is None, reason="no Triton")),
]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("bits", op.WIDTHS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 2), (7, 33), (5, 65), (20, 256), (2, 9001)])
def test_what_was_packed_comes_back(version, bits, n, k, device):
    if version is op.on_cpu and device != "cpu":
        pytest.skip("the CPU version runs on CPU tensors")
    w = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (n, k), dtype=torch.int8, device=device)
    assert torch.equal(version(pack(w, bits), k, bits), w)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("bits", op.WIDTHS)
def test_every_value_comes_back_from_every_place_in_a_byte(version, bits, device):
    if version is op.on_cpu and device != "cpu":
        pytest.skip("the CPU version runs on CPU tensors")
    values = torch.arange(-(1 << (bits - 1)), 1 << (bits - 1), device=device).to(torch.int8)
    w = values.repeat(2, 8)  # eight runs of all of them, one for each place
    assert torch.equal(version(pack(w, bits), w.shape[1], bits), w)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 33), (20, 256)])
def test_fp8_holds_every_whole_number_of_up_to_five_bits(version, bits, n, k, device):
    if version is op.on_cpu and device != "cpu":
        pytest.skip("the CPU version runs on CPU tensors")
    w = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (n, k), dtype=torch.int8, device=device)
    w[0, 0] = -(1 << (bits - 1))
    got = version(pack(w, bits), k, bits, E4M3)
    assert got.dtype == E4M3
    assert torch.equal(got.float(), w.float())


def test_whole_numbers_that_fp8_does_not_hold_are_refused():
    assert torch.tensor(17.0).to(E4M3) == 16, "of six bits 17 is the first that is lost"
    with pytest.raises(ValueError, match=r"up to 5 bits in torch\.float8_e4m3fn; got torch.float8_e4m3fn and 6 bits"):
        op.unpack(pack(torch.ones(4, 13, dtype=torch.int8), 6), 13, 6, E4M3)
    with pytest.raises(ValueError, match=r"got torch\.float16 and 4 bits"):
        op.unpack(pack(torch.ones(4, 13, dtype=torch.int8), 4), 13, 4, torch.float16)


def test_three_bits_are_a_plane_of_two_and_a_plane_of_one(device):
    """Input 9 of 64: -3, 101 in two's complement, among zeros. 16 bytes of four, then 8 bytes of eight."""
    w = torch.zeros(1, 64, dtype=torch.int8, device=device)
    w[0, 9] = -3
    packed = pack(w, 3)[0].tolist()
    assert {place: byte for place, byte in enumerate(packed) if byte} == {9: 0b01, 16 + 1: 0b10}


@pytest.mark.parametrize(
    ("inputs", "bits", "size"), [(5120, 3, 1920), (65, 3, 48), (5120, 2, 1280), (33, 2, 16), (33, 4, 24), (64, 7, 56)]
)
def test_a_row_takes_its_bits_and_no_more_than_a_word_of_padding_a_unit(inputs, bits, size):
    assert op.packed_bytes(inputs, bits) == size
    assert pack(torch.ones(3, inputs, dtype=torch.int8), bits).shape == (3, size)


@pytest.mark.parametrize("inputs", [4095, 5120, 8960, 13825])
def test_three_bits_of_a_large_layer_take_three_eighths_of_a_byte(inputs):
    assert 0.375 <= op.packed_bytes(inputs, 3) / inputs < 0.38


def test_rows_of_a_file_that_lie_at_an_odd_byte_are_unpacked(device):
    w = torch.randint(-4, 4, (6, 100), dtype=torch.int8, device=device)
    packed = pack(w, 3)
    held = torch.empty(packed.numel() + 3, dtype=torch.uint8, device=device)[3:].view_as(packed).copy_(packed)
    assert torch.equal(op.unpack(held, 100, 3), w)
    assert op.triton is None or torch.equal(op.launch(held, 100, 3), w)
    assert torch.equal(op.unpack(packed.t().contiguous().t(), 100, 3), w)


@pytest.mark.parametrize("inputs", [16, 33])
def test_a_number_of_inputs_that_does_not_fit_is_refused(inputs):
    with pytest.raises(ValueError, match=rf"for {inputs} inputs of 4 bits; got torch.uint8 \[4, 16\]"):
        op.unpack(torch.zeros(4, 16, dtype=torch.uint8), inputs, 4)


def test_weights_of_another_type_or_width_are_refused():
    with pytest.raises(ValueError, match=r"uint8 \[N, 24\] for 64 inputs of 3 bits; got torch.int8 \[4, 24\]"):
        op.unpack(torch.zeros(4, 24, dtype=torch.int8), 64, 3)
    with pytest.raises(ValueError, match="2 to 7 bits; got 8"):
        op.unpack(torch.zeros(4, 64, dtype=torch.uint8), 64, 8)


def test_torch_accepts_the_op(device):
    args = (pack(torch.ones(4, 13, dtype=torch.int8, device=device), 3), 13, 3)
    library.opcheck(torch.ops.quant_runtime.unpack.default, args)
