"""Every error answer is an RFC 9457 problem document: a stable `type`, the field, what was given, what would do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from service import metrics
from service.jobs import PROBLEM, FieldError, Problem
from service.queue.client import ConflictError, FullError, UnavailableError
from service.results import StorageError

MEDIA_TYPE = "application/problem+json"
RETRY_SECONDS = 5  # what a caller is told to wait for a server that is away

# The types, with the status each comes with and its title. docs/api.md says when; a type never changes its meaning.
TYPES: Mapping[str, tuple[int, str]] = {
    "malformed-body": (400, "The body cannot be read"),
    "not-found": (404, "No such path"),
    "job-not-found": (404, "No such job"),
    "result-not-found": (404, "No such result"),
    "method-not-allowed": (405, "Method not allowed"),
    "idempotency-conflict": (409, "Idempotency key used for another request"),
    "job-ended": (409, "The job has ended"),
    "result-gone": (410, "The result is gone"),
    "body-too-large": (413, "The body is too large"),
    "unsupported-media-type": (415, "Unsupported media type"),
    "range-not-satisfiable": (416, "Range not satisfiable"),
    "invalid-request": (422, "The request cannot work"),
    "queue-full": (429, "The queue is full"),
    "internal": (500, "Internal error"),
    "no-artifact": (503, "No artifact to run this with"),
    "queue-unavailable": (503, "The queue is unavailable"),
    "storage-unavailable": (503, "The results store is unavailable"),
    "too-many-fetches": (503, "Too many images are being fetched"),
}
_OF_STATUS = {400: "malformed-body", 404: "not-found", 405: "method-not-allowed", 413: "body-too-large"}

_log = structlog.get_logger()


class ProblemError(Exception):
    """Raised anywhere in a request; answered as the problem it names."""

    def __init__(
        self,
        slug: str,
        detail: str,
        *,
        field: str | None = None,
        errors: Iterable[FieldError] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        status, title = TYPES[slug]
        errors = tuple(errors)
        if field is None and errors:
            field = errors[0].field
        self.slug = slug
        self.headers = dict(headers or {})
        self.problem = Problem(
            type=PROBLEM + slug, title=title, status=status, detail=detail, field=field, errors=errors
        )

    def response(self) -> Response:
        body = self.problem.model_dump_json(exclude_none=True, exclude_defaults=True)
        status = TYPES[self.slug][0]
        return Response(body, status_code=status, headers=self.headers, media_type=MEDIA_TYPE)


def invalid(errors: Iterable[FieldError]) -> ProblemError:
    errors = tuple(errors)
    detail = "; ".join(f"{error.field}: {error.message}" if error.field else error.message for error in errors)
    return ProblemError("invalid-request", detail, errors=errors)


def field_errors(found: Iterable[Mapping[str, Any]], fields: Iterable[str] = ()) -> list[FieldError]:
    """pydantic's errors in our words; `fields` are those of a body, for one that is none of them."""
    known = ", ".join(fields)
    return [FieldError(field=_field(error["loc"]), message=_message(error, known)) for error in found]


def _field(loc: tuple[int | str, ...]) -> str:
    names = loc[1:] if loc[:1] and loc[0] in ("body", "query", "path", "header") else loc
    return ".".join(str(name) for name in names) or "body"


def _message(error: Mapping[str, Any], known: str) -> str:
    match error["type"]:
        case "extra_forbidden":
            return f"is not a field of this request; its fields are {known}"
        case "missing":
            return "is required"
        case "value_error":
            return str(error["ctx"]["error"])
        case "string_pattern_mismatch":
            return f"is {_shown(error['input'])}, which does not match {error['ctx']['pattern']}"
    text: str = error["msg"]
    return f"{text[:1].lower()}{text[1:]}, got {_shown(error['input'])}"


def _shown(value: Any) -> str:
    """What was given, short and printable: it may be anything at all."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def install(app: FastAPI) -> None:
    app.add_exception_handler(ProblemError, _answer)
    app.add_exception_handler(RequestValidationError, _answer)
    app.add_exception_handler(HTTPException, _answer)
    app.add_exception_handler(ClientDisconnect, _answer)
    app.add_exception_handler(UnavailableError, _answer)
    app.add_exception_handler(StorageError, _answer)
    app.add_exception_handler(ConflictError, _answer)
    app.add_exception_handler(FullError, _answer)
    app.add_exception_handler(Exception, _answer)


async def _answer(request: Request, error: Exception) -> Response:
    problem = problem_of(error, request)
    if request.method == "POST":
        metrics.jobs_rejected.labels(problem.slug).inc()
    return problem.response()


def problem_of(error: Exception, request: Request) -> ProblemError:
    wait = {"Retry-After": str(RETRY_SECONDS)}
    match error:
        case ProblemError():
            return error
        case RequestValidationError():
            return invalid(field_errors(error.errors()))
        case ClientDisconnect():
            return ProblemError("malformed-body", "the connection ended before the body did", field="body")
        case ConflictError():
            return ProblemError("idempotency-conflict", str(error), field="idempotency-key")
        case FullError():
            seconds = max(1, round(error.seconds))
            return ProblemError("queue-full", str(error), headers={"Retry-After": str(seconds)})
        case UnavailableError():
            metrics.queue_errors.inc()
            _log.warning("queue_unavailable", path=request.url.path, error=str(error))
            return ProblemError("queue-unavailable", "the queue server does not answer; try again", headers=wait)
        case StorageError():
            _log.warning("storage_unavailable", path=request.url.path, error=str(error))
            return ProblemError("storage-unavailable", "the results store does not answer; try again", headers=wait)
        case HTTPException(status_code=status) if status in _OF_STATUS:
            detail = _http_detail(error, request)
            return ProblemError(_OF_STATUS[status], detail, field=_http_field(error, request), headers=error.headers)
        case _:
            _log.error("internal_error", path=request.url.path, exc_info=error)
            return ProblemError("internal", "this is a fault of the service; its log has the reason")


def _http_detail(error: HTTPException, request: Request) -> str:
    match error.status_code:
        case 404:
            return f"{request.url.path} is no path of this service; /docs lists them"
        case 405:
            allowed = (error.headers or {}).get("Allow", "another method")
            return f"{request.url.path} takes {allowed}, not {request.method}"
        case _:
            return str(error.detail)


def _http_field(error: HTTPException, request: Request) -> str | None:
    if error.status_code not in (400, 413):
        return None
    if "Too many files" in str(error.detail):  # starlette counts them as it reads a form
        return "images" if request.url.path.startswith("/reconstruct/") else "image"
    return "body"


# How the answers show in OpenAPI

SCHEMA = {"$ref": "#/components/schemas/Problem"}


def responses(*slugs: str) -> dict[int | str, dict[str, Any]]:
    """The `responses=` of a route that may answer with these types."""
    found: dict[int | str, dict[str, Any]] = {}
    for slug in (*slugs, "invalid-request", "internal"):
        status, title = TYPES[slug]
        entry = found.setdefault(status, {"description": "", "content": {MEDIA_TYPE: {"schema": SCHEMA}}})
        entry["description"] = f"{entry['description']}; {title}".removeprefix("; ")
    return found


def add_schema(openapi: dict[str, Any]) -> dict[str, Any]:
    schema = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas = openapi.setdefault("components", {}).setdefault("schemas", {})
    schemas |= schema.pop("$defs", {})
    schemas["Problem"] = schema
    return openapi
