"""`lowbit quantize` and `lowbit inspect`: a command line's words become a recipe, an artifact becomes a table.

Imported by the command line when one of the two is called: it brings torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from models import compress, hub, registry
from models import stream as layers
from models.compress import Recipe
from models.lora import Lora
from models.stream import Streamed
from quant_runtime import artifact, fields
from quant_runtime.artifact import LoraRecord, Manifest
from quant_runtime.attention import AttentionPlan, QkBits
from quant_runtime.formats import W8A8, W16A16, QuantFormat
from quant_runtime.kernels._cpu import keep_freed_memory
from quant_runtime.linear import LinearSpec
from quant_runtime.methods import METHODS
from quant_runtime.residual import Residual
from quant_runtime.rules import Rule
from quant_runtime.sparsity import POLICIES
from quant_runtime.sparsity.base import Choosing
from service.settings import DEVICE

REFRESHES = 2  # of a progress bar, a second: what draws it takes a core from what computes
STAGES = {
    "full precision": "generating in full precision",
    "calibrate": "calibrating",
    "table": "settling what heads choose",
    "quantize": "quantizing layers",
    "compressed": "generating compressed",
}


def recipe(
    method: str,
    bits: Sequence[str],
    settings: Sequence[str],
    attention: AttentionPlan,
    calibration: int,
    judging: int,
    keep: Sequence[str] = (),
    loras: Sequence[str] = (),
    table: bool = False,
) -> Recipe:
    """ValueError names the option and what would do. `keep` wins over `bits`, and of `bits` the later."""
    format_, rules = _formats(bits)
    asked = {format_, *(rule.format for rule in rules)}
    if (method == "none") != (asked == {W16A16}):
        given = ", ".join(bits) or str(W8A8)
        raise ValueError(f"--method none goes with --bits w16a16 and with no other; got {method} and {given}")
    if table and not isinstance(attention.policy, Choosing):
        raise ValueError("--table settles what heads choose as they run: it goes with --sparsity bands")
    for one in asked - {W16A16}:
        LinearSpec(one)  # refuses a format that no kernel runs, before an hour of calibration
    return Recipe(
        method=fields.build(METHODS, method, dict(_pair(s) for s in settings)),
        format=format_,
        attention=attention,
        calibration_samples=calibration,
        judging_samples=judging,
        rules=(*rules, *(Rule(pattern, W16A16) for pattern in keep)),
        loras=tuple(Lora.parse(text) for text in loras),
        table=table,
    )


def _formats(bits: Sequence[str]) -> tuple[QuantFormat, list[Rule]]:
    """FORMAT is that of all layers, W8A8 where none is given; PATTERN=FORMAT a rule of its own."""
    plain = [text for text in bits if "=" not in text]
    if len(plain) > 1:
        raise ValueError(f"--bits takes one format for all layers, others as PATTERN=FORMAT; got {', '.join(plain)}")
    pairs = [_pair(text, "--bits is FORMAT or PATTERN=FORMAT") for text in bits if "=" in text]
    rules = [Rule(pattern, QuantFormat.parse(format_)) for pattern, format_ in pairs]
    return QuantFormat.parse(plain[0]) if plain else W8A8, rules


def plan(
    sparsity: str,
    warmup: float,
    qk_bits: int,
    dense_qk_bits: int,
    pv_bits: int = 16,
    residual: Residual | None = None,
) -> AttentionPlan:
    """`dense`, or POLICY:density with further fields behind commas: `topk:0.25,block=64`, `tiles:0.25,window=3,5,5`.

    What stands without a name is the policy's first field: the density, or the mass of topp.
    """
    name, _, rest = sparsity.partition(":")
    parts = re.split(r",(?=[^,]*=)", rest) if rest else []  # in front of a name: a field of several has commas too
    given = {}
    if parts and "=" not in parts[0]:
        names = fields.names(POLICIES[name]) if name in POLICIES else []
        given[names[0] if names else "density"] = parts.pop(0)
    given |= dict(_pair(part) for part in parts)
    policy = fields.build(POLICIES, name, given)
    sparse, dense = _bits("--qk-bits", qk_bits), _bits("--dense-qk-bits", dense_qk_bits)
    values = _bits("--pv-bits", pv_bits)
    if values == 8 and dense == 16 and (sparse == 16 or name == "dense"):
        raise ValueError(
            "--pv-bits 8 goes with q and k of 8 bits: --dense-qk-bits 8, or a sparse policy and --qk-bits 8"
        )
    if residual is not None and name == "dense":
        raise ValueError("--refresh is for what sparse attention loses, and --sparsity is dense")
    return AttentionPlan(policy, warmup, qk_bits=sparse, dense_qk_bits=dense, pv_bits=values, residual=residual)


def residual(refresh: int | None, **given: Any) -> Residual | None:
    """None without --refresh, which the other options of a residual go with; those left out are its defaults."""
    settings = {name: value for name, value in given.items() if value is not None}
    if refresh is None:
        if settings:
            raise ValueError(f"--residual-{next(iter(settings))} goes with --refresh, the steps between two refreshes")
        return None
    return Residual(refresh, **settings)


def _bits(option: str, given: int) -> QkBits:
    if given == 8:
        return 8
    if given == 16:
        return 16
    raise ValueError(f"{option} is 8 or 16; got {given}")


def _pair(text: str, said: str = "a field is set as NAME=VALUE") -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise ValueError(f"{said}; got {text!r}")
    return name, value


def quantize(source: str, made: Recipe, out: Path, device: str, replace: bool, console: Console) -> Manifest:
    """Compress with a bar a stage, and say what came of it."""
    keep_freed_memory()
    folder = registry.checkpoint(source)
    family = registry.family_of(folder)
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, refresh_per_second=REFRESHES) as progress:
        bars = {}

        def show(stage: str, done: int, of: int) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(STAGES[stage], total=of)
            progress.update(bars[stage], completed=done)

        return compress.compress(
            family, folder, made, out, base=_base(source, folder),
            device=resolve(device), on_progress=show, replace=replace,
        )  # fmt: skip


def stream(source: str, made: Recipe, out: Path, device: str, replace: bool, console: Console) -> Manifest:
    """The same layer by layer, with bars of the bytes that are read. Nothing is judged."""
    keep_freed_memory()
    folder = registry.checkpoint(source)
    family = registry.family_of(folder)
    if made.table:
        raise ValueError("--table asks films of the whole model, which --stream does not make: leave out one of them")
    if not isinstance(family, Streamed):
        raise ValueError(f"checkpoints of {family.name} are not read layer by layer yet: leave out --stream")
    with byte_bars(console) as show:
        return layers.compress(
            family, folder, made.method, made.format, made.attention, out, base=_base(source, folder),
            device=resolve(device), rules=made.rules, loras=made.loras, replace=replace,
            samples=made.calibration_samples, on_bytes=partial(show, "quantizing layer by layer"),
            on_calibration=partial(show, "calibrating layer by layer"),
        )  # fmt: skip


@contextmanager
def byte_bars(console: Console) -> Iterator[Callable[[str, int, int | None], None]]:
    """A bar for each title that is told (title, bytes done, of how many, if that is known); it shows the time left."""
    columns = (
        TextColumn("{task.description:32}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, refresh_per_second=REFRESHES) as progress:
        bars: dict[str, TaskID] = {}

        def show(title: str, done: int, of: int | None) -> None:
            if title not in bars:
                bars[title] = progress.add_task(title, total=None)
            progress.update(bars[title], completed=done, total=of)

        yield show


def _base(source: str, folder: Path) -> str:
    return source if source in registry.SHIPPED else hub.name(folder)


def resolve(device: str) -> str:
    """auto, cpu, cuda or cuda:N to a device that is there; ValueError says what would do."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(DEVICE, device):
        raise ValueError(f"a device is auto, cpu, cuda or cuda:N; got {device!r}")
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"{device} was asked for, and torch sees no GPU here")
    return device


def describe(folder: Path, manifest: Manifest) -> Table:
    """An artifact on one screen."""
    table = Table(title=str(folder), show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    for name, value in rows(manifest):
        table.add_row(name, value)
    return table


def rows(manifest: Manifest) -> list[tuple[str, str]]:
    formats = Counter(layer.format for layer in manifest.layers.values())
    counted = [f"{count} × {name}" for name, count in formats.most_common()]
    if manifest.kept:
        counted.append(f"{len(manifest.kept)} kept in 16 bits")
    packed, full = manifest.layer_bytes()
    lines = [
        ("family", manifest.family),
        ("base", manifest.base.name + (f" @ {manifest.base.revision}" if manifest.base.revision else "")),
        *(("merged", _merged(lora)) for lora in manifest.base.loras),
        ("method", _named(manifest.method)),
        ("layers", ", ".join(counted) or "all in 16 bits"),
    ]
    if len(counted) > 1:  # the most common is the rest
        for name, _ in formats.most_common()[1:]:
            lines.append((name, _spans(layer for layer, its in manifest.layers.items() if its.format == name)))
        if manifest.kept:
            lines.append(("16 bits", _spans(manifest.kept)))
    if packed:
        lines.append(("their bytes", f"{packed:,} for {full:,} in 16 bits: {full / packed:.2f}× smaller"))
    lines.append(("all files", f"{sum(f.bytes for f in manifest.files.values()):,} bytes in {len(manifest.files)}"))
    if manifest.attention is not None:
        its = manifest.attention
        kept, each = its.effective_density, its.network_densities
        measured = f", {kept:.1%} of key blocks kept, mean over all steps" if kept is not None else ""
        if each:
            measured += f" ({', '.join(f'{name} {own:.1%}' for name, own in each.items())})"
        bits = f"; q and k in {its.qk_bits} bits, dense {its.dense_qk_bits}, values {its.pv_bits}"
        if its.pv_bits == 8 and its.fp8_calls is not None:
            bits += f" in {its.fp8_calls:.0%} of calls"
        lines.append(("attention", _named(its.policy) + measured + bits))
        if its.residual is not None:
            lines.append(("residual", _cached(its.residual)))
    for name, value in manifest.quality.items():
        lines.append((name, f"{value:.4g}" if isinstance(value, float) else str(value)))
    lines.append(("made by", manifest.runtime))
    return lines


def _cached(its: artifact.ResidualRecord) -> str:
    said = f"{its.residual().words()}, {its.placed or its.place}"
    return said if its.bytes is None else f"{said}; {its.bytes:,} bytes for a film of the default size"


def _merged(lora: LoraRecord) -> str:
    return f"{lora.name} × {lora.scale:g}" + (f", into {lora.network}" if lora.network else "")


def _spans(names: Iterable[str]) -> str:
    """Names that differ in their first number alone as one: blocks.0-3.ffn.net.2"""
    numbers: dict[tuple[str, ...], list[int]] = {}
    for name in names:
        head, *found = re.split(r"(?<=\.)(\d+)(?=\.)", name, maxsplit=1)
        numbers.setdefault((head, *found[1:]), []).extend(int(number) for number in found[:1])
    return ", ".join(_runs(sorted(its)).join(parts) if its else parts[0] for parts, its in numbers.items())


def _runs(numbers: Sequence[int]) -> str:
    """0-2,5 of 0, 1, 2, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _named(named: artifact.Named) -> str:
    inner = ", ".join(f"{k}={_short(v)}" for k, v in named.fields.items() if v != [])
    return f"{named.name} ({inner})" if inner else named.name


def _short(value: JsonValue) -> str:
    """Of a table its size."""
    return f"of {len(value)} layers" if isinstance(value, list) and isinstance(value[0], str) else str(value)
