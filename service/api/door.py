"""What is decided before a body is read, its kind and its size; and what is counted about the answer."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import metrics
from service.api.problems import ProblemError

_CHARSETS = frozenset({"utf-8", "utf8", "us-ascii"})
_METHODS = frozenset({"GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "PATCH"})


@dataclass(frozen=True)
class Body:
    media_type: str
    max_bytes: int


class Door:
    """Refuses a body of the wrong kind (415) or size (413): a chunked one, which states none, where it goes over."""

    def __init__(self, app: ASGIApp, bodies: Mapping[str, Sequence[Body]], otherwise: int) -> None:
        self.app = app
        self.bodies = bodies  # of POST, by path: one of these
        self.otherwise = otherwise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        bodies = self.bodies.get(scope["path"], ()) if scope["method"] == "POST" else ()
        body = next((body for body in bodies if _is_of_kind(headers, body)), None)
        limit = body.max_bytes if body else self.otherwise
        refusal = _wrong_kind(headers, bodies) if bodies and not body else _too_long(headers, limit)
        if refusal:
            metrics.jobs_rejected.labels(refusal.slug).inc()
            await refusal.response()(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                refused = _too_large(f"more than {limit}", limit)
                raise HTTPException(413, str(refused))  # the kind that passes through body parsers
            return message

        await self.app(scope, counted, send)


def _is_of_kind(headers: Headers, body: Body) -> bool:
    kind, *parameters = (part.strip().lower() for part in headers.get("content-type", "").split(";"))
    charsets = [part.partition("=")[2].strip('" ') for part in parameters if part.startswith("charset")]
    return kind == body.media_type and set(charsets) <= _CHARSETS


def _wrong_kind(headers: Headers, bodies: Sequence[Body]) -> ProblemError:
    kinds = " or ".join(body.media_type for body in bodies)
    given = ascii(headers.get("content-type", ""))[1:-1] or "none"
    return ProblemError(
        "unsupported-media-type", f"the body must be {kinds}, in UTF-8, got {given}", field="content-type"
    )


def _too_long(headers: Headers, limit: int) -> ProblemError | None:
    length = headers.get("content-length", "")
    return _too_large(length, limit) if length.isdecimal() and int(length) > limit else None


def _too_large(given: str, limit: int) -> ProblemError:
    # The connection stays open: the rest is read and dropped, so that a caller who is still sending sees this answer.
    return ProblemError("body-too-large", f"the body has {given} bytes; at most {limit} are taken", field="body")


class Counted:
    """Counts answers by method, route template and status, and times them up to their first byte."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                method = scope["method"] if scope["method"] in _METHODS else "other"
                route = getattr(scope.get("route"), "path", "unmatched")
                metrics.http_requests.labels(method, route, message["status"]).inc()
                metrics.http_request_seconds.labels(method, route).observe(time.perf_counter() - started)
            await send(message)

        await self.app(scope, receive, counted)
