import json

import pytest
import torch

from quant_runtime import report


def test_a_row_rounds_what_was_measured_and_keeps_what_was_counted():
    row = report.row("a", "b", 1234567.0, "s", "lower", samples=1, baseline=("c", 7654321), spread=0.123456789)
    assert (row["value"], row["baseline"], row["spread"]) == (1234600, {"name": "c", "value": 7654321}, 0.12346)


def test_a_run_that_breaks_off_leaves_the_last_whole_one(tmp_path):
    path, command = tmp_path / "it.jsonl", ["python", "-m", "it"]
    report.write(path, "it", [report.row("a", "b", 1.0, "s", "lower", samples=1)], command, torch.device("cpu"))
    before = path.read_text()
    row = json.loads(before)
    assert (row["bench"], row["case"], row["command"]) == ("it", "a", "python -m it")
    assert row["versions"]["torch"] == torch.__version__

    def broken():
        yield report.row("other", "b", 2.0, "s", "lower", samples=1)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        report.write(path, "it", broken(), command, torch.device("cpu"))
    assert path.read_text() == before
