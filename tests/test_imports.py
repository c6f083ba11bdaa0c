"""What an import may cost: the API and the command line start without torch, and no import reaches out."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"torch", "diffusers", "transformers", "triton", "av", "trimesh", "quant_runtime"}


def loaded_by(program: str) -> set[str]:
    program += "\nimport sys; print(*{name.split('.')[0] for name in sys.modules})"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


@pytest.mark.parametrize("module", ["service.api.app", "service.api.main", "service.cli", "models.base"])
def test_the_api_and_the_command_line_load_no_torch(module):
    assert not loaded_by(f"import {module}") & HEAVY


def test_the_worker_s_loop_loads_no_torch_until_a_model_is_loaded():
    assert not loaded_by("import service.worker.main") & HEAVY


def test_the_command_line_loads_no_server_before_it_is_asked_to_serve():
    assert not loaded_by("import service.cli") & {"fastapi", "uvicorn", "redis", "obstore"}


def test_importing_reads_no_setting_and_opens_no_connection():
    program = """
import os, socket
os.environ |= {"LOWBIT_LEASE_SECONDS": "nonsense", "LOWBIT_MISSPELLED": "1"}
def refuse(*_): raise AssertionError("an import opened a connection")
socket.socket.connect = refuse
import service.api.main, service.worker.main, service.queue.embedded, service.queue.follow, service.cli
try:
    service.cli._settings()
except BaseException as error:
    assert type(error).__name__ == "Exit", error  # what an import that read them would have met
else:
    raise AssertionError("the settings were good after all")
"""
    loaded_by(program)
