"""Sample indices are built once where nodes share the cache folder, once per node where each has its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cpu.test_data_datasets import write_corpus


@pytest.mark.parametrize("shared", [True, False])
def test_index_is_built_once_per_node(tmp_path, run_distributed, shared):
    corpus = write_corpus(tmp_path / "one", 1, 200)
    caches = [str(tmp_path / "cache")] * 2 if shared else [str(tmp_path / f"node{i}") for i in range(2)]
    outputs = run_distributed(4, Path(__file__).parent / "cache_worker.py", [corpus, *caches])
    found = [re.search(r"written (\d+) samples (.*)", output).groups() for output in outputs]
    written = [int(count) for count, _ in found]
    assert written[0] > 0 and written[1] == written[3] == 0
    assert written[2] == (0 if shared else written[0])
    assert len({samples for _, samples in found}) == 1
