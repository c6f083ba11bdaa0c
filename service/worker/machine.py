"""What a worker asks of its machine: to open an artifact, and to test the kernels that will run it.

Both load torch and the models; everything else of the service goes without them.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

from models.base import Generator
from service import metrics
from service.jobs import SelfTest
from service.settings import Settings

CACHE = "TRITON_CACHE_DIR"


def keep_kernels(settings: Settings) -> None:
    """What Triton compiles is kept where the settings say; for the start of a process, before it compiles."""
    if settings.kernel_cache is not None:
        os.environ[CACHE] = str(settings.kernel_cache.resolve())
    os.environ.setdefault(CACHE, str((settings.data / "kernels").resolve()))


def device_of(settings: Settings) -> str:
    """cpu or cuda, and perhaps its number: `auto` is cuda where torch sees one."""
    if settings.device != "auto":
        return settings.device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load(path: Path, device: str, check: bool) -> Generator:
    """An artifact's generator; with `check`, once its hashes are right."""
    from models.load import load
    from quant_runtime.kernels._cpu import keep_freed_memory

    _watch_compiles()
    keep_freed_memory()
    return load(path, device, check)


def test(path: Path, device: str, fallback: bool) -> SelfTest:
    """The self-test of an artifact, for which no weights are read. Raises ValueError for one that cannot be read."""
    from models.selftest import check

    _watch_compiles()
    report = check(path, device, fallback)
    return SelfTest(
        verdict=report.verdict,
        device=report.device,
        versions=report.versions,
        failures=report.failures,
        seconds=round(report.seconds, 3),
        compile_seconds=round(report.compile_seconds, 3),
        cache=report.cache,
    )


@functools.cache
def _watch_compiles() -> None:
    from quant_runtime import compiles

    compiles.watch(lambda one: metrics.compiled(one.seconds, one.cached))
