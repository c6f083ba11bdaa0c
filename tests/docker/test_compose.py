"""What ships for docker compose is valid, and names only settings and files that exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from prometheus_client import start_http_server

from service import metrics
from service.settings import PREFIX, Settings

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
SETTINGS = {PREFIX + name.upper() for name in Settings.model_fields}


def compose() -> dict:
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text())


def test_the_compose_file_is_valid():
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", "docker-compose.yml"]
    run = subprocess.run(check, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout


def test_it_holds_the_whole_service():
    services = compose()["services"]
    assert set(services) == {"valkey", "api", "worker", "worker-gpu", "prometheus", "grafana"}
    assert services["worker-gpu"]["profiles"] == ["gpu"]
    assert "profiles" not in services["worker"]  # without a GPU it serves from the CPU


def test_every_setting_it_gives_is_one():
    given = {name for service in compose()["services"].values() for name in service.get("environment", {})}
    given |= {name for file in DOCKERFILES for name in re.findall(rf"{PREFIX}\w+", file.read_text())}
    ours = {name for name in given if name.startswith(PREFIX)}
    assert len(ours) > 5
    assert ours <= SETTINGS


def test_every_file_it_mounts_or_builds_from_is_there():
    for service in compose()["services"].values():
        if "build" in service:
            assert (ROOT / service["build"]["dockerfile"]).is_file()
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("./docker"):
                assert (ROOT / source).is_dir()


def test_nothing_is_open_to_other_machines_by_default():
    ports = [port for service in compose()["services"].values() for port in service.get("ports", [])]
    assert len(ports) == 3
    assert all(port.startswith("127.0.0.1:") for port in ports)


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_images_run_as_nobody_in_particular_and_know_their_health(file):
    text = file.read_text()
    last = text.split("FROM ")[-1]
    assert "USER 10001" in last
    assert "HEALTHCHECK" in last


def test_prometheus_asks_the_services_that_there_are_where_they_answer():
    config = yaml.safe_load((ROOT / "docker/prometheus/prometheus.yml").read_text())
    asked = {
        (name, found["port"])
        for job in config["scrape_configs"]
        for found in job["dns_sd_configs"]
        for name in found["names"]
    }
    assert asked == {("api", 8000), ("worker", 9100), ("worker-gpu", 9100)}
    assert "LOWBIT_METRICS_PORT=9100" in (ROOT / "docker/worker.Dockerfile").read_text()


@pytest.mark.parametrize(
    ("age", "state", "healthy"), [(1.0, "ready", True), (1.0, "refused", False), (61.0, "ready", False)]
)
def test_a_worker_is_healthy_that_tells_that_it_lives_and_has_something_to_run(age, state, healthy):
    text = (ROOT / "docker/worker.Dockerfile").read_text().replace("\\\n", "")
    command = json.loads(re.search(r"^HEALTHCHECK .* CMD (\[.*\])$", text, re.M)[1])
    metrics.in_state(state)
    metrics.worker_beat_age_seconds.set_function(lambda: age)
    server, serving = start_http_server(0, "127.0.0.1", metrics.REGISTRY)
    try:
        program = command[2].replace(":9100", f":{server.server_port}")
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    finally:
        server.shutdown()
        server.server_close()
        serving.join()
        metrics.worker_beat_age_seconds.set_function(float)
    assert done.stderr == ""
    assert (done.returncode == 0) == healthy
