"""python -m quant_runtime.roofline docs/pictures/roofline.svg: how near matmuls and attention come to a card's limits.

Drawn from the rows of docs/results/: across, operations for each byte that has to cross memory (operands read once,
answers written once); up, operations a second; both by powers of ten. The slope is the copy that was measured in the
same results, the flat lines are the vendor's peaks of an H100's matrix units. `--check` writes nothing and fails where
the picture is not current.
"""

from __future__ import annotations

import json
import math
import re
import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from quant_runtime.tables import RESULTS

PEAKS = {"8 bits": 1979.0, "16 bits": 989.0}  # TFLOP/s of an H100 SXM, dense
TOKENS = 119_056  # of attention_720p
ACROSS, UP = (10.0, 200_000.0), (100.0, 2_500.0)
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 900, 520, 70, 30, 190, 60
COLOURS = {"ours": "#b3261e", "cuBLAS, bfloat16": "#6b7280", "_scaled_mm, FP8": "#2563eb", "cuDNN, bfloat16": "#111827",
           "FlexAttention, bfloat16": "#15803d"}  # fmt: skip


@dataclass(frozen=True)
class Point:
    name: str  # what it is, for whoever points at it
    kind: str  # one of COLOURS
    intensity: float  # operations a byte
    rate: float  # TFLOP/s


def matmuls(rows: list[dict[str, Any]]) -> Iterator[Point]:
    kinds = {"bfloat16 cuBLAS": ("cuBLAS, bfloat16", 2), "FP8 _scaled_mm": ("_scaled_mm, FP8", 1), "INT8": ("ours", 1)}
    for row in rows:
        found = re.fullmatch(r"(\d+)x(\d+)->(\d+) (.+)", row["case"])
        if found is None or found[4] not in kinds:
            continue
        m, k, n = (int(found[i]) for i in (1, 2, 3))
        kind, bytes_ = kinds[found[4]]
        yield Point(f"matmul {row['case']}", kind, 2 * m * n * k / (bytes_ * (m + n) * k + 2 * m * n), row["value"])


def attentions(rows: list[dict[str, Any]]) -> Iterator[Point]:
    """Queries, keys and values in, answers out: 4 N operations a channel of a token, or the kept part of them."""
    kinds = {"bfloat16 cuDNN": ("cuDNN, bfloat16", 8), "bfloat16 FlexAttention": ("FlexAttention, bfloat16", 8),
             "INT8 and FP8": ("ours", 5)}  # fmt: skip
    for row in rows:
        found = re.fullmatch(r"(dense|density ([\d.]+)), (.+)", row["case"])
        if found is None or found[3] not in kinds:
            continue
        kind, bytes_ = kinds[found[3]]
        yield Point(f"attention {row['case']}", kind, 4 * TOKENS * float(found[2] or 1) / bytes_, row["value"])


def picture(points: list[Point], copy: float) -> str:
    """An SVG. `copy` is in GB/s."""
    plot_w, plot_h = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(intensity: float) -> float:
        return LEFT + plot_w * math.log(intensity / ACROSS[0]) / math.log(ACROSS[1] / ACROSS[0])

    def y(rate: float) -> float:
        return TOP + plot_h * (1 - math.log(rate / UP[0]) / math.log(UP[1] / UP[0]))

    def line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
        return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'

    def text(at_x: float, at_y: float, what: str, style: str = "") -> str:
        return f'<text x="{at_x:.1f}" y="{at_y:.1f}" {style}>{escape(what)}</text>'

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"',
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for rate in (100, 200, 500, 1000, 2000):
        out.append(line(LEFT, y(rate), WIDTH - RIGHT, y(rate), 'stroke="#e5e7eb"'))
        out.append(text(LEFT - 8, y(rate) + 4, f"{rate:,}", 'text-anchor="end"'))
    for intensity in (10, 100, 1_000, 10_000, 100_000):
        out.append(line(x(intensity), TOP, x(intensity), HEIGHT - BOTTOM, 'stroke="#e5e7eb"'))
        out.append(text(x(intensity), HEIGHT - BOTTOM + 18, f"{intensity:,}", 'text-anchor="middle"'))
    out.append(text(LEFT + plot_w / 2, HEIGHT - 15, "operations a byte of memory", 'text-anchor="middle"'))
    out.append(text(14, TOP - 10, "TFLOP/s"))
    low = max(ACROSS[0], UP[0] * 1e3 / copy)
    ridge = max(PEAKS.values()) * 1e3 / copy
    out.append(line(x(low), y(low * copy / 1e3), x(ridge), y(max(PEAKS.values())), 'stroke="black" stroke-width="2"'))
    out.append(text(x(low) + 26, y(low * copy / 1e3) - 14, f"copy, {copy / 1e3:.2f} TB/s"))
    for name, peak in PEAKS.items():
        out.append(line(x(peak * 1e3 / copy), y(peak), WIDTH - RIGHT, y(peak), 'stroke="black" stroke-width="2"'))
        out.append(text(WIDTH - RIGHT - 4, y(peak) - 6, f"peak, {name}: {peak:,.0f}", 'text-anchor="end"'))
    for point in points:
        shape = "circle" if point.name.startswith("matmul") else "square"
        at, style = (x(point.intensity), y(point.rate)), f'fill="{COLOURS[point.kind]}" fill-opacity="0.85"'
        title = f"<title>{escape(f'{point.name}: {point.rate:,.0f} TFLOP/s')}</title>"
        if shape == "circle":
            out.append(f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="5" {style}>{title}</circle>')
        else:
            out.append(f'<rect x="{at[0] - 5:.1f}" y="{at[1] - 5:.1f}" width="10" height="10" {style}>{title}</rect>')
    for index, (kind, colour) in enumerate(COLOURS.items()):
        at_y = TOP + 20 + 20 * index
        out.append(f'<rect x="{WIDTH - RIGHT + 16}" y="{at_y - 9}" width="10" height="10" fill="{colour}"/>')
        out.append(text(WIDTH - RIGHT + 32, at_y, kind))
    out.append(text(WIDTH - RIGHT + 16, TOP + 30 + 20 * len(COLOURS), "circles: matmuls"))
    out.append(text(WIDTH - RIGHT + 16, TOP + 48 + 20 * len(COLOURS), "squares: attention"))
    return "\n".join([*out, "</svg>", ""])


def read(name: str, results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (results / f"{name}.jsonl").read_text().splitlines()]


def drawn(results: Path) -> str:
    copy = next(row["value"] for row in read("fused-cuda", results) if row["case"] == "copy")
    points = [*matmuls(read("gemm-cuda", results)), *attentions(read("attention_720p-cuda", results))]
    return picture(points, copy)


def main() -> None:
    parser = ArgumentParser(prog="python -m quant_runtime.roofline", description="A picture of measured rates.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--check", action="store_true", help="write nothing, fail where the picture is not current")
    chosen = parser.parse_args()
    made = drawn(chosen.results)
    if not chosen.check:
        chosen.out.write_text(made)
    elif not chosen.out.is_file() or chosen.out.read_text() != made:
        sys.exit(f"{chosen.out} is not what the rows say: python -m quant_runtime.roofline {chosen.out}")


if __name__ == "__main__":
    main()
