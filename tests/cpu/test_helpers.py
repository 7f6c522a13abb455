"""Processes that tests start end with the tests, however these end."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.helpers import REPO

SLEEPER = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1], str(os.getpid())).touch(); time.sleep(100)"


def test_killed_tests_leave_no_process(tmp_path: Path):
    sleeper, started = tmp_path / "sleeper.py", tmp_path / "started"
    sleeper.write_text(SLEEPER)
    started.mkdir()
    call = f"from tests.helpers import run_distributed as r; r(2, {str(sleeper)!r}, [{str(started)!r}], poison=False)"
    tests = subprocess.Popen([sys.executable, "-c", call], cwd=REPO)
    wait_until(lambda: len(list(started.iterdir())) == 2)
    tests.kill()
    tests.wait()
    wait_until(lambda: not any(running(int(path.name)) for path in started.iterdir()))


def running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
