"""A job becomes a call of its generator, on the one thread that ever touches the models, and files become results.

The generator that ran last stays loaded. A generator may have an attribute `kernels`, a dict of what it picked on this
machine ({"int8": "onednn"}); it is published with the artifact.
"""

from __future__ import annotations

import asyncio
import gc
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol, TypeVar

import structlog

from models.base import BadInput, Generator, NoRoom, OutputFile, Outputs, SceneInputs, VideoInputs
from service import metrics
from service.artifacts import Found
from service.jobs import (
    FILE_NAME,
    ArtifactInfo,
    Job,
    Kind,
    Problem,
    Progress,
    Reason,
    Result,
    SceneLimits,
    SceneTask,
    SelfTest,
    Upload,
    VideoTask,
    failure,
    result_url,
)
from service.results import MissingError, Results, StorageError, result_path
from service.settings import Settings
from service.worker.inputs import decode_image, sample_video
from service.worker.machine import device_of

TESTS = 6  # of the kernels at a start, where memory is short: after pauses that double; whoever leaves it needs a while
LONGEST_DETAIL = 500  # characters of an exception that a caller is shown

_log = structlog.get_logger()
T = TypeVar("T")


class Load(Protocol):
    """models.load.load: an artifact's folder becomes a generator on `device`."""

    def __call__(self, path: Path, device: str) -> Generator: ...


class Test(Protocol):
    """machine.test: the kernels that an artifact runs by on `device`, against their references.

    With `fallback` the next version takes the place of one that is wrong, from then on in this process.
    """

    def __call__(self, path: Path, device: str, fallback: bool) -> SelfTest: ...


class StoppedError(Exception):
    """Raised into the model at a step boundary, because nobody wants this attempt's result any more."""


class ArtifactError(Exception):
    """An artifact that cannot be loaded here: damaged, too large, of an unknown family."""


@dataclass
class Watch:
    """What the model's thread and the worker's loop tell each other about one attempt."""

    kind: Kind
    artifact: str
    progress: Progress | None = None
    moved: float = field(default_factory=time.monotonic)  # when it last showed a sign of life
    stop: bool = False

    def on_step(self, step: int, of: int) -> None:
        """Called by the generator on its thread."""
        now = time.monotonic()
        if self.kind == "video" and self.progress is not None and step == self.progress.step + 1:
            metrics.denoise_step_seconds.labels(self.artifact).observe(now - self.moved)
        self.progress = Progress(step=step, of=of)
        self.alive()
        if self.stop:
            raise StoppedError

    def alive(self) -> None:
        self.moved = time.monotonic()


class Runner:
    """The artifacts of this worker, and the one generator of theirs that is loaded. Raises what `explain` explains."""

    def __init__(self, found: Sequence[Found], load: Load, test: Test, settings: Settings, results: Results) -> None:
        self._folders = {one.info.name: one.folder for one in found}
        self.infos: dict[str, ArtifactInfo] = {one.info.name: one.info for one in found}
        self.tested: dict[str, SelfTest] = {}  # by the artifacts' names, once `test` was called
        self.testing = ""  # name of the artifact in its self-test
        self.moved = time.monotonic()  # when that began
        self.hot = ""  # name of the loaded artifact
        self._generator: Generator | None = None
        self._load, self._test = load, test
        self._settings = settings
        self._results = results
        self._thread = ModelThread()

    @property
    def offered(self) -> list[str]:
        """Names of the artifacts that it takes jobs for: all but those whose self-test refused them."""
        tested = self.tested
        return [name for name in self.infos if name not in tested or tested[name].verdict != "refused"]

    async def test(self) -> None:
        """The self-test of every artifact, if the settings want it. An artifact that cannot be tested is refused.

        Running out of memory says nothing of the kernels: then all are tested again, TESTS times in all, as a worker
        that leaves this device may hold it still.
        """
        if self._settings.selftest == "off":
            return
        pause = self._settings.backoff_seconds
        for again in reversed(range(TESTS)):
            self.testing, self.moved = "", time.monotonic()
            self.tested = await self._thread.call(self._tests)
            short = sorted(name for name, one in self.tested.items() if _ran_out_of_memory(one))
            if not short or not again:
                return
            pause = min(pause, self._settings.backoff_max_seconds)
            metrics.in_state("short-of-memory")
            _log.warning("selftest_out_of_memory", artifacts=short, seconds=pause, tests_left=again)
            self.moved = time.monotonic() + pause
            await asyncio.sleep(pause)
            metrics.in_state("starting")
            pause *= 2

    async def run(self, job: Job, watch: Watch) -> list[Result]:
        """Fetch the inputs, run the model, store the files under this attempt."""
        with TemporaryDirectory(prefix="lowbit-") as name:
            folder = Path(name)
            (folder / "in").mkdir()
            (folder / "out").mkdir()
            with _stage("fetch", watch):
                inputs = await self._inputs(job, folder / "in")
            if self.hot != job.artifact:
                with _stage("load", watch):
                    await self._thread.call(lambda: self._switch(job.artifact))
            with _stage("run", watch):
                outputs = await self._thread.call(lambda: self._generate(inputs, folder / "out", watch))
            if outputs.cached:
                for place in ("device", "host"):
                    metrics.cache_bytes.labels(job.artifact, place).set(outputs.cached.get(place, 0))
                _log.info("residual_cached", job=job.id, artifact=job.artifact, **outputs.cached)
            with _stage("upload", watch):
                return [await self._store(job, file, watch) for file in _checked(outputs.files)]

    async def unload(self) -> None:
        """The next job loads its generator afresh."""
        await self._thread.call(self._unload)

    def withdraw(self, name: str) -> None:
        """This worker no longer offers an artifact that it could not load."""
        del self.infos[name]
        self.tested.pop(name, None)

    def _tests(self) -> dict[str, SelfTest]:
        """Again where one artifact's test has changed by what version an op runs, which another's had found right."""
        while True:
            tested = {name: self._tested(name, folder) for name, folder in self._folders.items()}
            versions = {pair for one in tested.values() for pair in one.versions.items()}
            if len(versions) == len(dict(versions)):
                return tested

    def _tested(self, name: str, folder: Path) -> SelfTest:
        self.testing, self.moved = name, time.monotonic()
        device, begun = device_of(self._settings), self.moved
        try:
            return self._test(folder, device, self._settings.selftest == "fallback")
        except Exception as error:
            why = f"{type(error).__name__}: {error}"[:LONGEST_DETAIL]
            seconds = round(time.monotonic() - begun, 3)
            return SelfTest(verdict="refused", device=device, failures={"artifact": why}, seconds=seconds)

    def _unload(self) -> None:
        if self._generator is not None:
            self.hot, self._generator = "", None
            metrics.cache_bytes.clear()  # which are of what is loaded
            gc.collect()  # modules hold each other in circles: only this frees them now

    async def _inputs(self, job: Job, folder: Path) -> VideoInputs | SceneInputs:
        match job.request:
            case VideoTask() as task:
                image = await self._decoded(task.image, folder / "image", "image", "the image") if task.image else None
                return VideoInputs(**task.model_dump(exclude={"artifact", "image"}), image=image)
            case SceneTask() as task:
                images = await self._views(task, folder)
                metrics.recon_frames.labels(job.artifact).observe(len(images))
                return SceneInputs(images=images, formats=task.formats)

    async def _views(self, task: SceneTask, folder: Path) -> tuple[Path, ...]:
        if task.video is None:
            numbered = enumerate(task.images)
            views = [await self._decoded(one, folder / f"{i:03d}", "images", f"image {i + 1}") for i, one in numbered]
            return tuple(views)
        raw = folder / "video.raw"
        try:
            await self._results.fetch(task.video.path, raw, task.video.sha256)
        except MissingError as error:
            if task.job is None:
                raise
            raise BadInput("job", f"the video of job {task.job} is no longer kept") from error
        kind, most = task.video.type, task.max_views
        paths = await asyncio.to_thread(sample_video, raw, kind, folder, most, self._settings)
        limits = self.infos[task.artifact].limits
        assert isinstance(limits, SceneLimits)
        if len(paths) < limits.min_views:
            raise BadInput("video", f"has {len(paths)} frames; at least {limits.min_views} are needed")
        return paths

    async def _decoded(self, upload: Upload, stem: Path, field: str, name: str) -> Path:
        raw, path = stem.with_suffix(".raw"), stem.with_suffix(".png")
        await self._results.fetch(upload.path, raw, upload.sha256)
        await asyncio.to_thread(decode_image, raw, path, self._settings.max_image_pixels, field, name)
        return path

    def _switch(self, name: str) -> None:
        self._unload()  # before the next one is loaded: both may not fit
        begun = time.monotonic()
        try:
            generator = self._load(self._folders[name], device_of(self._settings))
        except Exception as error:
            raise ArtifactError(f"{name}: {type(error).__name__}: {error}") from error
        if generator.kind != self.infos[name].kind:
            raise ArtifactError(f"{name} is published as {self.infos[name].kind} and loads as {generator.kind}")
        kernels = getattr(generator, "kernels", {})
        self.infos[name] = self.infos[name].model_copy(update={"kernels": dict(kernels)})
        self._generator, self.hot = generator, name
        metrics.artifact_load_seconds.labels(name).set(time.monotonic() - begun)

    def _generate(self, inputs: VideoInputs | SceneInputs, folder: Path, watch: Watch) -> Outputs:
        assert self._generator is not None
        try:
            return self._generator.run(inputs, folder, watch.on_step)
        except Exception:
            if watch.stop:  # whatever a model makes of being stopped
                raise StoppedError from None
            raise

    async def _store(self, job: Job, file: OutputFile, watch: Watch) -> Result:
        stored = await self._results.put(result_path(job.id, job.attempt, file.name), file.path)
        watch.alive()
        url = result_url(job.id, file.name)
        return Result(name=file.name, type=file.media_type, bytes=stored.bytes, sha256=stored.sha256, url=url)


class ModelThread:
    """One thread that does what it is told, in order: torch and CUDA keep state per thread.

    A daemon: a model that hangs for ever does not keep the process from ending.
    """

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="model", daemon=True).start()

    async def call(self, work: Callable[[], T]) -> T:
        """Runs `work` on the thread. It cannot be cancelled: whoever waits no longer leaves it running."""
        done: Future[T] = Future()

        def step() -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

        self._work.put(step)
        return await asyncio.wrap_future(done)

    def _run(self) -> None:
        while True:
            self._work.get()()


@contextmanager
def _stage(name: str, watch: Watch) -> Iterator[None]:
    """Times one stage, and shows its start as a sign of life."""
    watch.alive()
    with metrics.stage_seconds.labels(name, watch.artifact).time():
        yield


def _ran_out_of_memory(tested: SelfTest) -> bool:
    whys = tested.failures.values() if tested.verdict == "refused" else ()
    return any(why.startswith(("OutOfMemoryError:", "MemoryError:")) for why in whys)  # by the exceptions' names


def _checked(files: tuple[OutputFile, ...]) -> tuple[OutputFile, ...]:
    names = [file.name for file in files]
    bad = [name for name in names if not re.fullmatch(FILE_NAME, name)]
    if not files or bad or len(set(names)) < len(names):
        raise ValueError(f"a generator must give one or more files with plain, different names; got {names}")
    return files


def explain(error: Exception) -> Problem:
    """Why an attempt failed, in the closed set of reasons."""
    detail = f"{type(error).__name__}: {error}"[:LONGEST_DETAIL]
    match error:
        case BadInput():
            return failure(Reason.BAD_INPUT, str(error)[:LONGEST_DETAIL], error.field)
        case NoRoom():
            return failure(Reason.NO_ROOM, str(error)[:LONGEST_DETAIL])
        case StorageError() | MissingError():
            return failure(Reason.STORAGE, detail)
        case ArtifactError():
            return failure(Reason.ARTIFACT, str(error)[:LONGEST_DETAIL])
        case MemoryError():
            return failure(Reason.OUT_OF_MEMORY, detail)
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
        return failure(Reason.OUT_OF_MEMORY, detail)
    if type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error):
        return failure(Reason.DEVICE_LOST, detail)
    return failure(Reason.MODEL_ERROR, detail)


def reason_of(problem: Problem) -> Reason:
    return Reason(problem.type.rsplit(":", 1)[1])
