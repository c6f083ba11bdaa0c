"""Download a finished file, whole or a range of it."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header, Response
from starlette.responses import StreamingResponse

from service.api.deps import TheJob, TheService
from service.api.problems import ProblemError, responses
from service.jobs import Result
from service.results import MissingError, result_path

router = APIRouter(tags=["jobs"])

_REFUSALS = ("job-not-found", "result-not-found", "result-gone", "range-not-satisfiable", "queue-unavailable")


@router.get(
    "/jobs/{job_id}/result/{name}",
    response_class=StreamingResponse,
    responses=responses(*_REFUSALS, "storage-unavailable")
    | {
        200: {"description": "The file", "content": {"application/octet-stream": {}}},
        206: {"description": "The part of it that Range asks for"},
        304: {"description": "If-None-Match names this very file"},
    },
)
async def download_result(
    job: TheJob,
    name: str,
    service: TheService,
    range_: Annotated[str, Header(alias="Range")] = "",
    if_range: Annotated[str, Header()] = "",
    if_none_match: Annotated[str, Header()] = "",
) -> Response:
    result = next((result for result in job.results if result.name == name), None)
    if result is None:
        made = ", ".join(result.name for result in job.results)
        detail = f"job {job.id} made {made}" if made else f"job {job.id} is {job.status} and has no results"
        raise ProblemError("result-not-found", f"{detail}; {name!a} is not among them", field="name")
    headers = _headers(result)
    if headers["ETag"] in (tag.strip().removeprefix("W/") for tag in if_none_match.split(",")):
        return Response(status_code=304, headers=headers)
    span = _span(range_, result.bytes) if if_range in ("", headers["ETag"]) else None
    start, end = span or (0, result.bytes)
    headers["Content-Length"] = str(end - start)
    if span:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{result.bytes}"
    path = result_path(job.id, job.attempt, name)
    chunks = service.results.read(path, span)
    try:
        first = await anext(chunks, b"")
    except MissingError as error:
        raise ProblemError("result-gone", f"the file of {name} is no longer kept", field="name") from error
    return StreamingResponse(_rest(first, chunks), 206 if span else 200, headers, media_type=result.type)


async def _rest(first: bytes, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for chunk in chunks:
        yield chunk


def _headers(result: Result) -> dict[str, str]:
    shown = result.type.startswith(("video/", "image/")) and "svg" not in result.type
    return {
        "ETag": f'"{result.sha256}"',
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, max-age=86400, immutable",
        "Content-Disposition": f'{"inline" if shown else "attachment"}; filename="{result.name}"',
        "X-Content-Type-Options": "nosniff",
    }


def _span(header: str, size: int) -> tuple[int, int] | None:
    """(start, end) of a single range (RFC 9110, 14.2); None where there is none, or one that may be ignored."""
    match = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", header.strip())
    if not match or match[0] == "bytes=-":
        return None
    if match[1]:
        start, end = int(match[1]), min(int(match[2]) + 1 if match[2] else size, size)
        if match[2] and int(match[2]) < int(match[1]):
            return None
    else:
        start, end = max(0, size - int(match[2])), size
    if start >= end:
        total = {"Content-Range": f"bytes */{size}"}
        raise ProblemError(
            "range-not-satisfiable", f"the file has {size} bytes, asked for {match[0]}", field="range", headers=total
        )
    return start, end
