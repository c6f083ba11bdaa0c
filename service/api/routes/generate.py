"""POST /generate/video: a prompt, and for artifacts that take one an image to start from."""

from __future__ import annotations

import asyncio
import json
import re
import string
import uuid
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import IO, Any

from fastapi import APIRouter, Request, Response
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile

from service import metrics
from service.api import intake
from service.api.accept import accept_video, fingerprint, suits
from service.api.deps import IdempotencyKey, Service, TheService
from service.api.door import Body
from service.api.intake import Incoming
from service.api.problems import ProblemError, field_errors, invalid, responses
from service.api.uploads import RefusedError, data_uri, image_type, spooled
from service.jobs import FieldError, Job, Upload, VideoRequest, VideoTask
from service.queue.client import Idempotency, Submission
from service.settings import Settings

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
MOST_PARTS = 32  # of a form: files, and likewise fields
_FIELDS = tuple(VideoRequest.model_fields)
_IN_BASE64 = (string.ascii_letters + string.digits + "+/=\\").encode()  # some writers escape each / with a backslash

_JSON = VideoRequest.model_json_schema() | {
    "examples": [
        {"prompt": "a red ball rolls to the left", "steps": 20},
        {"prompt": "the boat sails away", "image": "https://images.example.org/boat.jpg"},
    ]
}
_FORM = _JSON | {
    "description": "The same fields, and the image as a file.",
    "properties": _JSON["properties"]
    | {
        "image": {
            "type": "string",
            "contentMediaType": "application/octet-stream",
            "description": "the first frame: JPEG, PNG or WebP",
        }
    },
    "examples": [{"prompt": "the boat sails away", "steps": "20"}],
}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": _JSON}, "multipart/form-data": {"schema": _FORM}},
    }
}

router = APIRouter(tags=["generate"])


def bodies(settings: Settings) -> tuple[Body, ...]:
    """What may come in: JSON with an image in base64, or a form with the image itself."""
    json_bytes = settings.max_json_bytes + settings.max_start_image_bytes * 3 // 2  # base64 is 4/3, escapes aside
    form_bytes = settings.max_json_bytes + settings.max_start_image_bytes
    return Body("application/json", json_bytes), Body("multipart/form-data", form_bytes)


@dataclass(frozen=True)
class _Asked:
    """A request without its image, and the image as it came: in a file, or as the URL where it lies."""

    request: VideoRequest
    file: IO[bytes] | None = None
    url: str | None = None

    @property
    def image(self) -> bool:
        return self.file is not None or self.url is not None


@router.post(
    PATH,
    status_code=202,
    responses=responses(*REFUSALS, "storage-unavailable", "too-many-fetches"),
    openapi_extra=_BODY,
)
async def generate_video(http: Request, response: Response, key: IdempotencyKey, service: TheService) -> Job:
    """Queue a video. The answer is the job; its `Location` is where to follow it."""
    async with AsyncExitStack() as open_files:
        asked = await _read(http, service, open_files)
        info = await service.catalog.choose("video", asked.request.artifact, lambda info: suits(info, asked.image))
        takers = [one.name for one in await service.catalog.all() if suits(one, image=True)]
        task = accept_video(asked.request, info, asked.image, takers)
        if asked.image:
            submission = await _submit_with_image(asked, task, key, service, open_files)
        else:
            idempotency = Idempotency(key, fingerprint(PATH, asked.request)) if key else None
            submission = await service.queue.enqueue(uuid.uuid4().hex, "video", task, idempotency)
    if submission.created:
        metrics.jobs_submitted.labels("video", task.artifact).inc()
    response.headers["Location"] = f"/jobs/{submission.job.id}"
    return submission.job


async def _submit_with_image(
    asked: _Asked, task: VideoTask, key: str | None, service: Service, open_files: AsyncExitStack
) -> Submission:
    """The image counts by its contents or by its URL, which is asked for only where a job will come of it."""
    image = await _looked_at(asked.file, service) if asked.file else None
    sent = fingerprint(PATH, asked.request, [image.sha256 if image else str(asked.url)])
    idempotency = Idempotency(key, sent) if key else None
    submission = await service.queue.precheck(task.artifact, idempotency)
    if submission is not None:
        return submission
    if image is None:
        image = await _fetched(str(asked.url), service, open_files)

    def with_image(uploads: tuple[Upload, ...]) -> VideoTask:
        return task.model_copy(update={"image": uploads[0]})

    return await intake.enqueue("video", [image], with_image, idempotency, service)


async def _fetched(url: str, service: Service, open_files: AsyncExitStack) -> Incoming:
    try:
        file = open_files.enter_context(await service.fetcher.fetch(url))
    except RefusedError as error:
        raise _refused(error) from error
    return await _looked_at(file, service)


async def _looked_at(file: IO[bytes], service: Service) -> Incoming:
    try:
        async with service.looking:
            return await intake.look(file, "image", lambda file: image_type(file, service.settings.max_image_pixels))
    except RefusedError as error:
        raise _refused(error) from error


def _refused(error: RefusedError) -> ProblemError:
    return invalid([FieldError(field="image", message=str(error))])


# Reading the two kinds of body


async def _read(http: Request, service: Service, open_files: AsyncExitStack) -> _Asked:
    settings = service.settings
    if http.headers.get("content-type", "").lower().startswith("multipart/"):
        limits = {"max_files": MOST_PARTS, "max_fields": MOST_PARTS, "max_part_size": settings.max_json_bytes}
        form = await open_files.enter_async_context(http.form(**limits))
        return _of_form(form, settings)
    # A long body waits on the disk until it is whole, as a form's files do, and few are in memory at the same time.
    body = open_files.enter_context(spooled(settings.max_json_bytes))
    async for chunk in http.stream():
        body.write(chunk)
    if body.tell() <= settings.max_json_bytes:
        return _of_json(body, settings, open_files)
    async with service.looking:
        return await asyncio.to_thread(_of_json, body, settings, open_files)


def _of_json(body: IO[bytes], settings: Settings, open_files: AsyncExitStack) -> _Asked:
    body.seek(0)
    content = body.read()
    if len(content) > settings.max_json_bytes:
        # What is not base64 bounds how many values there are, and so the memory that they take once they are read.
        _check_length(len(content.translate(None, _IN_BASE64)), settings)
    given = _parsed(content)
    image = given.get("image")
    _check_length(len(content) - (len(image) + content.count(b"\\/") if isinstance(image, str) else 0), settings)
    try:
        request = VideoRequest.model_validate(given)
    except ValidationError as error:
        raise invalid(field_errors(error.errors(include_url=False), _FIELDS)) from error
    if request.image is None:
        return _Asked(request)
    without = VideoRequest.model_validate(request.model_dump(exclude={"image"}, exclude_unset=True))
    if re.match("https?:", request.image, re.IGNORECASE):
        return _Asked(without, url=request.image)
    try:
        if not re.match("data:", request.image, re.IGNORECASE):
            raise RefusedError("must be a data URI (data:image/png;base64,...) or an http(s) URL")
        file = open_files.enter_context(spooled(settings.max_json_bytes))
        file.write(data_uri(request.image, settings.max_start_image_bytes))
    except RefusedError as error:
        raise _refused(error) from error
    file.seek(0)
    return _Asked(without, file)


def _check_length(beside_the_image: int, settings: Settings) -> None:
    if beside_the_image > settings.max_json_bytes:
        detail = f"the body has {beside_the_image} bytes beside its image; at most {settings.max_json_bytes} are taken"
        raise ProblemError("body-too-large", detail, field="body")


def _parsed(content: bytes) -> dict[str, Any]:
    if not content:
        raise invalid([FieldError(field="body", message="is required")])
    try:
        given = json.loads(content)
    except json.JSONDecodeError as error:
        raise ProblemError("malformed-body", f"not JSON: {error.msg} at byte {error.pos}", field="body") from error
    except (ValueError, RecursionError) as error:  # not UTF-8; an integer of thousands of digits; thousands of brackets
        raise ProblemError("malformed-body", f"not JSON that can be read: {error}", field="body") from error
    if not isinstance(given, dict):
        raise invalid([FieldError(field="body", message="must be a JSON object")])
    return given


def _of_form(form: FormData, settings: Settings) -> _Asked:
    errors: list[FieldError] = []
    fields: dict[str, str] = {}
    images: list[UploadFile] = []
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            if name == "image":
                images.append(value)
            else:
                errors.append(FieldError(field=name, message="takes no file; the file is in image"))
        elif name == "image":
            message = "must be a file here: give the part a filename; a URL or a data URI goes into JSON"
            errors.append(FieldError(field=name, message=message))
        elif name in fields:
            errors.append(FieldError(field=name, message="is given twice"))
        else:
            fields[name] = value
    if len(images) > 1:
        errors.append(FieldError(field="image", message=f"takes one file, got {len(images)}"))
    most = settings.max_start_image_bytes
    if images and (size := images[0].size or 0) > most:
        errors.append(FieldError(field="image", message=f"has {size} bytes; at most {most} are taken"))
    request = None
    try:
        request = VideoRequest.model_validate_strings(fields)
    except ValidationError as error:
        errors += field_errors(error.errors(include_url=False), _FIELDS)
    if errors or request is None:
        raise invalid(errors)
    return _Asked(request, images[0].file if images else None)
