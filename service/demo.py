"""`lowbit demo`: both demo models compressed, served, asked over HTTP, and held against themselves in full precision.

Nothing here is a short cut: artifacts are made by `lowbit quantize`, `lowbit serve` answers on a free port with a queue
of its own, the jobs go through both, and what is shown came back over HTTP.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from models import video_files
from models.demo.scene import pictures
from quant_runtime import report as measured
from service import child
from service.offline import REFRESHES
from service.settings import PREFIX

PROMPT = "a cyan star moves right over coffee, static camera"
SEED = 3
VIEWS = 6
SCENE_INDEX = 3  # of the held-out scenes
READY_SECONDS = 120
CLI = "service.cli"
MADE = ("video.mp4", "video.png", "scene.glb", "scene.png", "report.json", "serve.log")
FULL = ("--method", "none", "--bits", "w16a16", "--judging-samples", "0")


@dataclass(frozen=True)
class Side:
    """One of two artifacts of one demo model."""

    name: str
    source: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """A demo model in full precision and compressed."""

    kind: str
    full: Side
    compressed: Side
    quality: str  # the manifest's name for what is compared
    file: str  # of the weights that are compressed
    results: tuple[str, ...]  # files of a job that are downloaded


VIDEO = Comparison(
    kind="video",
    full=Side("demo-video", "demo-video", FULL),
    compressed=Side(
        "demo-video-w8a8",
        "demo-video",
        ("--method", "rtn", "--bits", "w8a8", "--sparsity", "topk:0.25", "--warmup", "0.3", "--dense-qk-bits", "8",
         "--calibration-samples", "1", "--judging-samples", "1"),
    ),
    quality="psnr",
    file="transformer/diffusion_pytorch_model.safetensors",
    results=("video.mp4", "run.json"),
)  # fmt: skip
SCENE = Comparison(
    kind="scene",
    full=Side("demo-scene", "demo-scene", FULL),
    compressed=Side(
        "demo-scene-w4a8",
        "demo-scene",
        ("--method", "smoothquant", "--bits", "w4a8", "--dense-qk-bits", "8",
         "--calibration-samples", "4", "--judging-samples", "8"),
    ),
    quality="auc30",
    file="model.safetensors",
    results=("scene.glb", "scene.ply", "scene.png", "cameras.json", "run.json"),
)  # fmt: skip


@dataclass(frozen=True)
class Ran:
    """What came back of one job."""

    folder: Path
    record: dict[str, Any] = field(repr=False)  # its run.json


def run(out: Path, artifacts: Path, results: Path | None = None) -> None:
    """Leaves video.mp4, video.png, scene.glb, scene.png and report.json in `out`, and says what they show.

    The report is also written as rows into `results`, where that is given (quant_runtime/report.py).
    """
    console = Console()
    begun = time.monotonic()
    peak = Peak()
    _cleared(out)
    for comparison in (VIDEO, SCENE):
        for side in (comparison.full, comparison.compressed):
            console.rule(f"lowbit quantize {side.source} → {side.name}", align="left", style="dim")
            _lowbit("quantize", side.source, "--out", str(artifacts / side.name), "--replace", *side.options)

    console.rule("lowbit serve", align="left", style="dim")
    ran: dict[str, Ran] = {}
    images = pictures.write(out / "views", VIEWS, index=SCENE_INDEX)
    sides = {side.name: one for one in (VIDEO, SCENE) for side in (one.full, one.compressed)}
    with (
        served(artifacts, out / "serve.log") as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
        _told(out / "serve.log"),
    ):
        console.print(f"the API answers at {server.url}; a worker takes the jobs from its queue")
        with _bars(console) as progress:
            for name, comparison in sides.items():
                job = _submitted(client, comparison.kind, name, images)
                ran[name] = _finished(client, job, comparison, out / "jobs" / name, progress)
        offered = {one["name"]: one for one in client.get("/artifacts").raise_for_status().json()}

    report = {one.kind: _compared(one, artifacts, ran, offered) for one in (VIDEO, SCENE)}
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    _show_video(ran, report["video"], out)
    for name in ("scene.glb", "scene.png"):
        shutil.copyfile(ran[SCENE.compressed.name].folder / name, out / name)
    shutil.copyfile(ran[VIDEO.compressed.name].folder / "video.mp4", out / "video.mp4")
    console.print(table(report))
    console.print(f"compressed layers run as {report['video']['compressed']['kernels']['linear']}")
    seconds, most = time.monotonic() - begun, peak.stop()
    console.print(f"{out}: video.mp4, video.png, scene.glb, scene.png, report.json")
    console.print(f"{seconds:.0f} s, and {most / 2**30:.1f} GiB of memory at most")
    if results is not None:
        rows = _rows(report, seconds, most)
        measured.write(results, "demo", rows, ["lowbit", "demo", "--results", str(results)], torch.device("cpu"))


class Peak:
    """The most memory that this process and all its children have held at once, in bytes, looked at every half second.

    What several share counts once (PSS); 0 where the kernel does not tell.
    """

    def __init__(self) -> None:
        self._most, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        self._look()
        return self._most

    def _watch(self) -> None:
        while not self._done.wait(0.5):
            self._look()

    def _look(self) -> None:
        self._most = max(self._most, sum(map(_held, _family(os.getpid()))))


def _family(pid: int) -> list[int]:
    found = [pid]
    with suppress(OSError):  # a process that has ended by now
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in (thread / "children").read_text().split():
                found += _family(int(child))
    return found


def _held(pid: int) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def _rows(report: dict[str, Any], seconds: float, most: int) -> Iterator[dict[str, Any]]:
    yield measured.row("the whole demo", "wall clock", seconds, "s", "lower", samples=1)
    yield measured.row("the whole demo", "peak memory", most / 2**30, "GiB", "lower", samples=1)
    for kind, half in report.items():
        full, small = half["full"], half["compressed"]
        quality = "psnr" if kind == "video" else "auc30"
        for metric, unit in (("bytes", "bytes"), ("seconds", "s")):
            yield measured.row(
                small["artifact"], metric, small[metric], unit, "lower", samples=1,
                baseline=(full["artifact"], full[metric]), error={quality: measured.rounded(small[quality])},
            )  # fmt: skip


def _cleared(out: Path) -> None:
    """An empty place for what the demo makes. A folder that holds anything else than an earlier demo is refused."""
    if out.is_dir() and any(out.iterdir()) and not (out / "serve.log").is_file():
        raise ValueError(f"{out} holds something that is not the demo's: name another folder with --out")
    for name in MADE:
        (out / name).unlink(missing_ok=True)
    for name in ("views", "jobs"):
        shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / "serve.log").touch()


def _lowbit(*words: str) -> None:
    done = subprocess.run(child.command(CLI, *words), env=_environment(), check=False)
    if done.returncode:
        raise ValueError(f"lowbit {' '.join(words)} ended with {done.returncode}")


def _environment() -> dict[str, str]:
    """Settings of the user's own service are not the demo's."""
    return {name: value for name, value in child.environment().items() if not name.upper().startswith(PREFIX)}


@contextmanager
def _told(log: Path) -> Iterator[None]:
    """A connection that breaks is told with the place that says why."""
    try:
        yield
    except httpx.HTTPError as error:
        raise ValueError(f"the service did not answer as it should: {error}; see {log}") from error


@dataclass(frozen=True)
class Served:
    """A running `lowbit serve`."""

    url: str
    pid: int
    data: Path


@contextmanager
def served(artifacts: Path, log: Path, settings: dict[str, str] | None = None) -> Iterator[Served]:
    """A `lowbit serve` that is ready, and that ends with the block. What it logs goes into `log`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="lowbit-demo-") as data, log.open("wb") as written:
        words = ("serve", "--port", str(port), "--data", data, "--artifacts", str(artifacts))
        environment = _environment() | (settings or {})
        process = subprocess.Popen(child.command(CLI, *words), env=environment, stdout=written, stderr=written)
        try:
            url = f"http://127.0.0.1:{port}"
            _ready(url, process, log)
            yield Served(url, process.pid, Path(data))
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def _ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the API answers and a worker has published the artifacts."""
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ValueError(f"lowbit serve ended with {process.returncode}; see {log}")
        try:
            offered = httpx.get(f"{url}/artifacts", timeout=5).raise_for_status().json()
            if offered and all(one["workers"] for one in offered):
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise ValueError(f"lowbit serve was not ready within {READY_SECONDS} s; see {log}")


def _submitted(client: httpx.Client, kind: str, artifact: str, images: list[Path]) -> str:
    if kind == "video":
        asked = client.post("/generate/video", json={"prompt": PROMPT, "seed": SEED, "artifact": artifact})
    else:
        files = [("images", (path.name, path.read_bytes(), "image/png")) for path in images]
        asked = client.post("/reconstruct/3d", data={"artifact": artifact}, files=files)
    if asked.is_error:
        raise ValueError(f"the API refused the job: {asked.text}")
    job: str = asked.json()["id"]
    return job


def _finished(client: httpx.Client, job: str, comparison: Comparison, folder: Path, progress: Progress) -> Ran:
    bar = progress.add_task(folder.name, total=None)
    ended: dict[str, Any] = {}
    with client.stream("GET", f"/jobs/{job}/events", timeout=None) as stream:
        stream.raise_for_status()
        for event, data in events(stream.iter_lines()):
            if event == "progress":
                progress.update(bar, completed=data["step"], total=data["of"])
            if event == "done":
                ended = data
                break
    if ended.get("status") != "succeeded":
        raise ValueError(f"job {job} for {folder.name} ended {ended.get('status')}: {ended.get('error')}")
    folder.mkdir(parents=True)
    for name in comparison.results:
        answer = client.get(f"/jobs/{job}/result/{name}").raise_for_status()
        (folder / name).write_bytes(answer.content)
    return Ran(folder, json.loads((folder / "run.json").read_text()))


def events(lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Server-sent events, as far as this API uses them: an event has one line of data."""
    event = ""
    for line in lines:
        name, _, value = line.partition(": ")
        if name == "event":
            event = value
        elif name == "data":
            yield event, json.loads(value)


def _bars(console: Console) -> Progress:
    columns = (TextColumn("{task.description:20}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"))
    return Progress(*columns, TimeElapsedColumn(), console=console, refresh_per_second=REFRESHES)


def _compared(
    comparison: Comparison, artifacts: Path, ran: dict[str, Ran], offered: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """One half of report.json. Sizes in bytes; seconds are the worker's, from inputs to files."""
    quality = offered[comparison.compressed.name]["quality"]
    sides = {}
    for label, side in (("full", comparison.full), ("compressed", comparison.compressed)):
        reference = label == "full"
        name = f"{comparison.quality}_full" if reference else comparison.quality
        sides[label] = {
            "artifact": side.name,
            "bytes": (artifacts / side.name / comparison.file).stat().st_size,
            "bytes_all_files": offered[side.name]["bytes"],
            "seconds": ran[side.name].record["seconds"]["total"],
            "seconds_by_stage": ran[side.name].record["seconds"],
            comparison.quality: quality.get(name),
            "kernels": ran[side.name].record["kernels"],
            "effective_density": ran[side.name].record["attention"]["effective_density"],
        }
    ratio = {what: round(sides["full"][what] / sides["compressed"][what], 3) for what in ("bytes", "seconds")}
    return sides | {"ratio": ratio}


def table(report: dict[str, Any]) -> Table:
    """The report on one screen."""
    shown = Table(title="compressed against full precision", title_justify="left")
    for column in ("", "network", "all files", "seconds", "quality"):
        shown.add_column(column, justify="left" if column in ("", "quality") else "right")
    for kind, half in report.items():
        for label in ("full", "compressed"):
            side = half[label]
            shown.add_row(
                f"{kind}, {'full precision' if label == 'full' else 'compressed'}",
                f"{side['bytes'] / 1e6:.2f} MB",
                f"{side['bytes_all_files'] / 1e6:.2f} MB",
                f"{side['seconds']:.1f}",
                _quality(side),
            )
        ratio = half["ratio"]
        speed = f"{ratio['seconds']:.2f}× faster" if ratio["seconds"] >= 1 else f"{1 / ratio['seconds']:.2f}× slower"
        shown.add_row("", f"{ratio['bytes']:.2f}× smaller", "", speed, "", end_section=True)
    return shown


def _quality(side: dict[str, Any]) -> str:
    if "auc30" in side:
        return "" if side["auc30"] is None else f"AUC@30 {side['auc30']:.1f}"
    return "the reference" if side["psnr"] is None else f"PSNR {side['psnr']:.1f} dB"


def _show_video(ran: dict[str, Ran], half: dict[str, Any], out: Path) -> None:
    """video.png: frames of both films, full precision above compressed, each under a line that says what it is."""
    rows = []
    for label, side in (("full", VIDEO.full), ("compressed", VIDEO.compressed)):
        facts = half[label]
        said = "full precision" if label == "full" else f"compressed, {side.name}"
        said += f": network {facts['bytes'] / 1e6:.1f} MB, {facts['seconds']:.1f} s"
        film = video_files.read_mp4(ran[side.name].folder / "video.mp4")
        rows.append(_titled(video_files.contact_sheet([film]), said))
    sheet = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    sheet.save(out / "video.png")


def _titled(picture: Image.Image, title: str, height: int = 40) -> Image.Image:
    sheet = Image.new("RGB", (picture.width, picture.height + height), "white")
    sheet.paste(picture, (0, height))
    ImageDraw.Draw(sheet).text((8, 8), title, fill="black", font=ImageFont.load_default(size=22))
    return sheet
