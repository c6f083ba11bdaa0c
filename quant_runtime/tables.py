"""python -m quant_runtime.tables FILE.md ...: writes the measured figures into a text, from the rows in docs/results/.

What stands between `<!-- figures: NAME -->` and `<!-- /figures -->` becomes the table of docs/results/NAME.jsonl, with
the command, commit and device of its rows below it; `<!-- figures: NAME: one metric, another -->` takes the rows of
these metrics alone. `--check` writes nothing and fails where a table is not current.
"""

from __future__ import annotations

import json
import re
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

PLACE = re.compile(
    r"<!-- figures: (?P<asked>(?P<name>[\w.-]+)(: (?P<metrics>[^>]+?))?) -->\n.*?<!-- /figures -->", re.DOTALL
)
RESULTS = Path("docs/results")


def filled(text: str, results: Path) -> str:
    """The text with every table as its rows say. Raises FileNotFoundError for a name without a file."""
    return PLACE.sub(lambda found: _section(found, results), text)


def _section(found: re.Match[str], results: Path) -> str:
    rows = [json.loads(line) for line in (results / f"{found['name']}.jsonl").read_text().splitlines()]
    if found["metrics"]:
        rows = [row for row in rows if row["metric"] in found["metrics"].split(", ")]
    return f"<!-- figures: {found['asked']} -->\n{table(rows)}\n\n{_source(rows)}\n<!-- /figures -->"


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| | | measured | against | ratio | |", "| --- | --- | ---: | --- | ---: | --- |"]
    for row in rows:
        base = row["baseline"]
        against = f"{_number(base['value'])} {row['unit']}, {base['name']}" if base else ""
        cells = [row["case"], row["metric"], f"{_number(row['value'])} {row['unit']}".strip(), against, _ratio(row)]
        lines.append(f"| {' | '.join([*cells, _error(row['error'])])} |")
    return "\n".join(lines)


def _ratio(row: dict[str, Any]) -> str:
    """How many times better than the baseline."""
    base = row["baseline"]
    if not base or not base["value"] or not row["value"]:
        return ""
    better = row["value"] / base["value"] if row["better"] == "higher" else base["value"] / row["value"]
    return f"{better:.2f}×"


def _error(error: Any) -> str:
    if isinstance(error, dict):
        return ", ".join(f"{k.replace('_', ' ')} {_number(v)}" for k, v in error.items() if v is not None)
    return "" if error is None else _number(error)


def _number(value: float) -> str:
    if isinstance(value, int) or (float(value).is_integer() and abs(value) >= 1000):
        return f"{int(value):,}"
    return f"{value:.4g}"


def _source(rows: list[dict[str, Any]]) -> str:
    told = {(row["command"], row["commit"], row["device"]) for row in rows}
    return "\n".join(f"`{command}`, commit {commit}, {device}" for command, commit, device in sorted(told))


def main() -> None:
    parser = ArgumentParser(prog="python -m quant_runtime.tables", description="Writes measured figures into texts.")
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    stale = []
    for path in given.files:
        before = path.read_text()
        after = filled(before, RESULTS)
        if after != before:
            stale.append(str(path))
            if not given.check:
                path.write_text(after)
    if given.check and stale:
        sys.exit(f"not current: {', '.join(stale)}; run python -m quant_runtime.tables {' '.join(stale)}")


if __name__ == "__main__":
    main()
