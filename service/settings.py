"""What may differ between two deployments, read once from the environment (prefix `LOWBIT_`) by the command line."""

from __future__ import annotations

import os
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

PREFIX = "LOWBIT_"
DEVICE = r"auto|cpu|cuda(:\d+)?"

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Priority = Annotated[int, Field(ge=0, le=9)]
Host = Annotated[str, Field(pattern=r"^(\*|(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*|[0-9a-f:.]+)$")]


class StartError(Exception):
    """Why a process cannot start, in words for whoever started it."""


class Settings(BaseSettings):
    """One value for API, queue and worker. Times are seconds, sizes bytes; a wrong value stops the start, by name."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    # Where things are
    redis_url: str | None = None  # redis://, rediss:// or unix://; none starts a private server under `data`
    queue_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,40}$")] = "lowbit"  # two services on one Redis
    data: Path = Path(".lowbit")
    results_url: str | None = None  # file://, s3://, gs://, az://; none is `data`/results
    artifacts: Annotated[tuple[Path, ...], NoDecode] = (
        Path("artifacts"),
    )  # artifacts, or folders of them; split by ':'
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    metrics_host: str = "127.0.0.1"  # of the worker; the API serves /metrics beside its routes
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 8001  # 0 takes any free port and logs it
    device: Annotated[str, Field(pattern=f"^({DEVICE})$")] = "auto"  # auto is cuda where torch sees one, else cpu
    verify: bool = True  # a worker checks an artifact's hashes as it loads it
    selftest: Literal["refuse", "fallback", "off"] = "refuse"  # where a kernel is wrong: no jobs, or the next version
    kernel_cache: Path | None = None  # what Triton compiles; none is TRITON_CACHE_DIR, or else `data`/kernels
    log_level: Annotated[str, Field(pattern=r"^(debug|info|warning|error)$")] = "info"

    # The lease of a running job, and how often a lost or failed one is tried again
    lease_seconds: Seconds = 30
    beat_seconds: Seconds = 10
    stall_seconds: Seconds = 600  # a model that reports no step for so long is hung; loading counts
    drain_seconds: Seconds = 20  # what a running job may still take after SIGTERM before it is given back
    max_attempts: Count = 3
    backoff_seconds: Seconds = 5  # doubled at each attempt
    backoff_max_seconds: Seconds = 300

    # Order and bounds of the queue
    queue_bound: Count = 1000  # jobs waiting; above it a submission is answered 429
    queue_ttl_seconds: Seconds = 24 * 3600  # a job that waited so long ends expired
    affinity_seconds: Annotated[float, Field(ge=0)] = 60  # how long a job may be passed over for a warm model's
    video_priority: Priority = 5
    scene_priority: Priority = 4  # 0 goes first: a scene takes seconds, and would wait behind minutes of video
    job_ttl_seconds: Seconds = 7 * 24 * 3600  # how long an ended job and its files are kept
    idempotency_ttl_seconds: Seconds = 24 * 3600

    # What a request may weigh
    max_json_bytes: Count = 128 * 1024
    max_upload_bytes: Count = 256 * 1024**2  # one multipart body
    max_image_pixels: Count = 40_000_000  # one image, as its header states it
    max_start_image_bytes: Count = 16 * 1024**2  # of a video, whichever way it comes
    max_video_seconds: Seconds = 120
    max_video_pixels: Count = 4096 * 2304  # one frame

    # Start images that are named by URL; lists are split by ','
    fetch_hosts: Annotated[tuple[Host, ...], NoDecode] = ()  # none fetches nothing; *.example.org; * is any
    fetch_ports: Annotated[tuple[Annotated[int, Field(ge=1, le=65535)], ...], NoDecode] = (80, 443)
    fetch_networks: Annotated[tuple[IPv4Network | IPv6Network, ...], NoDecode] = ()  # allowed though not public
    fetch_seconds: Seconds = 10  # for all of it: the lookup, every redirect, the last byte

    @field_validator("artifacts", mode="before")
    @classmethod
    def _paths(cls, value: Any) -> Any:
        return tuple(Path(part) for part in value.split(os.pathsep) if part) if isinstance(value, str) else value

    @field_validator("fetch_hosts", "fetch_ports", "fetch_networks", mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        return tuple(value.lower().replace(",", " ").split()) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _beats_fit_the_lease(self) -> Self:
        if self.beat_seconds > self.lease_seconds / 2:
            raise ValueError(
                f"beat_seconds must be at most half of lease_seconds, or one late beat loses the job; "
                f"got {self.beat_seconds:g} and {self.lease_seconds:g}"
            )
        return self

    @property
    def results_location(self) -> str:
        return self.results_url or (self.data.resolve() / "results").as_uri()


def from_environment(environment: Mapping[str, str] = os.environ, **given: Any) -> Settings:
    """The settings of this process; what is `given` goes before its environment.

    A variable `LOWBIT_X` that is no setting is refused: it is a misspelled one.
    """
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    unknown = sorted(name for name in environment if name.upper().startswith(PREFIX) and name.upper() not in known)
    if unknown:
        raise ValueError(f"unknown settings {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return Settings(**given)


def to_environment(settings: Settings) -> dict[str, str]:
    """The variables that give another process the same settings."""
    values = settings.model_dump(exclude_none=True)
    split_by = {"artifacts": os.pathsep}
    texts = {
        name: split_by.get(name, ",").join(map(str, value)) if isinstance(value, tuple) else str(value)
        for name, value in values.items()
    }
    return {PREFIX + name.upper(): text for name, text in texts.items()}
