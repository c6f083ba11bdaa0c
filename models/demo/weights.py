"""Rows of the demo models' benchmarks that weigh instead of timing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quant_runtime import report
from quant_runtime.artifact import Manifest


def rows(case: str, before: Path, after: Path, manifest: Manifest) -> Iterator[dict[str, Any]]:
    """Bytes of the compressed layers, and of the file that holds the network, against the checkpoint's 16 bits."""
    packed, half = manifest.layer_bytes()
    for metric, small, large in (
        ("block linears", packed, half),
        ("network file", after.stat().st_size, before.stat().st_size),
    ):
        yield report.row(case, metric, small, "bytes", "lower", samples=1, baseline=("16 bits", large))
