"""observe(): what each layer is fed, as running statistics, while the model runs on calibration inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerStats:
    """What one linear layer saw, over all calibration runs."""

    absmax: Tensor  # float32 [K]: the largest |x| of each input channel
    weight_absmax: Tensor  # float32 [K]: the largest |w| of each input channel, over every layer that shares the input
    tokens: int  # rows seen
    sample: Tensor  # [at most `rows`, K]: input rows drawn evenly from all, in the model's dtype


class _Running:
    """Statistics of one layer's inputs. Every row draws a number and the highest are kept: an even draw in one pass."""

    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.generator = rows, torch.Generator().manual_seed(seed)
        self.absmax: Tensor | None = None
        self.weight_absmax: Tensor | None = None
        self.tokens = 0
        self.sample: Tensor | None = None
        self.drawn = torch.empty(0)

    def see(self, x: Tensor, weight: Tensor) -> None:
        """`weight` is looked at once, and while the layer runs: it may be there at no other time."""
        if self.weight_absmax is None:
            self.weight_absmax = weight.detach().abs().amax(dim=0).float().cpu()
        x = x.detach().reshape(-1, x.shape[-1])
        largest = x.abs().amax(dim=0).float()
        self.absmax = largest if self.absmax is None else torch.maximum(self.absmax, largest)
        self.tokens += len(x)
        numbers = torch.rand(len(x), generator=self.generator)
        best = numbers.topk(min(self.rows, len(x))).indices
        rows = x[best.to(x.device)].clone()
        self.sample = rows if self.sample is None else torch.cat([self.sample, rows])
        self.drawn = torch.cat([self.drawn, numbers[best]])
        kept = self.drawn.topk(min(self.rows, len(self.drawn))).indices
        self.sample, self.drawn = self.sample[kept.to(x.device)], self.drawn[kept]


def observe(
    model: nn.Module,
    layer_names: Iterable[str],
    run: Callable[[], object],
    *,
    shared: Iterable[Sequence[str]] = (),
    rows: int = 128,
    seed: int = 0,
) -> dict[str, LayerStats]:
    """Runs `run()`, which calls the model as often as it likes, and tells what the named nn.Linear layers were fed.

    `shared` names groups of layers that are fed the same tensor (queries, keys and values): a method that changes the
    input then treats the group alike, so that the layers can be fused later. A layer that was never fed, or fed a NaN
    or an infinity, is an error by its name. The hooks are gone afterwards, whatever happens.
    """
    names = list(layer_names)
    layers = {name: _linear(model, name) for name in names}
    running = {name: _Running(rows, seed) for name in names}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, inputs: running[name].see(inputs[0], layers[name].weight)

    hooks = [layers[name].register_forward_pre_hook(watch(name)) for name in names]
    try:
        with torch.inference_mode():
            run()
    finally:
        for hook in hooks:
            hook.remove()

    stats = {name: _finished(name, running[name]) for name in names}
    for group in shared:
        members = [name for name in group if name in stats]
        if members:
            widest = torch.stack([stats[name].weight_absmax for name in members]).amax(dim=0)
            largest = torch.stack([stats[name].absmax for name in members]).amax(dim=0)
            for name in members:
                stats[name] = replace(stats[name], weight_absmax=widest, absmax=largest)
    return stats


def _linear(model: nn.Module, name: str) -> nn.Linear:
    layer = model.get_submodule(name)
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"{name} is a {type(layer).__name__}: only nn.Linear layers are observed and quantized")
    return layer


def _finished(name: str, seen: _Running) -> LayerStats:
    if seen.absmax is None or seen.weight_absmax is None or seen.sample is None:
        raise ValueError(f"calibration never reached {name}: give inputs that use it, or leave it out of the plan")
    if not bool(seen.absmax.isfinite().all()):
        raise ValueError(f"calibration fed {name} a value that is not finite: check the checkpoint and its dtype")
    # Clones, since what was made in inference mode cannot be learned from.
    absmax, weight_absmax, sample = (t.cpu().clone() for t in (seen.absmax, seen.weight_absmax, seen.sample))
    return LayerStats(absmax, weight_absmax, seen.tokens, sample)


def fingerprint(stats: dict[str, LayerStats]) -> str:
    """SHA-256 of all that was seen: two calibrations on the same data by the same model have the same one."""
    digest = hashlib.sha256()
    for name in sorted(stats):
        digest.update(f"{name} {stats[name].tokens}\n".encode())
        digest.update(stats[name].absmax.numpy().tobytes())
        digest.update(stats[name].sample.float().numpy().tobytes())
    return digest.hexdigest()
