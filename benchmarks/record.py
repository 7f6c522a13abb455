"""What every benchmark's record names, and where it goes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any


def git_commit() -> str:
    """The short name of the commit that is checked out here, empty where git does not tell."""
    told = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True,
                          text=True)
    return told.stdout.strip()


def append(record: dict[str, Any], path: str | None) -> None:
    """Add a record to a file as a line of its own, where one is named."""
    if path:
        with open(path, "a") as file:
            file.write(json.dumps(record) + "\n")
