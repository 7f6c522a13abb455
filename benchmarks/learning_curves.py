#!/usr/bin/env python3
"""Validation perplexity of runs side by side, read from their TensorBoard events, as a PNG and a table.

    python benchmarks/learning_curves.py --run BASED=runs/based_small/tensorboard \\
        --run attention=runs/attention_small/tensorboard --output docs/learning_curves.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from based_mp.errors import UserError, run_cli  # noqa: E402
from based_mp.evaluation.figures import pyplot  # noqa: E402


def curve(folder: str, tag: str) -> tuple[list[int], list[float]]:
    """(steps, values) of one scalar. Raises UserError where the run has none."""
    if not Path(folder).is_dir():
        raise UserError(f"the folder {folder} is missing: give --run NAME=FOLDER with a run's TensorBoard events")
    events = EventAccumulator(folder, size_guidance={"scalars": 0})
    events.Reload()
    if tag not in events.Tags()["scalars"]:
        raise UserError(f"{folder} has no {tag}: train with validation.interval > 0, or choose another --tag")
    points = events.Scalars(tag)
    return [p.step for p in points], [p.value for p in points]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--tag", default="valid/perplexity")
    parser.add_argument("--output", type=Path, required=True)
    a = parser.parse_args()
    figure, axes = pyplot().subplots(figsize=(7, 4.5))
    for run in a.run:
        name, _, folder = run.partition("=")
        steps, values = curve(folder, a.tag)
        axes.plot(steps, values, marker=".", label=name)
        print(f"{name:12} " + " ".join(f"{s}:{v:.1f}" for s, v in zip(steps, values, strict=True)))
    axes.set(xlabel="optimizer step", ylabel=a.tag, yscale="log")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(a.output, dpi=120)


if __name__ == "__main__":
    run_cli(main)
