"""What the texts say of this repository is so: their tables are those of the rows, and what they link to is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from quant_runtime import tables

ROOT = Path(__file__).parents[2]
TEXTS = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")] + sorted(ROOT.glob("docs/**/*.md"))


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_its_tables_are_current(path):
    text = path.read_text()
    assert tables.filled(text, ROOT / "docs" / "results") == text, f"run python -m quant_runtime.tables {path.name}"


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_it_links_to_is_there(path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (path.parent / target).exists(), target
