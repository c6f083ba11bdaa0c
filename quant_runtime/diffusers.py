"""`import quant_runtime.diffusers`, and DiffusionPipeline.from_pretrained opens artifacts as it opens any other folder.

diffusers has no call to register a quantizer: the two tables that its own are in are the way in. (Not imported by
quant_runtime itself, which runs where diffusers is not installed.)
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from quant_runtime.artifact import VERSION, SpecRecord, quantization_config
from quant_runtime.convert import prepare
from quant_runtime.linear import LinearSpec, QuantLinear


class _Name(StrEnum):  # diffusers reads `.value`, and compares with plain text
    LOWBIT = "lowbit"


class LowbitConfig(QuantizationConfigMixin):
    """The `quantization_config` of a config.json. Refuses a version or a field that it does not know."""

    def __init__(
        self, layers: Mapping[str, Any], version: int = VERSION, quant_method: str = "lowbit", **unknown: object
    ):
        if unknown or version != VERSION or quant_method != "lowbit":
            given = {"quant_method": quant_method, "version": version, **unknown}
            raise ValueError(f"quantization_config is lowbit's, version {VERSION}, with its layers; got {given}")
        self.quant_method: Any = _Name.LOWBIT
        self.version = version
        self.layers = {name: SpecRecord.model_validate(layer).model_dump() for name, layer in layers.items()}

    def specs(self) -> dict[str, LinearSpec]:
        return {name: SpecRecord.model_validate(layer).spec() for name, layer in self.layers.items()}

    def to_dict(self) -> dict[str, Any]:
        return quantization_config(self.specs())

    def to_diff_dict(self) -> dict[str, Any]:  # what diffusers logs
        return self.to_dict()


class LowbitQuantizer(DiffusersQuantizer):
    """Puts empty QuantLinears where the config names layers; diffusers then loads into them as into any module."""

    requires_calibration = True  # quantization happens offline: diffusers refuses to do it on the fly
    use_keep_in_fp32_modules = True  # what the model keeps in float32 without us, it keeps with us

    quantization_config: LowbitConfig

    def _process_model_before_weight_loading(self, model: Any, **_: object) -> None:
        prepare(model, self.quantization_config.specs())
        model.config.quantization_config = self.quantization_config

    def _process_model_after_weight_loading(self, model: nn.Module, **_: object) -> nn.Module:
        return model

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """A quantized layer without its tensors would answer noise: diffusers only warns of missing keys."""
        lost = [key for key in missing_keys if isinstance(model.get_submodule(key.rpartition(".")[0]), QuantLinear)]
        if lost:
            raise ValueError(
                f"the checkpoint has no {', '.join(lost[:5])}: it is not the one that its config describes"
            )
        return missing_keys

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def mark(model: Any, specs: Mapping[str, LinearSpec]) -> None:
    """Tells a diffusers model that was converted in place what it is: save_pretrained writes it into config.json."""
    layers = {name: SpecRecord.of(spec).model_dump() for name, spec in specs.items()}
    quantizer = LowbitQuantizer(LowbitConfig(layers=layers), pre_quantized=True)
    model.hf_quantizer, model.is_quantized = quantizer, True
    model.quantization_method = _Name.LOWBIT
    model.register_to_config(quantization_config=quantizer.quantization_config)


auto.AUTO_QUANTIZER_MAPPING["lowbit"] = LowbitQuantizer
auto.AUTO_QUANTIZATION_CONFIG_MAPPING["lowbit"] = LowbitConfig
