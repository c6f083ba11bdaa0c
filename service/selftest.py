"""`lowbit selftest`: the report of an artifact's self-test, on one screen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from quant_runtime.selftest import Line, Report

SAID = {
    "passed": "every kernel is right",
    "fallback": "what is wrong runs by another version",
    "refused": "a worker takes no jobs for it, unless LOWBIT_SELFTEST says otherwise",
}


def table(folder: Path, report: Report, paths: Mapping[str, str]) -> RenderableType:
    """A row an op, and below them the paths as /artifacts has them, what is wrong, and what compiling took."""
    shown = Table(title=f"{folder} on {report.device}", title_justify="left")
    for column in ("op", "runs by"):
        shown.add_column(column)
    for column in ("cases", "error", "allowed", "first call", "again"):
        shown.add_column(column, justify="right")
    shown.add_column("")
    for line in sorted(report.lines, key=lambda line: line.op):
        shown.add_row(*_cells(line))
    made = [one for one in report.compiles if not one.cached]
    told = [f"{name} by {words}" for name, words in paths.items() if name not in report.versions]
    told += [f"{name}: {why}" for name, why in report.failures.items()]
    told.append(f"{report.verdict}: {SAID[report.verdict]}")
    told.append(
        f"{report.seconds:.1f} s; kernels compiled: {len(made)}, from the cache on the disk: "
        f"{len(report.compiles) - len(made)}, in {report.compile_seconds:.1f} s; the cache was {report.cache}"
    )
    return Group(shown, *map(Text, told))  # not markup: shapes stand in brackets


def _cells(line: Line) -> tuple[str, ...]:
    version = line.version if line.version == line.own else f"{line.version}, not {line.own}"
    return (
        line.op, version, str(line.cases), f"{line.error.found:.2g}", f"{line.error.allowed:.2g}",
        f"{1000 * line.first_seconds:.1f} ms", f"{1000 * line.again_seconds:.1f} ms",
        "right" if line.passed else "WRONG",
    )  # fmt: skip
