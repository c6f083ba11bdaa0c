"""POST /generate/video."""

from __future__ import annotations

import uuid

from fastapi import APIRouter, Response

from service import metrics
from service.api.accept import accept_video, fingerprint
from service.api.deps import IdempotencyKey, TheService
from service.api.problems import responses
from service.jobs import Job, VideoRequest
from service.queue.client import Idempotency

PATH = "/generate/video"
REFUSALS = (
    "malformed-body",
    "idempotency-conflict",
    "body-too-large",
    "unsupported-media-type",
    "queue-full",
    "no-artifact",
    "queue-unavailable",
)
router = APIRouter(tags=["generate"])


@router.post(PATH, status_code=202, responses=responses(*REFUSALS))
async def generate_video(request: VideoRequest, response: Response, key: IdempotencyKey, service: TheService) -> Job:
    """Queue a video. The answer is the job; its `Location` is where to follow it."""
    task = accept_video(request, await service.catalog.choose("video", request.artifact))
    idempotency = Idempotency(key, fingerprint(PATH, request)) if key else None
    submission = await service.queue.enqueue(uuid.uuid4().hex, "video", task, idempotency)
    if submission.created:
        metrics.jobs_submitted.labels("video", task.artifact).inc()
    response.headers["Location"] = f"/jobs/{submission.job.id}"
    return submission.job
