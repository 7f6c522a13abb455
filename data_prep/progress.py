"""Progress of a run over shards: a bar on a terminal, elsewhere a plain line every half minute."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """sizes: bytes of every input file. The share done is of file bytes, the speed of text bytes.

    shown: one process of several tells, of its own share.
    """

    def __init__(self, sizes: dict[str, int], shown: bool = True) -> None:
        self.shown = shown
        self.sizes, self.positions = sizes, dict.fromkeys(sizes, 0)
        self.text_bytes = self.documents = 0
        self.started = self.told = time.monotonic()
        self.bar = tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc="reading") \
            if shown and sys.stderr.isatty() else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def advance(self, path: str, position: int, text_bytes: int, documents: int, rejects: int) -> None:
        """`path` is read up to byte `position`; text_bytes and documents are what came since, rejects all so far."""
        self.positions[path] = max(position, self.positions[path])
        self.text_bytes += text_bytes
        self.documents += documents
        done, now = sum(self.positions.values()), time.monotonic()
        speed = self.text_bytes / 1e6 / max(now - self.started, 1e-9)
        counts = f"{self.documents:,} documents, {speed:.1f} MB/s of text, {rejects} rejected"
        if self.bar is not None:
            self.bar.set_postfix_str(counts, refresh=False)
            self.bar.update(done - self.bar.n)
        elif self.shown and now - self.told >= SECONDS_BETWEEN_LINES:
            self.told = now
            total = sum(self.sizes.values())
            left = (now - self.started) * (total / max(done, 1) - 1)
            print(f"{100 * done / max(total, 1):.1f} %, {counts}, {left:.0f} s left", file=sys.stderr, flush=True)
