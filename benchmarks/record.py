"""What every benchmark's record names."""

from __future__ import annotations

import subprocess
from pathlib import Path


def git_commit() -> str:
    """The short name of the commit that is checked out here, empty where git does not tell."""
    told = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True,
                          text=True)
    return told.stdout.strip()
