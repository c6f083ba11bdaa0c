"""What an endpoint can ask for in its signature."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Header, Path, Request

from service.api.catalog import Catalog
from service.api.fetch import Fetcher
from service.api.problems import ProblemError
from service.jobs import JOB_ID, Job
from service.queue.client import Queue
from service.queue.follow import Followers
from service.results import Results
from service.settings import Settings

FORMS_AT_ONCE = 4  # whose files are being looked at: each holds a thread and an open image


@dataclass(frozen=True)
class Service:
    settings: Settings
    queue: Queue
    results: Results
    catalog: Catalog
    followers: Followers
    fetcher: Fetcher
    looking: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(FORMS_AT_ONCE))


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def _job(service: TheService, job_id: Annotated[str, Path(description="32 hexadecimal digits")]) -> Job:
    if not re.fullmatch(JOB_ID, job_id):
        raise ProblemError(
            "job-not-found", f"{job_id!a} is no job id: those have 32 hexadecimal digits", field="job_id"
        )
    job = await service.queue.get(job_id)
    if job is None:
        raise ProblemError("job-not-found", f"there is no job {job_id}, or it ended too long ago", field="job_id")
    return job


async def _idempotency_key(
    idempotency_key: Annotated[
        str | None,
        Header(
            description="1 to 255 visible characters: the same key and request are the same job",
            pattern=r"^[!-~]{1,255}$",
        ),
    ] = None,
) -> str | None:
    return idempotency_key


TheService = Annotated[Service, Depends(_service)]
TheJob = Annotated[Job, Depends(_job)]
IdempotencyKey = Annotated[str | None, Depends(_idempotency_key)]
