"""Measured figures as rows of JSON lines, each with all that is needed to doubt it: command, commit, device, versions.

A row is {bench, case, metric, value, unit, better, baseline: {name, value} or null, spread, error, samples, command,
commit, device, paths (on a CPU), versions}. The files lie in docs/results/, and README's tables are written from them.
"""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch

from quant_runtime.attention import describe_paths

CODE = (":(top)", ":(top,exclude)docs", ":(top,exclude)*.md")
Better = Literal["lower", "higher"]


def row(
    case: str,
    metric: str,
    value: float,
    unit: str,
    better: Better,
    *,
    samples: int,
    baseline: tuple[str, float] | None = None,
    spread: float | None = None,
    error: Any = None,
) -> dict[str, Any]:
    """One figure, without what is the same for all rows of a run. `value` is a median or a mean of `samples`."""
    return {
        "case": case,
        "metric": metric,
        "value": rounded(value),
        "unit": unit,
        "better": better,
        "baseline": {"name": baseline[0], "value": rounded(baseline[1])} if baseline else None,
        "spread": None if spread is None else rounded(spread),
        "error": error,
        "samples": samples,
    }


def rounded(value: float) -> float:
    """Five significant digits, more than any measured figure has; what was counted stays as it is."""
    return value if isinstance(value, int) else float(f"{value:.5g}")


def write(path: Path, bench: str, rows: Iterable[dict[str, Any]], command: list[str], device: torch.device) -> None:
    """The rows as `path`, which is replaced once the last of them has come."""
    same = {"command": shlex.join(command), "commit": commit(), **facts(device)}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("w") as file:
        for one in rows:
            file.write(json.dumps({"bench": bench, **one, **same}) + "\n")
            file.flush()
    part.replace(path)


def facts(device: torch.device) -> dict[str, Any]:
    """Where and with what it was measured."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if device.type == "cuda":
        import triton

        return {"device": torch.cuda.get_device_name(device), "versions": versions | {"triton": triton.__version__}}
    models = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    name = f"{models[0] if models else platform.processor()}, {torch.get_num_threads()} threads"
    return {"device": name, "paths": describe_paths(device), "versions": versions}


def commit() -> str:
    """The commit of the code that runs, `+changes` where its files differ from it; empty outside a repository.

    Texts and results do not count: a measurement that writes the next line of its own results is no change of code.
    """
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "-uno", "--", *CODE)
    return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
