"""What the demo models' training programs share: a schedule that ends when the time does, averaged weights, a log.

Time, not steps, drives the schedule: a machine of any speed, lent for any while, ends with its learning rate at zero.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Clock:
    """Fraction of the budget used. `warm` and `cool` are the shares of it that go into rising and falling rates."""

    def __init__(self, seconds: float, warm: float = 0.02, cool: float = 0.4) -> None:
        self.seconds, self.warm, self.cool = seconds, warm, cool
        self.begun = time.monotonic()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.begun

    @property
    def progress(self) -> float:
        return min(1.0, self.elapsed / self.seconds)

    @property
    def rate(self) -> float:
        """What to multiply the peak learning rate with: up, flat, down to zero in a straight line."""
        p = self.progress
        return max(0.0, min(p / self.warm if self.warm else 1.0, 1.0, (1 - p) / self.cool))


class Average:
    """An exponential moving average of parameters, in float32."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float = 0.999) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.mean = [p.detach().float().clone() for p in self.parameters]
        self.steps = 0

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        keep = min(self.decay, (1 + self.steps) / (10 + self.steps))  # young averages forget their random start faster
        torch._foreach_lerp_(self.mean, [p.detach() for p in self.parameters], 1 - keep)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange average and parameters; called twice, nothing has changed."""
        for mean, p in zip(self.mean, self.parameters, strict=True):
            held = p.detach().clone()
            p.copy_(mean)
            mean.copy_(held)


class Muon(torch.optim.Optimizer):
    """Momentum, then the nearest orthogonal matrix (Jordan et al. 2024), scaled as in arXiv:2502.16982.

    Takes matrices only. Those of one shape are orthogonalized together: a small network has many, each alone a launch.
    """

    def __init__(
        self, matrices: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(list(matrices), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, matrices in by_shape.items():
                speeds = []
                for p in matrices:
                    speed = self.state[p].setdefault("speed", torch.zeros_like(p))
                    speeds.append(speed)
                grads = [p.grad for p in matrices]
                torch._foreach_lerp_(speeds, grads, 1 - group["momentum"])
                ahead = torch._foreach_lerp(grads, speeds, group["momentum"])
                turned = _orthogonal(torch.stack(ahead))
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                scale = -group["lr"] * 0.2 * max(shape) ** 0.5
                torch._foreach_add_(matrices, list(turned.to(matrices[0].dtype).unbind(0)), alpha=scale)


def _orthogonal(batch: Tensor, steps: int = 5) -> Tensor:
    """U Vᵀ of each matrix's singular value decomposition (quintic Newton-Schulz: singular values 0.7-1.2)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = batch.bfloat16() if batch.is_cuda else batch.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Curve:
    """Writes a line of JSON a measurement, and prints it."""

    def __init__(self, path: Path, clock: Clock) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.clock = path, clock

    def write(self, **values: Any) -> None:
        line = {"seconds": round(self.clock.elapsed, 1)} | {
            k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
