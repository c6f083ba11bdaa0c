"""A network whose weights lie on the disk: a layer's are read as it is entered, and gone as it is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Read = Callable[[str], Tensor]  # the tensor of this name, in any float dtype, on the CPU


def page(network: nn.Module, read: Read, device: str) -> None:
    """From now on `network`, in float32 on `device`, holds no parameter but those of the layers that are running.

    Its parameters may be on the meta device; buffers are real, and those that are saved are read here and stay. What a
    layer's weight is asked for while the layer is not running is NaN of the right shape: nothing is taken for a weight
    that is none. Every forward reads what it needs anew.
    """
    saved = network.state_dict().keys()
    for prefix, module in network.named_modules():
        own = {name: held for name, held in module._parameters.items() if held is not None}
        keys = {name: f"{prefix}.{name}".removeprefix(".") for name in own}
        blanks = {name: _blank(held, device) for name, held in own.items()}
        if keys:
            module._parameters.update(blanks)
            module.register_forward_pre_hook(_entered(keys, read, device))
            module.register_forward_hook(_left(blanks), always_call=True)
        for name, buffer in module._buffers.items():
            key = f"{prefix}.{name}".removeprefix(".")
            if buffer is not None and key in saved:
                module._buffers[name] = read(key).to(device, buffer.dtype)


def _blank(parameter: Tensor, device: str) -> nn.Parameter:
    return nn.Parameter(torch.full((), torch.nan, device=device).expand(parameter.shape), requires_grad=False)


def _entered(keys: dict[str, str], read: Read, device: str) -> Callable[[nn.Module, Any], None]:
    def enter(module: nn.Module, _: Any) -> None:
        for name, key in keys.items():
            tensor = read(key).to(device)
            if not isinstance(module, nn.Embedding):  # a large one, of which few rows are used: its answer is widened
                tensor = tensor.float()
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)

    return enter


def _left(blanks: dict[str, nn.Parameter]) -> Callable[[nn.Module, Any, Any], Any]:
    def leave(module: nn.Module, _: Any, output: Any) -> Any:
        module._parameters.update(blanks)
        return output.float() if isinstance(module, nn.Embedding) and output is not None else output

    return leave
