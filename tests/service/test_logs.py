from __future__ import annotations

import json
import subprocess
import sys

PROGRAM = """
import logging, structlog
from service import logs
logs.configure("info")
structlog.get_logger().bind(job="7").warning("job_failed", type="bad-input")
logging.getLogger("uvicorn.error").info("started on %s", 8000)
structlog.get_logger().debug("not shown")
try:
    1 / 0
except ZeroDivisionError as error:
    structlog.get_logger().error("fault", exc_info=error)
"""


def test_every_line_is_one_json_object_that_says_what_happened():
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in run.stderr.splitlines()]
    assert [(line["level"], line["event"]) for line in lines] == [
        ("warning", "job_failed"), ("info", "started on 8000"), ("error", "fault"),
    ]  # fmt: skip
    assert (lines[0]["job"], lines[0]["type"]) == ("7", "bad-input")
    assert "ZeroDivisionError" in lines[2]["exception"]
    assert run.stdout == ""
