from __future__ import annotations

from ipaddress import ip_network
from pathlib import Path

import pytest
from pydantic import ValidationError

from service.settings import Settings, from_environment, to_environment


def test_everything_has_a_default_that_stays_on_this_machine(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    settings = from_environment({})
    assert (settings.redis_url, settings.host, settings.port) == (None, "127.0.0.1", 8000)
    assert (settings.lease_seconds, settings.beat_seconds) == (30, 10)
    assert settings.results_location == (tmp_path / ".lowbit" / "results").as_uri()


def test_the_environment_sets_them(monkeypatch):
    monkeypatch.setenv("LOWBIT_REDIS_URL", "redis://there:6379")
    monkeypatch.setenv("LOWBIT_ARTIFACTS", "/a:/b")
    monkeypatch.setenv("LOWBIT_LEASE_SECONDS", "2")
    monkeypatch.setenv("LOWBIT_BEAT_SECONDS", "0.5")
    settings = from_environment()
    assert settings.redis_url == "redis://there:6379"
    assert settings.artifacts == (Path("/a"), Path("/b"))
    assert settings.lease_seconds == 2


@pytest.mark.parametrize("verify", [True, False])
def test_a_worker_is_handed_them_whole(verify):
    settings = Settings(verify=verify, artifacts=(Path("/a"), Path("/b")), lease_seconds=40)
    values = {name.removeprefix("LOWBIT_").lower(): value for name, value in to_environment(settings).items()}
    assert Settings(**values) == settings


def test_a_misspelled_setting_stops_the_start():
    with pytest.raises(ValueError, match=r"LOWBIT_LEASE_SECOND\b.*LOWBIT_LEASE_SECONDS"):
        from_environment({"LOWBIT_LEASE_SECOND": "2", "PATH": "/bin"})


@pytest.mark.parametrize(
    "change",
    [
        {"lease_seconds": 10, "beat_seconds": 6},
        {"max_attempts": 0},
        {"port": 70000},
        {"queue_prefix": "a{b}"},
        {"fetch_hosts": "https://images.example.org"},
        {"fetch_hosts": "images.*"},
        {"fetch_networks": "10.0.0.1/8"},
        {"fetch_ports": "0"},
    ],
)
def test_a_value_that_cannot_work_stops_the_start(change):
    with pytest.raises(ValidationError):
        Settings(**change)


def test_lists_are_split_and_go_to_another_process_whole(monkeypatch):
    monkeypatch.setenv("LOWBIT_FETCH_HOSTS", "Images.example.org, *.cdn.example.net")
    monkeypatch.setenv("LOWBIT_FETCH_NETWORKS", "10.1.0.0/16,fd00:1::/32")
    monkeypatch.setenv("LOWBIT_FETCH_PORTS", "443,9000")
    monkeypatch.setenv("LOWBIT_ARTIFACTS", "/a,1:/b")
    settings = from_environment()
    assert settings.fetch_hosts == ("images.example.org", "*.cdn.example.net")
    assert settings.fetch_networks == (ip_network("10.1.0.0/16"), ip_network("fd00:1::/32"))
    assert (settings.fetch_ports, settings.artifacts) == ((443, 9000), (Path("/a,1"), Path("/b")))
    environment = to_environment(settings)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert from_environment() == settings
