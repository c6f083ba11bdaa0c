"""What can be asked for: every known artifact, with its limits, its quality and the workers that hold it."""

from __future__ import annotations

from fastapi import APIRouter

from service.api.deps import TheService
from service.api.problems import responses
from service.jobs import ArtifactInfo

router = APIRouter(tags=["artifacts"])


@router.get("/artifacts", responses=responses())
async def list_artifacts(service: TheService) -> list[ArtifactInfo]:
    """An artifact with no worker is known and can be asked for; its jobs wait until one comes."""
    return list(await service.catalog.all())
