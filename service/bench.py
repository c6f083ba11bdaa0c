"""python -m service.bench quantize NAME ...: checkpoints of full size, with random weights, become artifacts.

One after the other `lowbit dev synth` makes it, `lowbit quantize --stream` compresses it, and it is removed. `python -m
service.bench load ARTIFACT ...` opens the networks of artifacts, on a CPU, with and without their hashes. `python -m
service.bench calibrate` runs a published network, with small parts around it, from the disk. Whole artifacts are opened
by service/bench_whole.py. Rows as in quant_runtime/report.py. Each command is a process of its own: peak memory is its
`ru_maxrss`, in which mapped pages count. The disk is tried alone in the same run, over 2 GiB, and files are dropped
from the page cache before they are read; what a machine below keeps of them cannot be.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from models.base import VideoLimits
from quant_runtime import artifact, report
from quant_runtime.artifact import Manifest
from quant_runtime.tensor_files import TensorFiles
from service import child

GIB = 2**30
TRIED = 2 * GIB  # bytes that the disk is tried with
BLOCK = 16 << 20
WEIGHTS = "diffusion_pytorch_model"
SMALL = VideoLimits(size_multiple=16, max_pixels=320 * 192, max_side=320, max_frames=5, frames=5)


@dataclass(frozen=True)
class Ran:
    """A process that has ended well."""

    seconds: float
    cpu_seconds: float
    peak: int  # bytes
    read: int  # bytes, of whatever files, wherever they came from
    written: int


@dataclass(frozen=True)
class Disk:
    """Bytes a second, in a row and with nothing else to do."""

    reads: float
    writes: float

    def seconds(self, read: int, written: int) -> float:
        return read / self.reads + written / self.writes


@dataclass(frozen=True)
class Asked:
    """How checkpoints are made and compressed."""

    scratch: Path  # a folder
    method: str
    bits: str
    dtype: str | None  # of the checkpoint; None is as published
    keep: bool  # the artifacts


def quantize(names: list[str], asked: Asked) -> Iterator[dict[str, Any]]:
    disk = tried(asked.scratch)
    yield report.row("the disk alone", "read", disk.reads / 1e6, "MB/s", "higher", samples=1)
    yield report.row("the disk alone", "written", disk.writes / 1e6, "MB/s", "higher", samples=1)
    for name in names:
        yield from _quantized(name, asked, disk)


def _quantized(name: str, asked: Asked, disk: Disk) -> Iterator[dict[str, Any]]:
    source, out = asked.scratch / name, asked.scratch / f"{name}-{asked.method}-{asked.bits}"
    typed = ("--dtype", asked.dtype) if asked.dtype else ()
    made = ran(*_lowbit("dev", "synth", name, str(source), *typed))
    with weights(source) as files:
        half = sum(2 * math.prod(stored.shape) for stored in files.tensors.values())
        read = sum(file.stat().st_size for file in files.files())
    yield _rate(name, "checkpoint made", made, 0, read, disk)
    yield _peak(name, "checkpoint made, peak memory", made)
    forget(source)
    options = ("--method", asked.method, "--bits", asked.bits, "--stream", "--out", str(out))
    done = ran(*_lowbit("quantize", str(source), *options))
    shutil.rmtree(source)
    written, parts = added_up(out, artifact.read_manifest(out))
    case = f"{name} {asked.method} {asked.bits}"
    yield report.row(
        case, "transformer", written / GIB, "GiB", "lower", samples=1, baseline=("16 bits", half / GIB), error=parts
    )
    yield _time(case, done)
    yield _rate(case, "read and written", done, read, written, disk)
    yield _peak(case, "peak memory", done)
    if not asked.keep:
        shutil.rmtree(out)


def calibrate(name: str, scratch: Path, samples: int, blocks: int, limits: VideoLimits) -> Iterator[dict[str, Any]]:
    """All that `lowbit quantize --stream` reads and writes with a method that calibrates, compressing included."""
    from models import synthetic
    from models.published import PUBLISHED

    network = replace(PUBLISHED[name], config={**PUBLISHED[name].config, "num_layers": blocks})
    source, out = scratch / f"{name}-whole", scratch / f"{name}-smoothquant"
    synthetic.write_whole(network, source, limits, lambda done, of: None)
    with weights(source) as files:
        size = sum(stored.bytes for stored in files.tensors.values())
    forget(source)
    options = ("--method", "smoothquant", "--calibration-samples", str(samples), "--stream", "--out", str(out))
    done = ran(*_lowbit("quantize", str(source), *options, "--device", "cpu"))
    for folder in (source, out):
        shutil.rmtree(folder)
    case = f"{name}, {blocks} blocks, {samples} samples of {limits.steps} steps"
    once = ("the network", size / GIB)
    yield report.row(case, "read", done.read / GIB, "GiB", "lower", samples=1, baseline=once)
    yield report.row(case, "written", done.written / GIB, "GiB", "lower", samples=1)
    yield _time(case, done)
    yield _peak(case, "peak memory", done)


def weights(folder: Path) -> TensorFiles:
    """Of all networks, named as a manifest's layers are: where there are two, by their folders."""
    parts = sorted(path.name for path in folder.glob("transformer*"))
    prefixes = {part: f"{part}." if len(parts) > 1 else "" for part in parts}
    held = {part: TensorFiles.open(folder / part, WEIGHTS).tensors for part in parts}
    return TensorFiles({f"{prefixes[part]}{key}": its for part in parts for key, its in held[part].items()})


def added_up(folder: Path, manifest: Manifest) -> tuple[int, dict[str, int]]:
    """Bytes of the network's files, and of their parts. ValueError where the manifest's layers are not as they lie."""
    with weights(folder) as files:
        found = dict.fromkeys(manifest.layers, 0)
        kept, heads = 0, dict[Path, int]()
        for key, stored in files.tensors.items():
            heads[stored.file] = min(stored.offset, heads.get(stored.file, stored.offset))
            layer = key.rpartition(".")[0]
            if layer in found:
                found[layer] += stored.bytes
            else:
                kept += stored.bytes
        whole = sum(file.stat().st_size for file in files.files())
    wrong = [name for name, layer in manifest.layers.items() if layer.bytes != found[name]]
    parts = {"layers": manifest.layer_bytes()[0], "the rest": kept, "headers": sum(heads.values())}
    if wrong or sum(parts.values()) != whole:
        raise ValueError(f"{folder}: the manifest's bytes do not add up: {wrong[:5]}, {parts}, files of {whole} bytes")
    return whole, parts


WAYS = {
    "imports": "imports alone",
    "checked": "hashes checked",
    "unchecked": "hashes not checked",
    "worker": "as a worker on a CPU has it",  # small floats in float32
}


def load(folders: list[Path]) -> Iterator[dict[str, Any]]:
    for folder in folders:
        size = added_up(folder, artifact.read_manifest(folder))[0]
        disk = tried(folder.parent)
        for way, how in WAYS.items():
            forget(folder)
            done = ran(*child.command("service.bench", "open", str(folder), way))
            case = f"{folder.name}, {how}"
            loads = way != "imports"
            yield _peak(case, "peak memory", done, ("the artifact", size / GIB) if loads else None)
            yield _time(case, done, ("the disk alone", disk.seconds(size, 0)) if loads else None)


def opened(folder: Path, way: str) -> None:
    """The network of an artifact on the CPU, in its own 16 bits or as a worker has it: one of the processes."""
    from models import registry
    from quant_runtime.kernels._cpu import keep_freed_memory

    keep_freed_memory()
    manifest = artifact.read_manifest(folder)
    family: Any = registry.family(manifest.family)
    if way == "imports":
        return
    components = family.components(folder)
    own = {name: its for part in components for name, its in artifact.weights(manifest, part).items()}
    check = way != "unchecked"
    if check:
        artifact.verify(folder, manifest, later=own)
    worker = way == "worker"
    dtype = torch.float32 if worker else family.stored
    held = [family.network(folder, part, "cpu", dtype, own if check else None, worker) for part in components]
    assert len(held) == len(components)  # all of them at once


def ran(*command: str) -> Ran:
    """A process to its end. (Linux counts into its peak what this one has held at most: little beside it.)"""
    begun = time.perf_counter()
    process = subprocess.Popen(command, env=child.environment())
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    moved = dict(line.split(": ") for line in Path(f"/proc/{process.pid}/io").read_text().splitlines())
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise ValueError(f"{' '.join(command)} ended with {process.returncode}")
    seconds, cores = time.perf_counter() - begun, usage.ru_utime + usage.ru_stime
    return Ran(seconds, cores, usage.ru_maxrss * 1024, int(moved["rchar"]), int(moved["wchar"]))


def tried(folder: Path) -> Disk:
    """The rates at which a file is written, until it is on the disk, and read again."""
    path = folder / ".disk-tried"
    block = memoryview(bytearray(os.urandom(BLOCK)))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        begun = time.perf_counter()
        with path.open("wb", buffering=0) as file:
            for _ in range(TRIED // BLOCK):
                file.write(block)
            os.fsync(file.fileno())
        written = time.perf_counter()
        forget(path)
        with path.open("rb", buffering=0) as file:
            begun_again = time.perf_counter()
            while file.readinto(block):
                pass
        read = time.perf_counter() - begun_again
    finally:
        path.unlink()
    return Disk(TRIED / read, TRIED / (written - begun))


def forget(path: Path) -> None:
    """A file, or those of a folder, are read from the disk the next time. They have been written to it."""
    for file in [path] if path.is_file() else [inner for inner in path.rglob("*") if inner.is_file()]:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _lowbit(*words: str) -> list[str]:
    return child.command("service.cli", *words)


def _rate(case: str, metric: str, done: Ran, read: int, written: int, disk: Disk) -> dict[str, Any]:
    moved = (read + written) / 1e6
    alone = moved / disk.seconds(read, written)
    return report.row(
        case, metric, moved / done.seconds, "MB/s", "higher", samples=1, baseline=("the disk alone", alone)
    )


def _time(case: str, done: Ran, baseline: tuple[str, float] | None = None) -> dict[str, Any]:
    """With the seconds of cores that the process got: on a machine that others use too, it waited for them."""
    cores = {"cpu_seconds": round(done.cpu_seconds, 1)}
    return report.row(case, "time", done.seconds, "s", "lower", samples=1, baseline=baseline, error=cores)


def _peak(case: str, metric: str, done: Ran, baseline: tuple[str, float] | None = None) -> dict[str, Any]:
    return report.row(case, metric, done.peak / GIB, "GiB", "lower", samples=1, baseline=baseline)


def main() -> None:
    parser = ArgumentParser(prog="python -m service.bench", description="Large checkpoints in bounded memory.")
    kinds = parser.add_subparsers(dest="name", required=True)
    made = kinds.add_parser("quantize")
    made.add_argument("names", nargs="+", metavar="NAME", help="of `lowbit dev synth`")
    made.add_argument("--scratch", type=Path, required=True, help="has room for a checkpoint and its artifact")
    made.add_argument("--method", default="quarot")
    made.add_argument("--bits", default="w4a8")
    made.add_argument("--dtype", help="of the checkpoint; as published where it is left out")
    made.add_argument("--keep", action="store_true", help="the artifacts")
    run = kinds.add_parser("calibrate")
    run.add_argument("network", nargs="?", default="wan-2.1-1.3b", help="of Wan's kind, by its name in published.py")
    run.add_argument("--scratch", type=Path, required=True, help="has room for it twice")
    run.add_argument("--blocks", type=int, default=30, help="of the network, so many of a published one's")
    run.add_argument("--samples", type=int, default=4)
    run.add_argument("--steps", type=int, default=2, help="of each, of two passes")
    run.add_argument("--frames", type=int, default=5)
    held = kinds.add_parser("load")
    held.add_argument("folders", nargs="+", type=Path, metavar="ARTIFACT")
    for measured in (made, run, held):
        measured.add_argument("--out", type=Path, default=Path("docs/results"))
    one = kinds.add_parser("open", help="no measurement: what `load` measures")
    one.add_argument("folder", type=Path, metavar="ARTIFACT")
    one.add_argument("way", choices=WAYS)
    chosen = parser.parse_args()
    if chosen.name == "open":
        opened(chosen.folder, chosen.way)
        return
    if chosen.name == "quantize":
        asked = Asked(chosen.scratch, chosen.method, chosen.bits, chosen.dtype, chosen.keep)
        rows = quantize(chosen.names, asked)
    elif chosen.name == "calibrate":
        limits = replace(SMALL, max_frames=chosen.frames, frames=chosen.frames, steps=chosen.steps)
        rows = calibrate(chosen.network, chosen.scratch, chosen.samples, chosen.blocks, limits)
    else:
        rows = load(chosen.folders)
    path = chosen.out / f"{chosen.name}-cpu.jsonl"
    report.write(path, chosen.name, told(rows), ["lowbit", "bench", *sys.argv[1:]], torch.device("cpu"))
    print(path)


def told(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        print(f"{row['case']:44} {row['metric']:20} {row['value']:10.4g} {row['unit']}", row["baseline"], row["error"])
        yield row


if __name__ == "__main__":
    main()
