"""What a run tells while it goes on."""

from __future__ import annotations

import io
import re

import pytest

from data_prep import progress as module
from data_prep.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def told(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, clock: list[float], shown: bool = True) -> str:
    """A quarter of 80 MB read in 40 s, 30 MB of text in 1,000 documents."""
    monkeypatch.setattr(module.sys, "stderr", stream)
    with Progress({"a": 60_000_000, "b": 20_000_000}, shown) as progress:
        for second in range(1, 41):
            clock[0] += 1
            progress.advance("a", 500_000 * second, 750_000, 25, 3)
    return stream.getvalue()


def test_plain_lines_elsewhere_than_on_a_terminal(monkeypatch, clock):
    lines = told(monkeypatch, io.StringIO(), clock).splitlines()
    assert lines == ["18.8 %, 750 documents, 0.8 MB/s of text, 3 rejected, 130 s left"]


def test_a_bar_on_a_terminal(monkeypatch, clock):
    shown = told(monkeypatch, Terminal(), clock)
    assert re.search(r"25%\|.*20.0M/80.0M .*1,000 documents, 0.8 MB/s of text, 3 rejected", shown.split("\r")[-1])


def test_other_processes_of_a_run_are_silent(monkeypatch, clock):
    assert told(monkeypatch, Terminal(), clock, shown=False) == told(monkeypatch, io.StringIO(), clock, False) == ""
