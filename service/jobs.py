"""The words that API, queue and worker share: what is asked for, what a job is, and what came of it.

A *request* is what a caller sent, with fields left out. A *task* is a request that an artifact accepted: every field
has its value, the seed is drawn, uploads lie in the results store. A *job* is a task with an id and a state.
"""

from __future__ import annotations

import re
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Kind = Literal["video", "scene"]
JOB_ID = r"^[0-9a-f]{32}$"
FILE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
ARTIFACT_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
MAX_SEED = 2**53 - 1  # the largest integer that every JSON reader keeps exactly
PROBLEM = "urn:lowbit:problem:"
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def _plain(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("holds half of a surrogate pair, which is no character") from error
    if _CONTROL.search(text):
        raise ValueError("holds control characters; line breaks and tabs are the only ones taken")
    return text


Text = Annotated[str, AfterValidator(_plain)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
JobId = Annotated[str, Field(pattern=JOB_ID)]
FileName = Annotated[str, Field(pattern=FILE_NAME)]
ArtifactName = Annotated[str, Field(pattern=ARTIFACT_NAME)]
Guidance = Annotated[float, Field(ge=0, le=50, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Whole = Annotated[int, Field(ge=-(2**31), lt=2**31)]  # of any use; what is taken is the artifact's to say
Fps = Annotated[int, Field(ge=1, le=60)]


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


# What a caller asks for


class VideoRequest(_Value):
    """`POST /generate/video`. What is left out takes the artifact's default; a seed left out is drawn."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    prompt: Text
    negative_prompt: Text = ""
    artifact: ArtifactName | None = None
    width: Whole | None = None
    height: Whole | None = None
    frames: Whole | None = None
    fps: Fps | None = None
    steps: Whole | None = None
    guidance: Guidance | None = None
    seed: Seed | None = None
    image: Annotated[
        Text | None,
        Field(
            description="the first frame: a data URI (data:image/png;base64,...), or an http(s) URL to fetch it from"
        ),
    ] = None


class SceneRequest(_Value):
    """`POST /reconstruct/3d`, its plain fields; the files are in `images` or `video` of the same form."""

    artifact: ArtifactName | None = None
    job: JobId | None = None
    max_views: Whole | None = None
    formats: tuple[str, ...] | None = None


# What was accepted


class Upload(_Value):
    """A file in the results store that a job reads."""

    path: str
    type: str
    bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256


class VideoTask(_Value):
    prompt: Text
    negative_prompt: Text
    artifact: ArtifactName
    width: int
    height: int
    frames: int
    fps: Fps
    steps: int
    guidance: Guidance
    seed: Seed
    image: Upload | None = None  # to start from


class SceneTask(_Value):
    """One source: `images`, or a `video` to sample at most `max_views` frames from, perhaps made by `job`."""

    artifact: ArtifactName
    max_views: int
    formats: tuple[str, ...]
    images: tuple[Upload, ...] = ()
    video: Upload | None = None
    job: JobId | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if bool(self.images) == bool(self.video):
            raise ValueError("a scene is made from images or from one video")
        return self


Task = VideoTask | SceneTask


# What became of it


class JobStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"  # waited longer than the queue keeps jobs

    @property
    def ended(self) -> bool:
        return self not in (JobStatus.QUEUED, JobStatus.RUNNING)


class FieldError(_Value):
    field: str
    message: str


class Problem(_Value):
    """RFC 9457. The body of every error answer, and the `error` of a job that failed (there without `status`)."""

    type: Annotated[str, Field(pattern=rf"^{PROBLEM}[a-z-]+$")]
    title: str
    detail: str
    status: int | None = None
    field: str | None = None  # the first field at fault, by the caller's own name for it
    errors: tuple[FieldError, ...] = ()  # all of them


class Reason(StrEnum):
    """Why an attempt failed: the closed set behind a failed job's problem type and the label of its metric."""

    BAD_INPUT = "bad-input"  # these inputs can never work
    MODEL_ERROR = "model-error"  # the model raised; the same inputs would make it raise again
    OUT_OF_MEMORY = "out-of-memory"  # likewise
    NO_ROOM = "no-room"  # too little memory at that moment: others held the rest; tried again
    STALLED = "stalled"  # no step for longer than allowed; tried again
    DEVICE_LOST = "device-lost"  # the GPU or its driver gave up; tried again on a fresh process
    ARTIFACT = "artifact-unusable"  # this worker cannot load it, and offers it no more; tried again on another
    STORAGE = "storage"  # inputs or results could not be moved; tried again
    WORKER_LOST = "worker-lost"  # the worker stopped renewing its lease; tried again

    @property
    def passing(self) -> bool:
        """Whether another attempt may fare better."""
        return self not in (Reason.BAD_INPUT, Reason.MODEL_ERROR, Reason.OUT_OF_MEMORY)


def failure(reason: Reason, detail: str, field: str | None = None) -> Problem:
    return Problem(type=PROBLEM + reason, title=reason.replace("-", " ").capitalize(), detail=detail, field=field)


class Result(_Value):
    """One finished file of a job."""

    name: FileName
    type: str
    bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256
    url: str  # of the download, relative to the API


class Progress(_Value):
    step: Annotated[int, Field(ge=0)]
    of: Annotated[int, Field(ge=1)]


class Job(_Value):
    """A job as every answer shows it. Times are the queue server's; `started_at`, `progress`: the last attempt's."""

    id: JobId
    kind: Kind
    status: JobStatus
    artifact: ArtifactName
    request: VideoTask | SceneTask
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    attempt: Annotated[int, Field(ge=0)] = 0  # 0 until a worker took it
    progress: Progress | None = None
    kernels: dict[str, str] = {}  # of the attempt that succeeded: what its worker ran it by, in words
    position: int | None = None  # jobs for the same artifact that go before this one; while queued
    results: tuple[Result, ...] = ()
    error: Problem | None = None


def result_url(job: str, name: str) -> str:
    return f"/jobs/{job}/result/{name}"


# What can be asked of whom


class VideoLimits(_Value):
    """`models.base.VideoLimits`, as it arrives from a manifest: what is taken, and what a field left out takes."""

    size_multiple: Annotated[int, Field(ge=1)]
    max_pixels: Annotated[int, Field(ge=1)]
    max_side: Annotated[int, Field(ge=1)]
    max_frames: Annotated[int, Field(ge=1)]
    frames_step: Annotated[int, Field(ge=1)] = 4
    max_steps: Annotated[int, Field(ge=1)] = 100
    max_prompt: Annotated[int, Field(ge=1)] = 2000
    width: int = 320
    height: int = 192
    frames: int = 33
    fps: Fps = 16
    steps: int = 20
    guidance: Guidance = 5.0
    image: Literal["none", "optional", "required"] = "none"

    @model_validator(mode="after")
    def _defaults_fit(self) -> Self:
        sides = [self.width, self.height]
        fit = all(side % self.size_multiple == 0 and 0 < side <= self.max_side for side in sides)
        fit = fit and self.width * self.height <= self.max_pixels and 0 < self.steps <= self.max_steps
        if not fit or not 0 < self.frames <= self.max_frames or (self.frames - 1) % self.frames_step:
            asked = f"{self.width} × {self.height}, {self.frames} frames, {self.steps} steps"
            raise ValueError(f"an artifact's defaults are outside its own limits: {asked}")
        return self


class SceneLimits(_Value):
    """`models.base.SceneLimits`, as it arrives from a manifest."""

    min_views: Annotated[int, Field(ge=1)] = 1
    max_views: Annotated[int, Field(ge=1)] = 8
    formats: Annotated[tuple[str, ...], Field(min_length=1)] = ("glb", "ply", "cameras", "depth")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_views > self.max_views:
            raise ValueError(f"min_views must be at most max_views, got {self.min_views} and {self.max_views}")
        return self


class SelfTest(_Value):
    """What a worker's self-test found of an artifact's kernels on its device."""

    verdict: Literal["passed", "fallback", "refused"]  # refused: this worker takes no jobs for the artifact
    device: str
    versions: dict[str, str] = {}  # which version each op runs by: {"linear_w8a8": "Triton", ...}
    failures: dict[str, str] = {}  # why an op does not run by its own version, or may not run at all
    seconds: float
    compile_seconds: float = 0.0  # of these, what compiling kernels took
    cache: str = "unused"  # how the cache of compiled kernels was found: cold, warm, in part; unused on a CPU


class ArtifactInfo(_Value):
    """What the API knows of an artifact, from its manifest or from the workers that hold it."""

    name: ArtifactName
    kind: Kind
    family: str
    method: str | None = None
    bits: str | None = None  # W4A8
    density: Annotated[float, Field(gt=0, le=1)] | None = None  # kept fraction of key blocks; none is dense
    bytes: Annotated[int, Field(ge=0)]  # of all its files
    limits: VideoLimits | SceneLimits
    cache_bytes: Annotated[int, Field(ge=0)] | None = 0  # beside the weights, at the default size; none: not measured
    quality: dict[str, Any] = {}  # against full precision, as measured when it was made
    kernels: dict[
        str, str
    ] = {}  # what the worker's machine picked: {"int8": "onednn", ...}; empty until one has loaded it
    workers: Annotated[int, Field(ge=0)] = 0  # alive and able to run it
    tested: dict[str, SelfTest] = {}  # by the name of each living worker that has tested its kernels

    @model_validator(mode="after")
    def _limits_of_its_kind(self) -> Self:
        if isinstance(self.limits, VideoLimits) != (self.kind == "video"):
            raise ValueError(f"limits are not those of a {self.kind} artifact: {sorted(self.limits.model_fields_set)}")
        return self
