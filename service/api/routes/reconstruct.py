"""POST /reconstruct/3d."""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO, Any

from fastapi import APIRouter, Request, Response
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile

from service import metrics
from service.api import intake
from service.api.accept import accept_scene, fingerprint
from service.api.deps import IdempotencyKey, Service, TheService
from service.api.intake import Incoming
from service.api.problems import field_errors, invalid, responses
from service.api.routes.generate import REFUSALS
from service.api.uploads import RefusedError, image_type, video_type
from service.jobs import FieldError, Job, JobStatus, SceneRequest, SceneTask, Upload
from service.queue.client import Idempotency
from service.results import result_path

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
            made = await _made_by(request.job, service) if request.job else None

            def task(uploads: tuple[Upload, ...]) -> SceneTask:
                return SceneTask(
                    artifact=info.name,
                    max_views=max_views,
                    formats=formats,
                    images=uploads if images else (),
                    video=made or (uploads[0] if videos else None),
                    job=request.job,
                )

            submission = await intake.enqueue("scene", files, task, idempotency, service)
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
        errors += field_errors(error.errors(), SceneRequest.model_fields)
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


async def _looked_at(images: Sequence[UploadFile], videos: Sequence[UploadFile], service: Service) -> list[Incoming]:
    errors: list[FieldError] = []
    found: list[Incoming] = []

    def kind_of(file: IO[bytes]) -> str:
        return image_type(file, service.settings.max_image_pixels) if images else video_type(file)

    async with service.looking:
        for number, content in enumerate((*images, *videos)):
            try:
                found.append(await intake.look(content.file, f"{number:03d}", kind_of))
            except RefusedError as error:
                which = f"image {number + 1} of {len(images)}" if images else "the file"
                refused = f"{which} ({ascii(content.filename)[:60]}) {error}"
                errors.append(FieldError(field="images" if images else "video", message=refused))
    if errors:
        raise invalid(errors)
    return found


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
