"""A network whose weights lie on the disk: a layer's are read as it is entered, and gone as it is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Read = Callable[[str], Tensor]  # the tensor of this name, in any float dtype, on the CPU


class Pages:
    """Where a network's tensors come from: the disk, or what was read a moment ago."""

    def __init__(self, network: nn.Module, read: Read) -> None:
        self.network = network
        self._read = read
        self._kept: dict[str, Tensor] | None = None

    def read(self, key: str) -> Tensor:
        if self._kept is None:
            return self._read(key)
        if key not in self._kept:
            self._kept[key] = self._read(key)
        return self._kept[key]

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Inside, what was read is kept as it lay on the disk, until it is dropped."""
        self._kept = {}
        try:
            yield
        finally:
            self._kept = None

    def drop(self) -> None:
        if self._kept is not None:
            self._kept.clear()


def page(network: nn.Module, read: Read, device: str) -> Pages:
    """From now on `network`, in float32 on `device`, holds no parameter but those of the layers that are running.

    Its parameters may be on the meta device; buffers are real, and those that are saved are read here and stay. What a
    layer's weight is asked for while the layer is not running is NaN of the right shape: nothing is taken for a weight
    that is none. Every forward reads what it needs anew, and several that are under way at once share it.
    """
    pages = Pages(network, read)
    saved = network.state_dict().keys()
    for prefix, module in network.named_modules():
        own = {name: held for name, held in module._parameters.items() if held is not None}
        if own:
            keys = {name: f"{prefix}.{name}".removeprefix(".") for name in own}
            paged = _Paged(pages, keys, {name: _blank(held, device) for name, held in own.items()}, device)
            module._parameters.update(paged.blanks)
            module.register_forward_pre_hook(paged.enter)
            module.register_forward_hook(paged.leave, always_call=True)
        for name, buffer in module._buffers.items():
            key = f"{prefix}.{name}".removeprefix(".")
            if buffer is not None and key in saved:
                module._buffers[name] = read(key).to(device, buffer.dtype)
    return pages


def _blank(parameter: Tensor, device: str) -> nn.Parameter:
    return nn.Parameter(torch.full((), torch.nan, device=device).expand(parameter.shape), requires_grad=False)


class _Paged:
    """One module's own parameters."""

    def __init__(self, pages: Pages, keys: dict[str, str], blanks: dict[str, nn.Parameter], device: str) -> None:
        self.pages, self.keys, self.blanks, self.device = pages, keys, blanks, device
        self.inside = 0  # forwards that are under way

    def enter(self, module: nn.Module, _: Any) -> None:
        self.inside += 1
        if self.inside > 1:
            return
        for name, key in self.keys.items():
            tensor = self.pages.read(key).to(self.device)
            if not isinstance(module, nn.Embedding):  # a large one, of which few rows are used: its answer is widened
                tensor = tensor.float()
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)

    def leave(self, module: nn.Module, _: Any, output: Any) -> Any:
        self.inside -= 1
        if not self.inside:
            module._parameters.update(self.blanks)
        return output.float() if isinstance(module, nn.Embedding) and output is not None else output
