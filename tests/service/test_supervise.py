from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from service import supervise
from service.supervise import Supervised
from tests.service.queue.test_embedded import alive, wait_for

OBEDIENT = [sys.executable, "-c", "import sys; print('up', flush=True); sys.stdin.read()"]
DEAF = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(supervise, "BACKOFF_SECONDS", (0.05, 0.2))


def test_a_child_that_dies_is_started_again():
    with Supervised(OBEDIENT, os.environ, 5) as child:
        wait_for(lambda: child.pid)
        first = child.pid
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: child.pid not in (None, first))
        second = child.pid
    assert not alive(second)


def test_a_child_that_cannot_live_is_not_started_without_pause(tmp_path):
    program = [sys.executable, "-c", f"open({str(tmp_path / 'starts')!r}, 'a').write('x'); raise SystemExit(1)"]
    with Supervised(program, os.environ, 5):
        time.sleep(1.0)
    assert 1 <= len((tmp_path / "starts").read_text()) < 12


def test_a_child_that_does_not_listen_is_killed():
    with Supervised(DEAF, os.environ, 0.2) as child:
        wait_for(lambda: child.pid)
        pid = child.pid
    assert not alive(pid)


def test_a_child_does_not_outlive_a_parent_that_was_killed(tmp_path):
    program = f"""
import time
from service.supervise import Supervised
with Supervised({OBEDIENT!r}, {{}}, 5) as child:
    while child.pid is None:
        time.sleep(0.01)
    open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
    time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", program])
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    parent.kill()
    parent.wait()
    pid = int(Path(tmp_path / "pid").read_text())
    wait_for(lambda: not alive(pid))
