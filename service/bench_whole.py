"""python -m service.bench_whole NETWORK: a whole artifact of true size is opened as a worker opens it, and watched.

Its checkpoint is made here, network, encoders and autoencoder at their published sizes with random weights, compressed
to W4A8 layer by layer, and removed. Then processes of their own load it to the device, with and without its hashes; to
a CPU once more, as one that does not multiply bfloat16. A process first loads the family's tiny artifact: all that is
imported, a GPU's context and its libraries are there before it is watched, and are told apart. Files are dropped from
the page cache before they are read, and the disk is tried alone, as in service/bench.py.
"""

from __future__ import annotations

import gc
import json
import resource
import shutil
import subprocess
import sys
import threading
import time
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from models.published import PARTS, PUBLISHED, Part, Published
from quant_runtime import artifact, report
from service import child
from service.bench import GIB, forget, told, tried

WATCHED_EVERY = 0.001  # seconds: in it a thread of this process writes a few MiB for the first time
WAYS = {"checked": "hashes checked", "unchecked": "hashes not checked", "float32": "hashes checked, no bfloat16"}


@dataclass(frozen=True)
class Loaded:
    """What a process says of what it loaded, in bytes."""

    seconds: float
    cpu_seconds: float  # of all its life
    before: int  # of the host, with all that is imported, and the device's context
    peak: int  # of the host, seen while it was loaded
    most: int  # of the host, ever: no less than the peak
    device: int  # on a GPU, at its peak
    reserved: int  # there, with what torch keeps for what comes


@dataclass(frozen=True)
class Asked:
    scratch: Path  # a folder
    device: str
    blocks: int | None = None  # of the network, of each kind that it has, where not all
    layers: int | None = None  # of the text encoder


def rows(name: str, asked: Asked) -> Iterator[dict[str, Any]]:
    out, (network, parts) = asked.scratch / f"{name}-rtn-w4a8", described(name, asked)
    with ProcessPoolExecutor(1, get_context("spawn")) as aside:  # its peak would be counted into those of its siblings
        aside.submit(make, network, parts, out).result()
    files = artifact.read_manifest(out).files
    size = sum(record.bytes for record in files.values())
    each = {
        part: sum(its.bytes for file, its in files.items() if file.startswith(f"{part}/"))
        for part in ("transformer", *parts)
    }
    disk = tried(asked.scratch)
    whole, alone = ("the artifact", size / GIB), ("the disk alone", disk.seconds(size, 0))
    depths = {"blocks of each kind": asked.blocks, "layers of its text encoder": asked.layers}
    case = " and ".join([name, *(f"{depth} {what}" for what, depth in depths.items() if depth is not None)])
    for way, how in WAYS.items():
        if way == "float32" and asked.device != "cpu":
            continue
        forget(out)
        got, this = _opened_aside(out, way, asked.device), f"{case}, {how}"
        above, cores = {"at_most": got.most - got.before}, {"cpu_seconds": round(got.cpu_seconds, 1)}
        yield _least(this, "host memory before", got.before / GIB, "GiB")
        yield _least(this, "host memory above that", (got.peak - got.before) / GIB, "GiB", None, above)
        yield _least(this, "peak memory", got.most / GIB, "GiB", whole, each)
        if asked.device != "cpu":
            yield _least(this, "device memory", got.device / GIB, "GiB", whole, {"reserved": got.reserved})
        yield _least(this, "time", got.seconds, "s", alone, cores)
        rate, most = size / got.seconds / 1e6, ("the disk alone", disk.reads / 1e6)
        yield report.row(this, "loaded", rate, "MB/s", "higher", samples=1, baseline=most)
    shutil.rmtree(out)
    shutil.rmtree(small(out))


def _least(
    case: str, metric: str, value: float, unit: str, baseline: tuple[str, float] | None = None, error: Any = None
) -> dict[str, Any]:
    return report.row(case, metric, value, unit, "lower", samples=1, baseline=baseline, error=error)


def _opened_aside(folder: Path, way: str, device: str) -> Loaded:
    command = child.command("service.bench_whole", "open", str(folder), way, "--device", device)
    done = subprocess.run(command, env=child.environment(), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{' '.join(command)} ended with {done.returncode}")
    return Loaded(**json.loads(done.stdout.splitlines()[-1]))


def described(name: str, asked: Asked) -> tuple[Published, Mapping[str, Part]]:
    """A published network and what is around it, as deep as it was asked for."""
    network = PUBLISHED[name]
    parts = dict(PARTS[network.family])
    if asked.blocks is not None:
        fields = {"num_layers", "num_single_layers"} & network.on_meta().config.keys()
        network = replace(network, config={**network.config, **dict.fromkeys(fields, asked.blocks)})
    if asked.layers is not None:
        encoder = parts["text_encoder"]
        depth = next(field for field in ("num_layers", "num_hidden_layers") if field in encoder.config)
        parts["text_encoder"] = replace(encoder, config={**encoder.config, depth: asked.layers})
    return network, parts


def make(network: Published, parts: Mapping[str, Part], out: Path) -> None:
    """The artifact `out`, and a tiny one of its family beside it."""
    from models import registry, synthetic

    source = out.with_name(f"{out.name}-full")
    synthetic.write_full(network, parts, source, _untold)
    _compressed(network.family, source, out)
    registry.family(network.family).tiny(source)
    _compressed(network.family, source, small(out))


def _compressed(name: str, source: Path, out: Path) -> None:
    from models import registry, stream
    from quant_runtime.attention import AttentionPlan
    from quant_runtime.formats import W4A8
    from quant_runtime.methods import Rtn

    family: Any = registry.family(name)
    recipe = (Rtn(), W4A8, AttentionPlan())
    stream.compress(family, source, *recipe, out, base="synthetic", device="cpu", on_bytes=_untold)
    shutil.rmtree(source)


def _untold(done: int, of: int) -> None:
    pass


def small(out: Path) -> Path:
    return out.with_name(f"{out.name}-tiny")


def opened(folder: Path, way: str, device: str) -> Loaded:
    """The artifact on the device, in this process, which has loaded a tiny one before."""
    from models import load as loading
    from models import precision
    from quant_runtime.kernels._cpu import keep_freed_memory

    keep_freed_memory()
    its = {"return_value": False} if way == "float32" else {"wraps": precision.cpu_has_bfloat16}
    with mock.patch.object(precision, "cpu_has_bfloat16", **its):
        model: Any = loading.load(small(folder), device)
        del model
        gc.collect()
        if device != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        before, begun = resident(), time.perf_counter()
        with watched() as seen:
            model = loading.load(folder, device, check=way != "unchecked")
            if device != "cpu":
                torch.cuda.synchronize(device)
        seconds = time.perf_counter() - begun
    gpu = device != "cpu"
    held = (torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)) if gpu else (0, 0)
    assert model.pipe.vae is not None  # all of it is still held
    usage = resource.getrusage(resource.RUSAGE_SELF)
    most = max(usage.ru_maxrss * 1024, *seen)  # Linux's own peak is counted later than pages are, by some a processor
    return Loaded(seconds, usage.ru_utime + usage.ru_stime, before, max(seen), most, *held)


def resident() -> int:
    """Bytes of the host that this process holds now, pages of mapped files among them."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@contextmanager
def watched() -> Iterator[list[int]]:
    """What `resident` is inside, again and again: reading and hashing leave the interpreter to another thread."""
    seen, ended = [resident()], threading.Event()

    def watch() -> None:
        while not ended.wait(WATCHED_EVERY):
            seen[0] = max(seen[0], resident())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()
        seen.append(resident())


def main() -> None:
    parser = ArgumentParser(prog="python -m service.bench_whole", description="Opening a whole artifact of true size.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    measured = kinds.add_parser("whole")
    measured.add_argument("network", help="by its name in models/published.py: hunyuan-video, wan-2.1-1.3b ...")
    measured.add_argument("--scratch", type=Path, required=True, help="has room for it in 16 bits and for its artifact")
    measured.add_argument("--blocks", type=int, help="of the network, of each kind that it has, where not all")
    measured.add_argument("--layers", type=int, help="of the text encoder, where not all")
    measured.add_argument("--device", default="cpu", help="cpu or cuda")
    measured.add_argument("--out", type=Path, default=Path("docs/results"))
    one = kinds.add_parser("open", help="no measurement: the process that is watched")
    one.add_argument("folder", type=Path, metavar="ARTIFACT")
    one.add_argument("way", choices=WAYS)
    one.add_argument("--device", default="cpu")
    chosen = parser.parse_args()
    if chosen.kind == "open":
        print(json.dumps(asdict(opened(chosen.folder, chosen.way, chosen.device))))
        return
    asked = Asked(chosen.scratch, chosen.device, chosen.blocks, chosen.layers)
    device = torch.device(chosen.device)
    path = chosen.out / f"whole-{chosen.network}-{device.type}.jsonl"
    report.write(path, "whole", told(rows(chosen.network, asked)), ["lowbit", "bench", *sys.argv[1:]], device)
    print(path)


if __name__ == "__main__":
    main()
