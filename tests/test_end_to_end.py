"""The main job as its users do it, over the command line and HTTP; and what is left of a job when a process dies."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import av
import httpx
import numpy as np
import pytest
import trimesh
from PIL import Image
from redis import Redis

from models.registry import family
from models.wan import Wan
from service import demo
from service.queue.embedded import EmbeddedServer
from tests.service.test_cli import worker_of

OPTIONS = ["--method", "quarot", "--bits", "w4a8", "--calibration-samples", "1", "--judging-samples", "1"]
LONG = {"prompt": "a red ball", "steps": 50, "seed": 5, "artifact": "film"}  # long enough to be killed in the middle


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory) -> Path:
    """A compressed one of each tiny family, made by the command."""
    folder = tmp_path_factory.mktemp("lowbit")

    def make(name: str, kind: str, *more: str) -> None:
        family(kind).tiny(folder / kind)
        quantize(name, folder / kind, *more)

    def quantize(name: str, checkpoint: Path, *more: str) -> None:
        command = [sys.executable, "-m", "service.cli", "quantize", str(checkpoint)]
        command += ["--out", str(folder / "artifacts" / name), *OPTIONS, *more]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    with ThreadPoolExecutor() as both:
        film = both.submit(make, "film", "wan", "--sparsity", "topk:0.5,block=16")
        scene = both.submit(make, "scene", "vggt")
        film.result(), scene.result()
    Wan().tiny(folder / "i2v", "i2v")
    quantize("start", folder / "i2v")
    return folder / "artifacts"


@pytest.fixture(scope="module")
def pictures() -> Iterator[str]:
    """Where a picture lies on the web: at an address that stands for a public one."""

    class Web(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(picture(0))

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.2", 0), Web) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        yield f"http://127.0.0.2:{web.server_port}/picture.png"
        web.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def served(artifacts, pictures, tmp_path_factory) -> Iterator[demo.Served]:
    """`lowbit serve` with a lease of 2 s."""
    log = tmp_path_factory.mktemp("serve") / "serve.log"
    short = {"LOWBIT_LEASE_SECONDS": "2", "LOWBIT_BEAT_SECONDS": "0.5", "LOWBIT_BACKOFF_SECONDS": "0.1"}
    short |= {"LOWBIT_FETCH_HOSTS": "127.0.0.2", "LOWBIT_FETCH_NETWORKS": "127.0.0.2/32"}
    short["LOWBIT_FETCH_PORTS"] = str(urlsplit(pictures).port)
    short["OMP_NUM_THREADS"] = "1"  # layers of a few numbers gain nothing from two
    with demo.served(artifacts, log, short) as served:
        with httpx.Client(base_url=served.url, timeout=60) as client:  # the first job waits for imports
            first = client.post("/generate/video", json={"prompt": "a red ball", "steps": 1, "artifact": "film"})
            ended(client, first.raise_for_status().json()["id"])
        yield served
    text = log.read_text()
    assert "Traceback" not in "".join(line for line in text.splitlines() if not line.startswith("{"))


@pytest.fixture
def client(served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=30) as client:
        yield client


def events(client: httpx.Client, job: str) -> Iterator[tuple[str, dict]]:
    with client.stream("GET", f"/jobs/{job}/events", timeout=60) as stream:
        yield from demo.events(stream.iter_lines())


def ended(client: httpx.Client, job: str) -> dict:
    return next(data for event, data in events(client, job) if event == "done")


def result(client: httpx.Client, job: str, name: str) -> bytes:
    return client.get(f"/jobs/{job}/result/{name}").raise_for_status().content


def frames(mp4: bytes) -> np.ndarray:
    with av.open(io.BytesIO(mp4)) as film:
        stream = film.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        return np.stack([frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)])


def picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 255, (40, 60, 3), np.uint8)
    Image.fromarray(noise).resize((120, 80)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def uninterrupted(served) -> np.ndarray:
    """The frames of LONG when nothing dies."""
    with httpx.Client(base_url=served.url, timeout=30) as client:
        job = client.post("/generate/video", json=LONG).raise_for_status().json()
        done = ended(client, job["id"])
        assert (done["status"], done["attempt"]) == ("succeeded", 1)
        return frames(result(client, job["id"], "video.mp4"))


def test_a_prompt_becomes_a_film(client):
    asked = {"prompt": "a red ball rolls", "width": 48, "height": 32, "frames": 5, "steps": 3, "seed": 1}
    accepted = client.post("/generate/video", json=asked)
    assert accepted.status_code == 202
    job = accepted.json()["id"]
    told = list(events(client, job))
    assert [data["status"] for event, data in told if event == "status"] == ["queued", "running"]
    assert told[-1][0] == "done"
    assert told[-1][1]["status"] == "succeeded"
    assert [one["name"] for one in told[-1][1]["results"]] == ["video.mp4", "poster.jpg", "run.json"]
    assert frames(result(client, job, "video.mp4")).shape == (5, 32, 48, 3)
    record = json.loads(result(client, job, "run.json"))
    assert record["inputs"] == asked | {"fps": 8, "guidance": 2.0, "negative_prompt": "", "image": None}


def test_a_picture_becomes_the_same_film_whichever_way_it_came(client, pictures):
    asked = {"prompt": "the picture comes to life", "width": 48, "height": 32, "frames": 5, "steps": 2, "seed": 1}
    uri = "data:image/png;base64," + base64.b64encode(picture(0)).decode()
    ways = [
        {"data": asked, "files": {"image": ("a.png", picture(0))}},
        {"json": asked | {"image": uri}},
        {"json": asked | {"image": pictures}},
        {"data": asked, "files": {"image": ("b.png", picture(1))}},
    ]
    jobs = [client.post("/generate/video", **way).raise_for_status().json() for way in ways]
    assert {job["artifact"] for job in jobs} == {"start"}  # the only one that takes a picture
    assert all(ended(client, job["id"])["status"] == "succeeded" for job in jobs)
    film, again, fetched, other = (frames(result(client, job["id"], "video.mp4")) for job in jobs)
    assert film.shape == (5, 32, 48, 3)
    assert np.array_equal(film, again)
    assert np.array_equal(film, fetched)
    assert not np.array_equal(film, other)
    inside = client.post("/generate/video", json=asked | {"image": pictures.replace("127.0.0.2", "127.0.0.1")})
    assert (inside.status_code, inside.json()["field"]) == (422, "image")


def test_pictures_become_a_scene(client):
    files = [("images", (f"{n}.png", picture(n), "image/png")) for n in range(2)]
    job = client.post("/reconstruct/3d", files=files).raise_for_status().json()["id"]
    done = ended(client, job)
    assert done["status"] == "succeeded", done["error"]
    points = json.loads(result(client, job, "run.json"))["points"]
    for name, kind in (("scene.glb", "glb"), ("scene.ply", "ply")):
        loaded = trimesh.load(io.BytesIO(result(client, job, name)), file_type=kind)
        clouds = [loaded] if isinstance(loaded, trimesh.PointCloud) else loaded.geometry.values()
        counts = [len(one.vertices) for one in clouds if isinstance(one, trimesh.PointCloud)]
        assert counts == [points]
    assert len(json.loads(result(client, job, "cameras.json"))["views"]) == 2


def test_what_is_offered_has_its_limits_its_quality_and_its_worker(client):
    offered = {one["name"]: one for one in client.get("/artifacts").json()}
    assert offered.keys() == {"film", "scene", "start"}
    assert all(one["workers"] == 1 and one["bits"] == "W4A8" for one in offered.values())
    assert offered["film"]["quality"]["psnr"] > 0
    assert [offered[name]["limits"]["image"] for name in ("film", "start")] == ["none", "required"]
    for one in offered.values():
        (tested,) = one["tested"].values()
        assert (tested["verdict"], tested["failures"]) == ("passed", {})
        assert {"hadamard_quantize", "linear_packed"} <= tested["versions"].keys()


def stopped_in_the_middle(client: httpx.Client, kill) -> dict:
    """The ended job LONG, `kill` called after its second progress event and before its last."""
    job = client.post("/generate/video", json=LONG).raise_for_status().json()["id"]
    seen = 0
    for event, data in events(client, job):
        seen += event == "progress"
        if event == "progress" and seen == 2:
            assert data["step"] < data["of"]
            kill()
        if event == "done":
            return data
    raise AssertionError("the stream ended before its job")


def test_a_killed_worker_s_job_is_done_again_and_committed_once(client, served, uninterrupted):
    done = stopped_in_the_middle(client, lambda: os.kill(worker_of(served.pid), signal.SIGKILL))
    assert (done["status"], done["attempt"]) == ("succeeded", 2)
    assert np.array_equal(frames(result(client, done["id"], "video.mp4")), uninterrupted)
    assert committed(served, done["id"]) == {"2"}


def test_a_job_outlives_the_queue_server_s_death_and_is_committed_once(client, served, uninterrupted):
    def kill() -> None:
        with Redis(unix_socket_path=str(EmbeddedServer(served.data).socket), decode_responses=True) as redis:
            pid = int(redis.info("server")["process_id"])
        os.kill(pid, signal.SIGKILL)

    done = stopped_in_the_middle(client, kill)
    assert done["status"] == "succeeded"
    assert np.array_equal(frames(result(client, done["id"], "video.mp4")), uninterrupted)
    assert committed(served, done["id"]) == {str(done["attempt"])}


def committed(served: demo.Served, job: str) -> set[str]:
    """The attempts of a job that left files behind."""
    return {path.name for path in (served.data / "results" / "jobs" / job).iterdir()}
