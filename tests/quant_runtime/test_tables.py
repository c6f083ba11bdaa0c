import json
import sys

import pytest

from quant_runtime import report, tables

TEXT = "before\n<!-- figures: speed-cpu -->\nold\n<!-- /figures -->\nafter\n"


@pytest.fixture
def results(tmp_path, monkeypatch):
    rows = [
        report.row("loop", "time", 2.0, "s", "lower", samples=3, baseline=("float32", 5.0), error={"psnr": 31.25}),
        report.row("held out", "colour", 98.4375, "%", "higher", samples=64),
    ]
    same = {"command": "python -m it", "commit": "abc", "device": "a CPU"}
    folder = tmp_path / "docs" / "results"
    folder.mkdir(parents=True)
    (folder / "speed-cpu.jsonl").write_text("".join(json.dumps(row | same) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return folder


def test_a_table_stands_between_its_marks_and_all_else_stays(results):
    text = tables.filled(TEXT, results)
    assert text.startswith("before\n<!-- figures: speed-cpu -->\n| |")
    assert text.endswith("<!-- /figures -->\nafter\n")
    assert "| loop | time | 2 s | 5 s, float32 | 2.50× | psnr 31.25 |" in text
    assert "| held out | colour | 98.44 % |  |  |  |" in text
    assert "`python -m it`, commit abc, a CPU" in text
    assert "old" not in text
    assert tables.filled(text, results) == text


def test_a_place_may_ask_for_some_metrics(results):
    text = tables.filled(TEXT.replace("speed-cpu", "speed-cpu: colour, shape"), results)
    assert "held out" in text
    assert "loop" not in text
    assert tables.filled(text, results) == text


def test_a_name_without_rows_is_an_error(results):
    with pytest.raises(FileNotFoundError, match="other"):
        tables.filled("<!-- figures: other -->\n<!-- /figures -->", results)


def test_check_fails_where_a_table_is_not_current_and_writes_nothing(results, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text(TEXT)
    monkeypatch.setattr(sys, "argv", ["tables", "README.md", "--check"])
    with pytest.raises(SystemExit, match=r"README\.md"):
        tables.main()
    assert (tmp_path / "README.md").read_text() == TEXT
    monkeypatch.setattr(sys, "argv", ["tables", "README.md"])
    tables.main()
    monkeypatch.setattr(sys, "argv", ["tables", "README.md", "--check"])
    tables.main()
