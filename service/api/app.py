"""The HTTP side. Holds nothing of its own: any number of these processes may share one queue and one results store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI, Request, Response

from service import artifacts
from service.api import problems
from service.api.catalog import Catalog
from service.api.deps import Service
from service.api.door import Body, Counted, Door
from service.api.fetch import Fetcher
from service.api.routes import ROUTERS, generate, reconstruct
from service.api.routes.jobs import AllSentError
from service.api.upkeep import keep_up
from service.queue.client import Queue
from service.queue.follow import Followers
from service.results import Results
from service.settings import Settings


class _App(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """The schema, and in it what every error answer is."""
        return problems.add_schema(super().openapi())


def create_app(settings: Settings, queue: Queue, results: Results) -> FastAPI:
    """Reads the manifests in `settings.artifacts` now, and nothing else until the first request."""
    local = [found.info for found in artifacts.find(settings.artifacts)]
    service = Service(settings, queue, results, Catalog(local, queue), Followers(queue), Fetcher(settings))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        upkeep = asyncio.create_task(keep_up(queue, results))
        yield
        upkeep.cancel()
        with suppress(asyncio.CancelledError):
            await upkeep
        await service.followers.close()
        service.fetcher.close()

    app = _App(
        title="lowbit",
        version="1",
        summary="Compressed video and 3D generators",
        lifespan=lifespan,
    )
    app.state.service = service
    problems.install(app)
    app.add_exception_handler(AllSentError, _no_content)
    for router in ROUTERS:
        app.include_router(router)
    bodies = {
        generate.PATH: generate.bodies(settings),
        reconstruct.PATH: (Body("multipart/form-data", settings.max_upload_bytes),),
    }
    app.add_middleware(Door, bodies=bodies, otherwise=settings.max_json_bytes)
    app.add_middleware(Counted)  # added last, it stands outermost: refusals at the door are counted too
    return app


async def _no_content(request: Request, error: Exception) -> Response:
    return Response(status_code=204)
