"""POST /reconstruct/3d."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile

from service import metrics
from service.api.accept import accept_scene, fingerprint
from service.api.deps import IdempotencyKey, Service, TheService
from service.api.problems import field_errors, invalid, responses
from service.api.routes.generate import REFUSALS
from service.api.uploads import SUFFIX, RefusedError, image_type, video_type
from service.jobs import FieldError, Job, JobStatus, SceneRequest, SceneTask, Upload
from service.queue.client import Idempotency
from service.results import digest, result_path, upload_path

PATH = "/reconstruct/3d"
MOST_FILES = 512  # of one form; the artifact's own limit is far below
MOST_FIELDS = 64
MOST_FIELD_BYTES = 4096

_file = {"type": "string", "contentMediaType": "application/octet-stream"}
_FORM = {
    "type": "object",
    "additionalProperties": False,
    "description": "One source: images, or video, or job. The name of a list may also be written with [] behind it.",
    "properties": {
        "images": {
            "type": "array",
            "items": _file,
            "description": "JPEG, PNG or WebP; the first is the reference view",
        },
        "video": _file | {"description": "MP4, MOV or WebM; frames are taken from it at even distances"},
        "job": {"type": "string", "description": "id of a video job that has succeeded"},
        "artifact": {"type": "string", "description": "left out: the first for scenes that a living worker can run"},
        "max_views": {"type": "integer", "description": "left out: as many as the artifact takes"},
        "formats": {
            "type": "array",
            "items": {"type": "string"},
            "description": "left out: all that the artifact makes",
        },
    },
}
_BODY = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}}

router = APIRouter(tags=["generate"])


@dataclass(frozen=True)
class _File:
    """An upload that passed its looks, not yet stored."""

    content: UploadFile
    name: str
    type: str
    sha256: str


@router.post(PATH, status_code=202, responses=responses(*REFUSALS, "storage-unavailable"), openapi_extra=_BODY)
async def reconstruct_3d(http: Request, response: Response, key: IdempotencyKey, service: TheService) -> Job:
    """Queue a reconstruction from images, from a video, or from the video that another job has made."""
    async with http.form(max_files=MOST_FILES, max_fields=MOST_FIELDS, max_part_size=MOST_FIELD_BYTES) as form:
        request, images, videos = _read(form)
        info = await service.catalog.choose("scene", request.artifact)
        max_views, formats = accept_scene(request, info, len(images) if images else None)
        files = await _looked_at(images, videos, service)
        sent = fingerprint(PATH, request, [file.sha256 for file in files])
        idempotency = Idempotency(key, sent) if key else None

        submission = await service.queue.precheck(info.name, idempotency)
        if submission is None:
            job_id = uuid.uuid4().hex
            made = await _made_by(request.job, service) if request.job else None
            if files:
                await service.queue.reserve(job_id)  # should this end here, they are removed all the same
            uploads = [await _store(file, job_id, service) for file in files]
            task = SceneTask(
                artifact=info.name,
                max_views=max_views,
                formats=formats,
                images=tuple(uploads) if images else (),
                video=made or (uploads[0] if videos else None),
                job=request.job,
            )
            submission = await service.queue.enqueue(job_id, "scene", task, idempotency)
            if files and submission.job.id != job_id:  # another with the same key was faster
                await service.results.remove(f"uploads/{job_id}")
    if submission.created:
        metrics.jobs_submitted.labels("scene", info.name).inc()
    response.headers["Location"] = f"/jobs/{submission.job.id}"
    return submission.job


def _read(form: FormData) -> tuple[SceneRequest, list[UploadFile], list[UploadFile]]:
    """The plain fields, the images and the video of a form that names exactly one source."""
    errors: list[FieldError] = []
    files: dict[str, list[UploadFile]] = {"images": [], "video": []}
    fields: dict[str, Any] = {}
    for given, value in form.multi_items():
        name = given.removesuffix("[]")
        if name in files:
            if isinstance(value, UploadFile):
                files[name].append(value)
            else:
                errors.append(FieldError(field=name, message="must be a file: give the part a filename"))
        elif isinstance(value, UploadFile):
            errors.append(FieldError(field=name, message="takes no file; files are in images or video"))
        elif name == "formats":
            fields.setdefault(name, []).append(value)
        elif name in fields:
            errors.append(FieldError(field=name, message="is given twice"))
        else:
            fields[name] = value
    request = None
    try:
        request = SceneRequest.model_validate(fields)
    except ValidationError as error:
        errors += field_errors(error.errors(), SceneRequest)
    if len(files["video"]) > 1:
        errors.append(FieldError(field="video", message=f"takes one file, got {len(files['video'])}"))
    sources = [name for name in ("images", "video", "job") if files.get(name) or fields.get(name)]
    if not errors and len(sources) != 1:
        got = " and ".join(sources) or "none of them"
        errors.append(
            FieldError(
                field=sources[0] if sources else "images", message=f"one of images, video and job is needed, got {got}"
            )
        )
    if errors or request is None:
        raise invalid(errors)
    return request, files["images"], files["video"]


async def _looked_at(images: Sequence[UploadFile], videos: Sequence[UploadFile], service: Service) -> list[_File]:
    errors: list[FieldError] = []
    found: list[_File] = []
    async with service.looking:
        for number, content in enumerate((*images, *videos)):
            try:
                if images:
                    kind = await asyncio.to_thread(image_type, content.file, service.settings.max_image_pixels)
                else:
                    kind = await asyncio.to_thread(video_type, content.file)
            except RefusedError as error:
                which = f"image {number + 1} of {len(images)}" if images else "the file"
                refused = f"{which} ({ascii(content.filename)[:60]}) {error}"
                errors.append(FieldError(field="images" if images else "video", message=refused))
                continue
            sha256 = (await asyncio.to_thread(digest, content.file)).sha256
            found.append(_File(content, f"{number:03d}.{SUFFIX[kind]}", kind, sha256))
    if errors:
        raise invalid(errors)
    return found


async def _store(file: _File, job_id: str, service: Service) -> Upload:
    path = upload_path(job_id, file.name)
    stored = await service.results.put(path, file.content.file)
    return Upload(path=path, type=file.type, bytes=stored.bytes, sha256=stored.sha256)


async def _made_by(job_id: str, service: Service) -> Upload:
    """The video of a job, as an input of another."""
    job = await service.queue.get(job_id)
    if job is None or job.kind != "video":
        raise invalid([FieldError(field="job", message=f"there is no video job {job_id}")])
    video = next((result for result in job.results if result.type.startswith("video/")), None)
    if job.status is not JobStatus.SUCCEEDED or video is None:
        raise invalid([FieldError(field="job", message=f"must have succeeded; {job_id} is {job.status}")])
    path = result_path(job.id, job.attempt, video.name)
    return Upload(path=path, type=video.type, bytes=video.bytes, sha256=video.sha256)
