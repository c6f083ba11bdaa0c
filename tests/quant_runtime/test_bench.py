import json
import sys

import pytest

from quant_runtime import bench
from quant_runtime.sparsity.base import TokenLayout

FIELDS = {"bench", "case", "metric", "value", "unit", "better", "baseline", "spread", "error", "samples", "command"}


@pytest.mark.parametrize("name", ["linear", "attention"])
def test_a_bench_writes_rows_that_say_all(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "LINEARS", ((40, 64, 32),))
    monkeypatch.setattr(bench, "ATTENTIONS", ((1, 2, TokenLayout(2, 8, 8), 16),))
    monkeypatch.setattr(bench, "keep_freed_memory", lambda: None)  # it would hold for the tests that follow
    arguments = [name, "--device", "cpu", "--rounds", "3", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    bench.main()
    rows = [json.loads(line) for line in (tmp_path / f"{name}-cpu.jsonl").read_text().splitlines()]
    assert all(row.keys() == FIELDS | {"commit", "device", "paths", "versions"} for row in rows)
    assert rows[0]["command"] == f"python -m quant_runtime.bench {' '.join(arguments)}"
    assert all(row["value"] > 0 and row["samples"] == 3 for row in rows)
    dense = [row["error"]["random"] for row in rows if "top-k" not in row["case"]]
    assert 0 < min(dense) <= max(dense) < 0.25
    assert str(tmp_path) in capsys.readouterr().out
