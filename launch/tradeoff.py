#!/usr/bin/env python3
"""Recall accuracy against generation state and speed: measures checkpoints and draws the trade-off.

    python launch/tradeoff.py --model BASED=runs/based_360m/checkpoints --model Mamba=runs/mamba_360m/checkpoints \\
      --task swde=swde.jsonl.zst --task fda=fda.jsonl.zst --task squad_completion=squad.jsonl.zst \\
      --output tradeoff.png

Every checkpoint goes through launch/evaluate.py, whose results stay in --results: models that are there already are
not measured again. Without --model it draws what --results has.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from based_mp.errors import UserError, run_cli  # noqa: E402


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", default=[], metavar="NAME=CHECKPOINT")
    parser.add_argument("--task", action="append", default=[], metavar="NAME=FILE", help="as launch/evaluate.py's")
    parser.add_argument("--speed", default="16x1024x128", metavar="BATCHxPROMPTxNEW", help="as launch/evaluate.py's")
    parser.add_argument("--limit", type=int, help="at most this many documents a task")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--results", type=Path, help="JSON file; default: --output with .json")
    parser.add_argument("--output", type=Path, required=True, help="PNG")
    return parser.parse_args()


def measure(name: str, checkpoint: str, a: argparse.Namespace, results: Path) -> None:
    """One checkpoint, in a process of its own. Raises UserError where it fails."""
    command = [sys.executable, str(Path(__file__).with_name("evaluate.py")), "--checkpoint", checkpoint, "--name", name,
               "--output", str(results), "--speed", a.speed, "--device", a.device]
    command += [part for task in a.task for part in ("--task", task)]
    command += [] if a.limit is None else ["--limit", str(a.limit)]
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise UserError(f"{name} could not be measured (see above): correct it and start again; what was measured "
                        f"before stays in {results}")


def main() -> None:
    a = parse()
    from based_mp.evaluation import tradeoff
    results = a.results or a.output.with_suffix(".json")
    for item in a.model:
        name, equals, checkpoint = item.partition("=")
        if not equals or not name or not checkpoint:
            raise UserError(f"--model {item} must have the form NAME=CHECKPOINT")
        try:
            known = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
        except ValueError as error:
            raise UserError(f"{results} holds no results of launch/evaluate.py: remove it, or give another --results") \
                from error
        if "speed" not in known.get(name, {}):
            measure(name, checkpoint, a, results)
    points = tradeoff.read_points(results)
    print(tradeoff.table(points))
    tradeoff.plot(points, a.output)


if __name__ == "__main__":
    run_cli(main)
