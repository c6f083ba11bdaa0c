"""What `lowbit demo` makes of what came back; the service itself is tried in test_end_to_end.py."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
from rich.console import Console

from service import demo
from service.demo import VIDEO, Ran


def test_events_are_read_off_a_stream_with_comments_and_numbers():
    lines = [
        "id: 1",
        "event: status",
        'data: {"status": "queued"}',
        "",
        ": still there",
        "",
        "event: done",
        'data: {"a": 1}',
    ]
    assert list(demo.events(iter(lines))) == [("status", {"status": "queued"}), ("done", {"a": 1})]


@pytest.fixture
def half(tmp_path: Path) -> dict:
    """One half of a report, of a network that shrank from 3000 to 1000 bytes and from 8 to 4 seconds."""
    ran, offered = {}, {}
    for side, size, seconds in ((VIDEO.full, 3000, 8.0), (VIDEO.compressed, 1000, 4.0)):
        file = tmp_path / side.name / VIDEO.file
        file.parent.mkdir(parents=True)
        file.write_bytes(bytes(size))
        record = {"seconds": {"total": seconds}, "kernels": {}, "attention": {"effective_density": 1.0}}
        ran[side.name] = Ran(tmp_path, record)
        offered[side.name] = {"bytes": 2 * size, "quality": {"psnr": 25.5} if size == 1000 else {}}
    return demo._compared(VIDEO, tmp_path, ran, offered)


def test_a_report_has_both_sides_and_their_ratio(half):
    assert half["ratio"] == {"bytes": 3.0, "seconds": 2.0}
    assert (half["full"]["bytes"], half["full"]["psnr"]) == (3000, None)
    assert (half["compressed"]["bytes"], half["compressed"]["psnr"]) == (1000, 25.5)


def test_the_table_says_what_the_report_says(half):
    out = io.StringIO()
    Console(file=out, width=120).print(demo.table({"video": half}))
    for words in ("the reference", "PSNR 25.5 dB", "3.00× smaller", "2.00× faster"):
        assert words in out.getvalue()


def test_a_service_that_ends_at_once_is_told_with_its_log(tmp_path):
    with (
        pytest.raises(ValueError, match=r"ended with 2; see .*serve\.log"),
        demo.served(tmp_path, tmp_path / "serve.log"),
    ):
        pass


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="not the demo's"):
        demo._cleared(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years"
    again = tmp_path / "out"
    for _ in range(2):
        demo._cleared(again)
        (again / "views").mkdir()
    assert {path.name for path in again.iterdir()} == {"serve.log", "views"}


def test_the_rows_are_the_report_s(half):
    rows = list(demo._rows({"video": half}, 150.0, 3 * 2**30))
    assert [(row["metric"], row["value"]) for row in rows] == [
        ("wall clock", 150.0), ("peak memory", 3.0), ("bytes", 1000), ("seconds", 4.0),
    ]  # fmt: skip
    assert rows[2]["baseline"] == {"name": "demo-video", "value": 3000}


def test_the_peak_is_at_least_what_one_process_was_seen_to_hold():
    peak = demo.Peak()
    held = bytearray(b"x") * 2**28
    time.sleep(1.2)
    assert peak.stop() >= len(held)
