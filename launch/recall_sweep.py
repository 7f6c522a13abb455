#!/usr/bin/env python3
"""Train two-layer models on multi-query associative recall and draw the recall–memory frontier.

    python launch/recall_sweep.py --config configs/recall/cpu.yaml --output runs/recall_cpu

Started again with the same output folder, finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from based_mp.errors import UserError, run_cli  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a sweep, such as configs/recall/cpu.yaml")
    parser.add_argument("--output", type=Path, required=True, help="folder of results.jsonl, table.md and frontier.png")
    parser.add_argument("--plot-setting", help="LENGTHxPAIRS of the figure; default the hardest training setting")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and start nothing")
    parser.add_argument("--report", action="store_true", help="table and figure of the finished runs; start nothing")
    a = parser.parse_args()
    from based_mp.evaluation import recall_report, recall_sweep
    sweep = recall_sweep.load_sweep(a.config)
    if a.dry_run:
        for run in sweep.runs():
            print(recall_sweep.title(run))
        return
    hardest = max(sweep.train, key=lambda setting: (setting.length, setting.pairs))
    setting = a.plot_setting or f"{hardest.length}x{hardest.pairs}"
    tested = [f"{test.length}x{test.pairs}" for test in sweep.test]
    if setting not in tested:
        raise UserError(f"{setting} is not tested by {a.config}: give --plot-setting one of {', '.join(tested)}")
    results = a.output / "results.jsonl"
    records = recall_sweep.finished(sweep, results) if a.report else recall_sweep.run_sweep(sweep, results)
    if not records:
        raise UserError(f"{results} has no run of this sweep yet: leave out --report")
    table = recall_report.table(records)
    (a.output / "table.md").write_text(table + "\n", encoding="utf-8")
    print(table)
    recall_report.frontier(records, setting, a.output / "frontier.png")


if __name__ == "__main__":
    run_cli(main)
