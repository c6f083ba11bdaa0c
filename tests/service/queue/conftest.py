"""The queue's promises are tried on the embedded Valkey and, where there is one on PATH, on a Redis."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.queue.embedded import EmbeddedServer

REDIS = shutil.which("redis-server")
BINARIES = {"valkey": None} | ({"redis": Path(REDIS)} if REDIS else {})


@pytest.fixture(scope="session", params=BINARIES)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(tmp_path_factory.mktemp(request.param), BINARIES[request.param]) as server:
        yield server
