"""What a checkpoint's folder tells of the Hugging Face hub that it came from. Nothing is asked over a network."""

from __future__ import annotations

import re
from pathlib import Path

COMMIT = re.compile(r"[0-9a-f]{40}")


def name(folder: Path) -> str:
    """The checkpoint's: ORGANIZATION/NAME of a folder in the hub's cache, else the folder's own."""
    repository = _snapshot(folder)
    return folder.resolve().name if repository is None else repository.removeprefix("models--").replace("--", "/")


def revision(folder: Path) -> str | None:
    """The commit: of a snapshot in the hub's cache, or of a download into a folder whose files all are of one."""
    if _snapshot(folder) is not None:
        return folder.resolve().name
    notes = (folder / ".cache" / "huggingface" / "download").rglob("*.metadata")
    commits = {note.read_text(errors="replace").partition("\n")[0].strip() for note in notes}
    commit = commits.pop() if len(commits) == 1 else ""
    return commit if COMMIT.fullmatch(commit) else None


def _snapshot(folder: Path) -> str | None:
    """models--ORGANIZATION--NAME where the folder is models--ORGANIZATION--NAME/snapshots/COMMIT."""
    path = folder.resolve()
    kept = path.parent.name == "snapshots" and COMMIT.fullmatch(path.name)
    repository = path.parent.parent.name
    return repository if kept and repository.startswith("models--") else None
