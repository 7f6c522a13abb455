#!/usr/bin/env python3
"""Draw recall accuracy against generation state and speed, from results of launch/evaluate.py.

    for model in based_360m attention_360m mamba_360m; do
      python launch/evaluate.py --checkpoint runs/$model/checkpoints --name $model --output recall.json \\
        --task swde=swde.jsonl --task fda=fda.jsonl --task squad_completion=squad.jsonl --speed 16x1024x128
    done
    python launch/tradeoff.py --results recall.json --output tradeoff.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from based_mp.errors import run_cli  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, nargs="+", required=True, help="files of launch/evaluate.py --output")
    parser.add_argument("--output", type=Path, required=True, help="PNG")
    a = parser.parse_args()
    from based_mp.evaluation import tradeoff
    points = tradeoff.read_points(a.results)
    print(tradeoff.table(points))
    tradeoff.plot(points, a.output)


if __name__ == "__main__":
    run_cli(main)
