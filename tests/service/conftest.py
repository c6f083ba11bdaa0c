"""A real Valkey for the whole session, and for each test a queue of its own on it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
import structlog

from service.api.app import create_app
from service.queue.client import Queue
from service.queue.embedded import EmbeddedServer
from service.results import Results
from service.settings import Settings
from tests.service.support import film, new_id, room, serving, write_artifact

structlog.configure(processors=[structlog.processors.KeyValueRenderer(key_order=["event"])])  # plain and quick

Clients = AsyncIterator[httpx.AsyncClient]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(tmp_path_factory.mktemp("data")) as server:
        yield server


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        queue_prefix=new_id(), data=tmp_path / "data", artifacts=(tmp_path / "artifacts",), device="cpu",
        metrics_port=0, max_upload_bytes=2**20, max_start_image_bytes=2**16, lease_seconds=2, beat_seconds=0.5,
        stall_seconds=20, drain_seconds=5, backoff_seconds=0.05, backoff_max_seconds=0.1,
    )  # fmt: skip


@pytest.fixture
async def queue(server: EmbeddedServer, settings: Settings) -> AsyncIterator[Queue]:
    async with Queue.open(server.url, settings) as queue:
        yield queue


@pytest.fixture
def results(settings: Settings) -> Results:
    return Results(settings.results_location)


@pytest.fixture
def artifacts(settings: Settings) -> Path:
    """A folder with a video and a scene artifact, as far as the API reads them."""
    write_artifact(settings.artifacts[0] / "film", film())
    write_artifact(settings.artifacts[0] / "room", room())
    return settings.artifacts[0]


@pytest.fixture
async def client(
    settings: Settings, queue: Queue, results: Results, artifacts: Path
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the API behind a real HTTP server."""
    async with serving(create_app(settings, queue, results)) as client:
        yield client
