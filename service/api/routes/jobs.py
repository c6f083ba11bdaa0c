"""Read, list, follow and cancel jobs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel, ConfigDict

from service import metrics
from service.api.deps import Service, TheJob, TheService
from service.api.problems import ProblemError, responses
from service.jobs import Job
from service.queue.client import UnavailableError
from service.queue.follow import RETRY_SECONDS

LAST_EVENT = 2**53 - 1  # no event is numbered higher: the number also goes through Lua and JavaScript

router = APIRouter(tags=["jobs"])


class Page(BaseModel):
    model_config = ConfigDict(extra="forbid")

    jobs: list[Job]
    next: str | None  # the cursor of the following page


class AllSentError(Exception):
    """The job has ended and the caller has all its events: 204, which tells an EventSource not to come again."""


@router.get("/jobs", responses=responses("queue-unavailable"))
async def list_jobs(
    service: TheService,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    cursor: Annotated[str, Query(pattern=r"^[0-9]{0,16}$", description="`next` of the page before")] = "",
) -> Page:
    """Newest first. A cursor stays good: jobs that come later do not move the pages after it."""
    jobs, following = await service.queue.page(cursor, limit)
    return Page(jobs=jobs, next=following or None)


@router.get("/jobs/{job_id}", responses=responses("job-not-found", "queue-unavailable"))
async def read_job(job: TheJob) -> Job:
    return job


@router.delete(
    "/jobs/{job_id}", responses=responses("job-not-found", "job-ended", "queue-unavailable") | {202: {"model": Job}}
)
async def cancel_job(job: TheJob, response: Response, service: TheService) -> Job:
    """200: it is cancelled. 202: it runs, stops at its next step, and will end cancelled."""
    verdict, cancelled = await service.queue.cancel(job.id)
    if cancelled is None:
        raise ProblemError("job-not-found", f"there is no job {job.id}", field="job_id")
    if verdict == "ended":
        raise ProblemError(
            "job-ended", f"job {job.id} has {cancelled.status}: there is nothing to cancel", field="job_id"
        )
    if verdict == "asked":
        response.status_code = 202
    elif verdict == "cancelled":
        metrics.jobs_finished.labels(job.kind, job.artifact, "cancelled").inc()
    return cancelled


async def _after(
    job: TheJob,
    service: TheService,
    last_event_id: Annotated[
        int, Header(ge=0, le=LAST_EVENT, description="only events with a higher number are sent")
    ] = 0,
) -> int:
    if last_event_id and job.status.ended and not await service.queue.events(job.id, last_event_id):
        raise AllSentError
    return last_event_id


@router.get(
    "/jobs/{job_id}/events",
    response_class=EventSourceResponse,
    responses=responses("job-not-found", "queue-unavailable") | {204: {"description": "All was sent"}},
)
async def follow_job(
    job: TheJob, after: Annotated[int, Depends(_after)], service: TheService
) -> AsyncIterable[ServerSentEvent]:
    """Numbered events, replayed after `Last-Event-ID`.

    `status` has {status, attempt}, `progress` {step, of, attempt}, and `done`, the last one, the job.
    """
    with metrics.event_streams.track_inprogress():
        async for event in service.followers.follow(job.id, after):
            data = await _ended(job.id, service) if event.name == "done" else event.data
            yield ServerSentEvent(id=str(event.number), event=event.name, data=data)


async def _ended(job_id: str, service: Service) -> Job | None:
    while True:
        try:
            return await service.queue.get(job_id)
        except UnavailableError:
            await asyncio.sleep(RETRY_SECONDS)
