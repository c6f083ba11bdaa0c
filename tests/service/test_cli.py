"""The command itself, as processes: serving with nothing configured, and apart."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from models import stream
from models.wan import Wan
from quant_runtime.artifact import ArtifactError
from quant_runtime.attention import AttentionPlan
from quant_runtime.formats import W4A8
from quant_runtime.methods import Rtn
from service.cli import app
from tests.service.queue.test_embedded import wait_for
from tests.service.support import film, write_artifact


class Command:
    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        clean = {key: value for key, value in os.environ.items() if not key.startswith("LOWBIT_")}
        clean |= {"LOWBIT_DATA": str(folder / "data"), "LOWBIT_ARTIFACTS": str(folder / "artifacts")}
        clean["LOWBIT_SELFTEST"] = "off"  # the artifact is a manifest, and no more of it than the API reads
        self.log = folder / f"{arguments[0]}.log"
        with self.log.open("wb") as out:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "service.cli", *arguments],
                env=clean | environment,
                stdin=subprocess.DEVNULL,
                stderr=out,
            )  # fmt: skip

    def stop(self) -> int:
        self.popen.send_signal(signal.SIGTERM)
        return self.popen.wait(60)


@pytest.fixture
def run(tmp_path: Path) -> Iterator:
    write_artifact(tmp_path / "artifacts" / "film", film())
    started: list[Command] = []

    def run(*arguments: str, **environment: str) -> Command:
        started.append(Command(tmp_path, *arguments, **environment))
        return started[-1]

    yield run
    for command in started:
        if command.popen.poll() is None:
            command.stop()


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def answer(url: str) -> httpx.Response | None:
    try:
        return httpx.get(url)
    except httpx.TransportError:
        return None


def worker_of(pid: int) -> int | None:
    with suppress(OSError):  # a thread or a process that ends while it is looked at
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (thread / "children").read_text().split()):
                if b"worker" in Path(f"/proc/{child}/cmdline").read_bytes():
                    return child
    return None


def workers(url: str) -> int:
    offered = answer(f"{url}/artifacts")
    return 0 if offered is None or offered.is_error else offered.json()[0]["workers"]


def test_serve_needs_nothing_but_an_artifact_and_replaces_a_worker_that_dies(run, port, tmp_path):
    served = run("serve", "--port", str(port))
    url = f"http://127.0.0.1:{port}"
    wait_for(lambda: answer(f"{url}/readyz"))
    wait_for(lambda: workers(url) == 1)
    first = worker_of(served.popen.pid)
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: worker_of(served.popen.pid) not in (None, first))
    job = httpx.post(f"{url}/generate/video", json={"prompt": "a ball"})
    assert job.status_code == 202
    assert "text/html" in answer(f"{url}/docs").headers["content-type"]
    assert served.stop() == 0
    assert answer(f"{url}/livez") is None
    assert "Traceback" not in re.sub(r"(?m)^\{.*\}$", "", served.log.read_text())


def test_api_and_worker_apart_share_the_private_queue(run, port):
    api = run("api", "--port", str(port))
    wait_for(lambda: answer(f"http://127.0.0.1:{port}/readyz"))
    worker = run("worker", LOWBIT_METRICS_PORT="0", LOWBIT_DEVICE="cpu")
    wait_for(lambda: workers(f"http://127.0.0.1:{port}") == 1)
    assert api.stop() == 0
    assert worker.stop() == 0  # it keeps the server now, and stops it


@pytest.mark.parametrize(
    ("arguments", "environment", "hint"),
    [
        (["api"], {"LOWBIT_LEESE_SECONDS": "3"}, "LOWBIT_LEESE_SECONDS"),
        (["worker"], {"LOWBIT_BEAT_SECONDS": "29"}, "beat_seconds"),
        (["worker", "--artifacts", "/nowhere"], {"LOWBIT_METRICS_PORT": "0"}, "LOWBIT_ARTIFACTS"),
        (["worker"], {"LOWBIT_METRICS_HOST": "203.0.113.7"}, "LOWBIT_METRICS_PORT=0"),
        (["api"], {"LOWBIT_RESULTS_URL": "bogus://bucket"}, "bogus://bucket"),
        (["serve"], {"LOWBIT_RESULTS_URL": "bogus://bucket"}, "bogus://bucket"),
        (["serve", "--artifacts", "/nowhere"], {}, "LOWBIT_ARTIFACTS"),
    ],
)
def test_what_cannot_be_started_is_said_in_one_line(run, arguments, environment, hint):
    command = run(*arguments, **environment)
    assert command.popen.wait(60) == 2
    text = command.log.read_text()
    assert hint in text
    assert "Traceback" not in text


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> Path:
    """A compressed film model, one bit of whose weights has changed since."""
    folder = tmp_path_factory.mktemp("damaged")
    Wan().tiny(folder / "checkpoint")
    words = {"base": "tiny", "device": "cpu", "on_bytes": lambda done, of: None}
    stream.compress(Wan(), folder / "checkpoint", Rtn(), W4A8, AttentionPlan(), folder / "film", **words)
    weights = folder / "film" / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    return folder / "film"


@pytest.mark.parametrize(
    ("words", "environment", "checks"),
    [
        ([], {}, True),
        (["--no-verify"], {}, False),
        ([], {"LOWBIT_VERIFY": "false"}, False),
        (["--verify"], {"LOWBIT_VERIFY": "false"}, True),
    ],
)
def test_a_worker_leaves_out_the_hashes_only_where_it_is_told_to(damaged, monkeypatch, words, environment, checks):
    started = []
    monkeypatch.setattr("service.worker.main.work", lambda settings, load, *rest: started.append(load))
    monkeypatch.setattr("service.logs.configure", lambda level: None)
    for name in [name for name in os.environ if name.startswith("LOWBIT_")]:
        monkeypatch.delenv(name)
    done = CliRunner().invoke(app, ["worker", *words], env=environment, catch_exceptions=False)
    assert done.exit_code == 0
    (load,) = started
    if checks:
        with pytest.raises(ArtifactError, match="is damaged"):
            load(damaged, "cpu")
    else:
        assert load(damaged, "cpu").kind == "video"
