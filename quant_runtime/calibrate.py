"""observe(): what each layer is fed, as running statistics, while the model runs on calibration inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

LONGEST_RUN = 1 << 40  # rows
STATE = ("absmax", "weight_absmax", "sample", "drawn", "places", "runs", "draws")  # of one layer in Observer.state


@dataclass(frozen=True)
class LayerStats:
    """What one linear layer saw, over all calibration runs."""

    absmax: Tensor  # float32 [K]: the largest |x| of each input channel
    weight_absmax: Tensor  # float32 [K]: the largest |w| of each input channel, over every layer that shares the input
    tokens: int  # rows seen
    sample: Tensor  # [at most `rows`, K]: input rows drawn evenly from all, in the model's dtype


class _Running:
    """Statistics of one layer's inputs. Every row draws a number and the highest are kept: an even draw in one pass.

    Each run has draws of its own, and of equal numbers the earlier run's wins: runs may come one after the other or in
    turns, and leave the same.
    """

    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.seed = rows, seed
        self.draws: dict[int, torch.Generator] = {}  # by the number of the run
        self.seen: dict[int, int] = {}  # rows, by the same
        self.absmax: Tensor | None = None
        self.weight_absmax: Tensor | None = None
        self.sample: Tensor | None = None
        self.drawn = torch.empty(0)
        self.places = torch.empty(0, dtype=torch.int64)  # of the sampled rows: the run, then the row in it

    def see(self, x: Tensor, weight: Tensor, run: int) -> None:
        """`weight` is looked at once, and while the layer runs: it may be there at no other time."""
        if self.weight_absmax is None:
            self.weight_absmax = weight.detach().abs().amax(dim=0).float().cpu()
        x = x.detach().reshape(-1, x.shape[-1])
        largest = x.abs().amax(dim=0).float()
        self.absmax = largest if self.absmax is None else torch.maximum(self.absmax, largest)
        if run not in self.draws:
            self.draws[run] = torch.Generator().manual_seed(self.seed + run)
        numbers = torch.rand(len(x), generator=self.draws[run])
        best = numbers.topk(min(self.rows, len(x))).indices
        rows = x[best.to(x.device)].clone()
        before = run * LONGEST_RUN + self.seen.get(run, 0)
        self.seen[run] = self.seen.get(run, 0) + len(x)
        self.sample = rows if self.sample is None else torch.cat([self.sample, rows])
        self.drawn = torch.cat([self.drawn, numbers[best]])
        self.places = torch.cat([self.places, before + best])
        order = self.places.argsort()
        kept = order[self.drawn[order].argsort(descending=True, stable=True)][: self.rows]
        self.sample, self.drawn, self.places = self.sample[kept.to(x.device)], self.drawn[kept], self.places[kept]

    def state(self) -> dict[str, Tensor]:
        """All of it, on the CPU; nothing where nothing was seen."""
        if self.absmax is None or self.weight_absmax is None or self.sample is None:
            return {}
        return {
            "absmax": self.absmax.cpu(),
            "weight_absmax": self.weight_absmax,
            "sample": self.sample.cpu(),
            "drawn": self.drawn,
            "places": self.places,
            "runs": torch.tensor([[run, rows] for run, rows in self.seen.items()]),
            "draws": torch.stack([self.draws[run].get_state() for run in self.seen]),
        }

    def go_on_from(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        self.absmax, self.weight_absmax = state["absmax"].to(device), state["weight_absmax"]
        self.sample, self.drawn, self.places = state["sample"].to(device), state["drawn"], state["places"]
        for (run, rows), draws in zip(state["runs"].tolist(), state["draws"], strict=True):
            self.seen[run], self.draws[run] = rows, torch.Generator()
            self.draws[run].set_state(draws.clone())  # torch reads a view's state from where its memory begins


class Observer:
    """While it is open, the named nn.Linear layers of the model are watched: see `observe`.

    `run` is the number of the run whose rows come now: the first has 0. What was seen may be taken out in between, and
    another Observer of the same layers goes on from there.
    """

    def __init__(self, model: nn.Module, layer_names: Iterable[str], *, rows: int = 128, seed: int = 0) -> None:
        self.run = 0
        self._layers = {name: _linear(model, name) for name in layer_names}
        self._running = {name: _Running(rows, seed) for name in self._layers}
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        self._hooks = [layer.register_forward_pre_hook(self._watch(name)) for name, layer in self._layers.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _watch(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda layer, inputs: self._running[name].see(inputs[0], cast(Tensor, layer.weight), self.run)

    def state(self) -> dict[str, Tensor]:
        """What was seen so far: tensors by `LAYER.KIND`."""
        return {f"{name}.{kind}": t for name, its in self._running.items() for kind, t in its.state().items()}

    def go_on_from(self, read: Callable[[str], Tensor | None]) -> None:
        """`read` gives the tensors of a `state` by name, and None for one that it does not have."""
        for name, its in self._running.items():
            found = {kind: tensor for kind in STATE if (tensor := read(f"{name}.{kind}")) is not None}
            if found:
                its.go_on_from(found, self._layers[name].weight.device)

    def stats(self, shared: Iterable[Sequence[str]] = ()) -> dict[str, LayerStats]:
        stats = {name: _finished(name, its) for name, its in self._running.items()}
        for group in shared:
            members = [name for name in group if name in stats]
            if members:
                widest = torch.stack([stats[name].weight_absmax for name in members]).amax(dim=0)
                largest = torch.stack([stats[name].absmax for name in members]).amax(dim=0)
                for name in members:
                    stats[name] = replace(stats[name], weight_absmax=widest, absmax=largest)
        return stats


def observe(
    model: nn.Module,
    layer_names: Iterable[str],
    run: Callable[[Observer], object],
    *,
    shared: Iterable[Sequence[str]] = (),
    rows: int = 128,
    seed: int = 0,
) -> dict[str, LayerStats]:
    """Calls `run`, which calls the model as often as it likes, and tells what the named nn.Linear layers were fed.

    `run` is given the Observer, to tell it which of several runs it is at. `shared` names groups of layers that are fed
    the same tensor (queries, keys and values): a method that changes the input then treats the group alike, so that the
    layers can be fused later. A layer that was never fed, or fed a NaN or an infinity, is an error by its name. The
    hooks are gone afterwards, whatever happens.
    """
    with Observer(model, layer_names, rows=rows, seed=seed) as seen, torch.inference_mode():
        run(seen)
    return seen.stats(shared)


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
    return LayerStats(absmax, weight_absmax, sum(seen.seen.values()), sample)


def fingerprint(stats: dict[str, LayerStats]) -> str:
    """SHA-256 of all that was seen: two calibrations on the same data by the same model have the same one."""
    digest = hashlib.sha256()
    for name in sorted(stats):
        digest.update(f"{name} {stats[name].tokens}\n".encode())
        digest.update(stats[name].absmax.numpy().tobytes())
        digest.update(stats[name].sample.float().numpy().tobytes())
    return digest.hexdigest()
