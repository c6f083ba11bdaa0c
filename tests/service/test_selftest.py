"""`lowbit selftest`: what runs, whether it is right, and an exit code that says so."""

from __future__ import annotations

import re

import pytest
import torch
from typer.testing import CliRunner

from quant_runtime.kernels._versions import OPS, Version
from service.cli import app
from tests.service.worker.test_machine import broken, scene  # noqa: F401  fixtures


@pytest.fixture
def lowbit(scene, monkeypatch):  # noqa: F811
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr("service.logs.configure", lambda level: None)

    def lowbit(*words: str):
        return CliRunner().invoke(app, ["selftest", str(scene / "room"), "--device", "cpu", *words])

    return lowbit


def rows(text: str) -> dict[str, list[str]]:
    """op -> its cells."""
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if "│" in line]
    return {one[0]: one[1:] for one in cells}


def test_where_every_kernel_is_right_it_ends_with_0_and_says_what_runs(lowbit):
    done = lowbit()
    assert done.exit_code == 0
    shown = rows(done.output)
    assert {"linear_packed", "quantize_rows"} <= shown.keys()
    own = str(OPS["linear_packed"].running("cpu"))
    assert (shown["linear_packed"][0], shown["linear_packed"][-1]) == (own, "right")
    assert re.search(r"^linear by int8, ", done.output, re.M)
    assert "passed: every kernel is right" in done.output


def test_where_one_is_wrong_it_ends_with_1_and_says_which(lowbit, broken):  # noqa: F811
    done = lowbit()
    assert done.exit_code == 1
    assert rows(done.output)["linear_packed"][-1] == "WRONG"
    assert "linear_packed: broken is off by 1, where 1e-06 is allowed" in done.output
    assert "refused" in done.output


def test_with_fallback_it_says_what_would_run_in_its_place_and_ends_with_1_all_the_same(lowbit, broken):  # noqa: F811
    done = lowbit("--fallback")
    assert done.exit_code == 1
    shown = rows(done.output)["linear_packed"]
    assert shown[0] == f"{broken.versions('cpu')[1]}, not broken"
    assert shown[-1] == "right"


def test_a_shape_in_a_message_is_shown_as_it_is(lowbit, monkeypatch):
    op = OPS["quantize_rows"]
    wrong = Version(lambda *args: tuple(torch.zeros(2, 3) for _ in range(2)), "broken")
    monkeypatch.setitem(op._versions, "cpu", (wrong,))
    assert "broken answers torch.float32 [2, 3], torch.float32 [2, 3], where" in lowbit().output


def test_a_folder_that_is_no_artifact_is_refused_in_one_line(tmp_path):
    done = CliRunner().invoke(app, ["selftest", str(tmp_path), "--device", "cpu"])
    assert done.exit_code == 2
    assert "is no artifact: it has no manifest.json" in done.output
