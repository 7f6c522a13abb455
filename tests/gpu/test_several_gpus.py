"""Training on two or more GPUs: layouts equal one GPU, checkpoints resume and reshard, text is the same."""

import json
import os
import sys

import pytest
import torch

from benchmarks import scaling
from tests.helpers import REPO, run_distributed

pytestmark = pytest.mark.skipif(torch.cuda.device_count() not in (2, 4, 8), reason="needs 2, 4 or 8 GPUs")


@pytest.mark.timeout(400)
def test_layouts_checkpoints_and_text(tmp_path, monkeypatch):
    out = tmp_path / "record.jsonl"
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--stages", "equality", "checkpoint", "--budget", "300",
                                      "--json", str(out)])
    scaling.main()
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 9
    for row in rows:
        assert row["within_limits"] is not False and "error" not in row and "skipped" not in row, row


@pytest.mark.timeout(120)
def test_everything_arrives_in_the_others_memory():
    gpus = torch.cuda.device_count()
    seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
    run_distributed(gpus, REPO / "tests" / "dist" / "exchange_worker.py", ["cuda"], timeout=100,
                    env={"CUDA_VISIBLE_DEVICES": seen, "DS_ACCELERATOR": "cuda", "NCCL_NVLS_ENABLE": "0"})
