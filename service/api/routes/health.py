"""Alive, ready, and measured."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Header, Response
from prometheus_client.exposition import choose_encoder
from pydantic import BaseModel, ConfigDict

from service import metrics
from service.api.deps import TheService
from service.api.problems import responses
from service.queue.client import UnavailableError

router = APIRouter(tags=["health"])


class Alive(BaseModel):
    model_config = ConfigDict(extra="forbid")

    status: Literal["alive"] = "alive"


class Ready(BaseModel):
    model_config = ConfigDict(extra="forbid")

    status: Literal["ready"] = "ready"
    workers: int  # living; a job is accepted without any, and waits
    waiting: int
    refused: tuple[str, ...]  # artifacts that a living worker takes no jobs for: its self-test found a kernel wrong


@router.get("/livez")
async def alive() -> Alive:
    """The process answers. It asks nobody else: restarting it would not bring a queue server back."""
    return Alive()


@router.get("/readyz", responses=responses("queue-unavailable"))
async def ready(service: TheService) -> Ready:
    """Jobs can be accepted: the queue server answers."""
    stats = await service.queue.stats()
    known = await service.catalog.all()
    refused = [info.name for info in known if any(test.verdict == "refused" for test in info.tested.values())]
    return Ready(workers=stats.workers, waiting=stats.waiting, refused=tuple(refused))


@router.get("/metrics", include_in_schema=False)
async def scrape(service: TheService, accept: Annotated[str, Header()] = "") -> Response:
    try:
        metrics.show_queue(await service.queue.stats())
    except UnavailableError:
        metrics.show_queue(None)
    encode, media_type = choose_encoder(accept)
    return Response(encode(metrics.REGISTRY), headers={"Content-Type": media_type})
