import pytest
import torch
from torch import library

from quant_runtime.formats import pack_int4
from quant_runtime.kernels import unpack_w4 as op

VERSIONS = [
    op.reference,
    op.on_cpu,
    pytest.param(op.launch, marks=pytest.mark.skipif(op.triton is None, reason="no Triton")),
]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 2), (7, 33), (20, 256), (2, 9001)])
def test_what_was_packed_comes_back(version, n, k, device):
    if version is op.on_cpu and device != "cpu":
        pytest.skip("the CPU version runs on CPU tensors")
    w = torch.randint(-8, 8, (n, k), dtype=torch.int8, device=device)
    assert torch.equal(version(pack_int4(w), k), w)


@pytest.mark.parametrize("inputs", [5, 8])
def test_a_number_of_inputs_that_does_not_fit_is_refused(inputs):
    with pytest.raises(ValueError, match=rf"for {inputs} inputs; got torch.uint8 \[4, 7\]"):
        op.unpack_w4(torch.zeros(4, 7, dtype=torch.uint8), inputs)


def test_torch_accepts_the_op(device):
    args = (torch.zeros(4, 7, dtype=torch.uint8, device=device), 13)
    library.opcheck(torch.ops.quant_runtime.unpack_w4.default, args)
