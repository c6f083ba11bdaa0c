"""What the service's tests are made of: a task, an artifact's description, and waiting for a truth."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import httpx
import uvicorn
from fastapi import FastAPI
from PIL import Image

from service.jobs import ArtifactInfo, SceneLimits, SceneTask, Upload, VideoLimits, VideoTask

VIDEO_LIMITS = VideoLimits(
    size_multiple=16, max_pixels=320 * 192, max_side=320, max_frames=33, max_steps=50, max_prompt=200,
    width=64, height=48, frames=9, steps=4,
)  # fmt: skip
SCENE_LIMITS = SceneLimits(min_views=2, max_views=4)


def new_id() -> str:
    return uuid.uuid4().hex


def video_task(artifact: str = "film", **change: Any) -> VideoTask:
    fields = {
        "prompt": "a red ball",
        "negative_prompt": "",
        "artifact": artifact,
        "width": 64,
        "height": 48,
        "frames": 9,
    }
    return VideoTask.model_validate(fields | {"fps": 8, "steps": 4, "guidance": 5.0, "seed": 7} | change)


def scene_task(artifact: str = "room") -> SceneTask:
    image = Upload(path="uploads/x/0.png", type="image/png", bytes=1, sha256="0" * 64)
    return SceneTask(artifact=artifact, max_views=4, formats=("glb",), images=(image, image))


def film(name: str = "film", image: Literal["none", "optional", "required"] = "none") -> ArtifactInfo:
    limits = VIDEO_LIMITS.model_copy(update={"image": image})
    return ArtifactInfo(name=name, kind="video", family="wan", bits="W4A8", density=0.25, bytes=10, limits=limits)


def room(name: str = "room") -> ArtifactInfo:
    return ArtifactInfo(name=name, kind="scene", family="vggt", bits="W8A8", bytes=10, limits=SCENE_LIMITS)


def write_artifact(folder: Path, info: ArtifactInfo) -> Path:
    """A folder whose manifest says what the offline stage would: the rest of an artifact is the loader's business."""
    folder.mkdir(parents=True)
    manifest = info.model_dump(include={"name", "family", "method", "bits", "density"})
    manifest |= {"version": 1, "layers": {}, "serving": {"kind": info.kind, "limits": info.limits.model_dump()}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def picture(kind: str = "PNG", size: tuple[int, int] = (40, 30), **how: Any) -> bytes:
    buffer = io.BytesIO()
    Image.radial_gradient("L").resize(size).convert("RGB").save(buffer, kind, **how)
    return buffer.getvalue()


@asynccontextmanager
async def serving(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """The app behind a real HTTP server on a free port, and a client of it."""
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1, ws="none")
    config.load()
    server = uvicorn.Server(config)  # its parts by hand: serve() and shutdown() wait for ticks of 0.1 s
    server.lifespan = config.lifespan_class(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        await server.startup([listening])
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        async with httpx.AsyncClient(
            base_url=url, timeout=20, verify=False
        ) as client:  # no TLS: no certificates to load
            yield client
        await until(lambda: not server.server_state.connections)
        for socket_server in server.servers:
            socket_server.close()
        await server.lifespan.shutdown()


async def until(truth: Callable[[], Any], seconds: float = 15.0) -> Any:
    """Waits until `truth` (a function, or one that gives an awaitable) holds, and returns what it gave."""
    end = time.monotonic() + seconds
    while True:
        value = truth()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return value
        assert time.monotonic() < end, f"not true within {seconds} s"
        await asyncio.sleep(0.005)
