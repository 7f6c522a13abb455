#!/usr/bin/env python3
"""Does a long run's memory grow? Trains smoke_cpu for 2,000 steps and reads the resident memory off its log lines.

    make quickstart-data && python benchmarks/rss_2000_steps.py [--steps 2000] [--processes 2]

Prints a JSON line; exits 1 where rank 0's memory in the last tenth exceeds that after a quarter by more than 5 %.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

REPO = Path(__file__).resolve().parents[1]
LINE = re.compile(r"step +(\d+)/.*mem +([\d.]+) GiB")
ALLOWED_GROWTH = 1.05


def train(steps: int, processes: int) -> list[tuple[int, float]]:
    """(step, GiB resident) of every log line; validation, samples and checkpoints happen as in the quick start."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes),
                   "--standalone", "launch/pretrain.py", "--config", "configs/smoke_cpu.yaml",
                   f"training.steps={steps}", f"logging.log_interval={max(steps // 40, 1)}",
                   f"checkpoint.dir={folder}/checkpoints", f"logging.tensorboard_dir={folder}/tensorboard"]
        run = subprocess.run(command, cwd=REPO, capture_output=True, text=True,
                             env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"})
    if run.returncode:
        sys.exit(f"training failed:\n{run.stdout[-2000:]}{run.stderr[-4000:]}")
    return [(int(step), float(memory)) for step, memory in LINE.findall(run.stdout)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    points = train(arguments.steps, arguments.processes)
    settled = mean(gib for step, gib in points if arguments.steps / 4 <= step < arguments.steps / 2)
    last = mean(gib for step, gib in points if step > 0.9 * arguments.steps)
    print(json.dumps({"steps": arguments.steps, "processes": arguments.processes,
                      "gib_first_line": points[0][1], "gib_second_quarter": round(settled, 3),
                      "gib_last_tenth": round(last, 3)}))
    sys.exit(last > ALLOWED_GROWTH * settled)


if __name__ == "__main__":
    main()
