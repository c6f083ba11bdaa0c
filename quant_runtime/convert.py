"""Swap the planned layers of a model, one by one, and keep book of what each became and what it lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from quant_runtime.calibrate import LayerStats
from quant_runtime.formats import QuantFormat
from quant_runtime.linear import LinearSpec, QuantLinear
from quant_runtime.methods import Method
from quant_runtime.quality import sqnr

Plan = Mapping[str, tuple[Method, QuantFormat]]  # layer name → how
OnLayer = Callable[[str, int, int], None]  # (layer done, how many are done, of how many)


@dataclass(frozen=True)
class LayerReport:
    """One layer of the plan after its conversion. SQNRs are in dB, higher is closer."""

    spec: LinearSpec
    in_features: int
    out_features: int
    bias: bool
    stored_bytes: int
    weight_sqnr: float  # of the weights as they would stand in the layer that was replaced
    output_sqnr: float | None  # of the layer's answer to the rows that calibration sampled


def convert(
    model: nn.Module, plan: Plan, stats: Mapping[str, LayerStats], on_layer: OnLayer | None = None
) -> dict[str, LayerReport]:
    """Replaces every planned nn.Linear of `model` in place, in the plan's order. Layers planned as W16A16 stay.

    The reports are of the layers that were replaced. Refuses, before anything is changed, a layer that the model does
    not have, that is no nn.Linear or that calibration did not observe, and a format that no kernel runs.
    """
    layers = {name: model.get_submodule(name) for name in plan}
    for name, layer in layers.items():
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"{name} is a {type(layer).__name__}: only nn.Linear layers can be quantized")
        if name not in stats:
            raise ValueError(f"{name} is planned and was not observed: calibrate the layers of the plan")
        if plan[name][1].quantized:
            LinearSpec(plan[name][1])
    reports = {}
    for done, (name, (method, format_)) in enumerate(plan.items(), start=1):
        layer = layers.pop(name)
        assert isinstance(layer, nn.Linear)
        if format_.quantized:
            quantized = method.quantize(layer, stats[name], format_)
            assert isinstance(quantized, QuantLinear)
            reports[name] = report(layer, quantized, stats[name])
            model.set_submodule(name, quantized.train(layer.training))
        if on_layer is not None:
            on_layer(name, done, len(plan))
    return reports


@torch.inference_mode()
def report(layer: nn.Linear, quantized: QuantLinear, stats: LayerStats | None) -> LayerReport:
    """What `layer` became; without `stats`, nothing is said of its answers."""
    answers = None
    if stats is not None:
        rows = stats.sample.to(layer.weight.device, layer.weight.dtype)
        answers = sqnr(layer(rows), quantized(rows))
    return LayerReport(
        spec=quantized.spec,
        in_features=layer.in_features,
        out_features=layer.out_features,
        bias=layer.bias is not None,
        stored_bytes=quantized.stored_bytes(),
        weight_sqnr=sqnr(layer.weight, quantized.effective_weight()),
        output_sqnr=answers,
    )


def prepare(model: nn.Module, specs: Mapping[str, LinearSpec]) -> None:
    """Replaces the named nn.Linear layers by empty QuantLinears to load into, in place and on the same device."""
    for name, spec in specs.items():
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"{name} is a {type(layer).__name__}: only an nn.Linear can be replaced")
        weight, bias = layer.weight, layer.bias is not None
        empty = QuantLinear(layer.in_features, layer.out_features, spec, bias, weight.device, weight.dtype)
        model.set_submodule(name, empty.train(layer.training))
