import copy

import pytest
import torch
from torch import nn

from quant_runtime import formats
from quant_runtime.calibrate import observe
from quant_runtime.convert import convert, prepare
from quant_runtime.linear import LinearSpec, QuantLinear
from quant_runtime.methods import Keep, QuaRot, Rtn
from tests.support import relative_error

W8A8_ERROR = 0.01  # of three layers on random inputs, beside the residual; measured: 0.003


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.act = nn.Linear(48, 64), nn.GELU()
        self.out = nn.Linear(64, 48, bias=False)

    def forward(self, x):
        return x + self.out(self.act(self.into(x)))


@pytest.fixture
def model(device):
    return nn.ModuleDict({"blocks": nn.Sequential(Block(), Block())}).to(device).requires_grad_(False)


@pytest.fixture
def x(device):
    return torch.randn(40, 48, device=device)


NAMES = [f"blocks.{number}.{layer}" for number in range(2) for layer in ("into", "out")]


def test_planned_layers_are_swapped_and_the_others_stay(model, x):
    want = model["blocks"](x)
    untouched = model["blocks"][1].out
    plan = {name: (Rtn(), formats.W8A8) for name in NAMES[:3]} | {NAMES[3]: (Keep(), formats.W16A16)}
    seen = []
    reports = convert(
        model, plan, observe(model, NAMES, lambda _: model["blocks"](x)), lambda *progress: seen.append(progress)
    )
    assert list(reports) == NAMES[:3]
    assert all(isinstance(model.get_submodule(name), QuantLinear) for name in NAMES[:3])
    assert model["blocks"][1].out is untouched
    assert seen == [(name, number, 4) for number, name in enumerate(NAMES, start=1)]
    assert relative_error(model["blocks"](x), want) < W8A8_ERROR


def test_a_report_says_what_became_of_a_layer(model, x):
    stats = observe(model, NAMES, lambda _: model["blocks"](x))
    plan = {NAMES[0]: (QuaRot(), formats.W4A8), NAMES[1]: (Rtn(), formats.W8A8)}
    reports = convert(model, plan, stats)
    four, eight = reports[NAMES[0]], reports[NAMES[1]]
    assert four.spec == LinearSpec(formats.W4A8, rotation=16)
    assert (four.in_features, four.out_features, four.bias, eight.bias) == (48, 64, True, False)
    assert four.stored_bytes == 64 * 24 + 64 * 2 + 48 + 64 * 2, "weights, scales, signs, bias"
    assert 15 < four.weight_sqnr < 25 < 38 < eight.weight_sqnr, "6 dB a bit"
    assert four.output_sqnr < eight.output_sqnr


def test_a_plan_that_cannot_be_carried_out_changes_nothing(model, x):
    stats = observe(model, NAMES[:1], lambda _: model["blocks"](x))
    before = copy.deepcopy(model.state_dict())
    w4a8 = (Rtn(), formats.W4A8)
    with pytest.raises(ValueError, match=r"blocks\.1\.out is planned and was not observed"):
        convert(model, {NAMES[0]: w4a8, NAMES[3]: w4a8}, stats)
    with pytest.raises(TypeError, match=r"blocks\.0\.act is a GELU"):
        convert(model, {NAMES[0]: w4a8, "blocks.0.act": w4a8}, stats)
    with pytest.raises(ValueError, match="W3A16"):
        convert(model, {NAMES[0]: (Rtn(), formats.QuantFormat(3, 16))}, stats)
    with pytest.raises(AttributeError, match="nowhere"):
        convert(model, {NAMES[0]: w4a8, "blocks.nowhere": w4a8}, stats)
    assert model.state_dict().keys() == before.keys()


def test_an_empty_copy_takes_the_state_of_the_converted_model(model, x):
    other = copy.deepcopy(model)
    stats = observe(model, NAMES, lambda _: model["blocks"](x))
    reports = convert(model, {name: (QuaRot(), formats.W4A8) for name in NAMES}, stats)
    prepare(other, {name: report.spec for name, report in reports.items()})
    other.load_state_dict(model.state_dict())
    assert torch.equal(other["blocks"](x), model["blocks"](x))


def test_a_layer_that_cannot_be_replaced_is_named(model):
    with pytest.raises(TypeError, match=r"blocks\.0\.act is a GELU"):
        prepare(model, {"blocks.0.act": LinearSpec(formats.W4A8)})
