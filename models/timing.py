"""What benchmarks of whole networks share: layers shrunk in place, seconds of a call, memory at its peak.

On a CPU, where they are tried out before they go to a GPU, seconds come from the clock and memory is not told.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from statistics import median, quantiles
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from quant_runtime import report
from quant_runtime.formats import QuantFormat
from quant_runtime.methods import METHODS, Streamable

T = TypeVar("T")
Baseline = tuple[str, float] | None


def quantize(network: nn.Module, names: Iterable[str], method: str, bits: str) -> None:
    """The named layers, in place, without data."""
    how, format_ = METHODS[method](), QuantFormat.parse(bits)
    if not isinstance(how, Streamable) or how.calibrated:
        raise ValueError(f"{method} needs calibration, and random weights have nothing to be calibrated for")
    for name in names:
        layer = network.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        network.set_submodule(name, how.quantize(layer, None, format_))


def cudnn(device: torch.device, *others: SDPBackend) -> AbstractContextManager[None]:
    """In which torch's attention is cuDNN's, on a GPU, and of `others` where that takes no such call."""
    if device.type != "cuda":
        return nullcontext()
    one = torch.ones(1, 1, 8, 64, device=device, dtype=torch.bfloat16)
    torch.nn.functional.scaled_dot_product_attention(one, one, one)  # at its first torch decides what it prefers
    context: AbstractContextManager[None] = sdpa_kernel([SDPBackend.CUDNN_ATTENTION, *others], set_priority=True)
    return context


def clocked(call: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """What `call` answers, and its seconds."""
    if device.type != "cuda":
        begun = time.perf_counter()
        return call(), time.perf_counter() - begun
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    answer = call()
    after.record()
    torch.cuda.synchronize(device)
    return answer, before.elapsed_time(after) / 1e3


def timed(call: Callable[[], T], rounds: int, device: torch.device, warmups: int = 1) -> tuple[T, list[float]]:
    """What the last of `rounds` answered, and their seconds, after some that warm up. The peak is without the first."""
    answer = call()
    forget_peak(device)
    for _ in range(warmups - 1):
        answer = call()
    seconds = []
    for _ in range(rounds):
        del answer
        answer, took = clocked(call, device)
        seconds.append(took)
    return answer, seconds


def rows(
    case: str, metric: str, seconds: list[float], device: torch.device, baseline: Baseline, error: Any
) -> Iterator[dict[str, Any]]:
    """The time that was just taken, and on a GPU the peak of memory since `timed` began."""
    quarters = quantiles(seconds, n=4) if len(seconds) > 1 else [0.0] * 3
    yield report.row(
        case, metric, median(seconds), "s", "lower", samples=len(seconds), baseline=baseline,
        spread=quarters[2] - quarters[0], error=error,
    )  # fmt: skip
    yield from peak(case, device)


def peak(case: str, device: torch.device) -> Iterator[dict[str, Any]]:
    if device.type == "cuda":
        most = torch.cuda.max_memory_allocated(device) / 2**30
        yield report.row(case, "peak memory", most, "GiB", "lower", samples=1)


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def relative(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖, of three digits."""
    return float(f"{float((got.double() - want.double()).norm() / want.double().norm()):.3g}")


def told(found: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each row, when it has been printed."""
    for row in found:
        what = f"{row['value']:8.3f} {row['unit']}  {row['baseline'] or ''}  {row['error'] or ''}"
        print(f"{row['case']:64} {what}", flush=True)
        yield row
