"""Tensor-parallel generation gives the tokens of one process."""

import json

import pytest

from tests.helpers import REPO, run_distributed

WORKER = REPO / "tests" / "dist" / "generation_worker.py"


def generate(folder, tp):
    out = folder / f"{tp}.json"
    run_distributed(tp, WORKER, [out, tp])
    return json.loads(out.read_text())


@pytest.mark.parametrize("tp", [2, 4])
def test_equals_one_process(tmp_path, tp):
    one = generate(tmp_path, 1)
    assert len(one) == 3 and all(len(tokens) == 24 for greedy, *_ in one for tokens in greedy)
    assert generate(tmp_path, tp) == one
