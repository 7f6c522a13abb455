"""`make test` runs every test folder: pytest's own list of folders to pass over contains "dist"."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers import REPO


def test_every_test_file_is_collected():
    told = subprocess.run([sys.executable, "-m", "pytest", "tests", "--collect-only"], cwd=REPO,
                          env={k: v for k, v in os.environ.items() if k != "PYTEST_ADDOPTS"}, capture_output=True,
                          text=True, timeout=100)
    assert told.returncode == 0, told.stdout + told.stderr
    collected = {Path(line.partition(":")[0]) for line in told.stdout.splitlines() if line.startswith("tests/")}
    files = {path.relative_to(REPO) for path in (REPO / "tests").rglob("test_*.py")}
    optional = {path for path in files if "\npytest.importorskip(" in (REPO / path).read_text()}
    assert {path.parts[1] for path in collected} == {"cpu", "dist", "gpu", "parity"}
    assert files - optional <= collected <= files
