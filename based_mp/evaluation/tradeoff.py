"""The trade-off of the BASED paper (figure 2): recall against the generation state's size and against speed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from based_mp.errors import UserError
from based_mp.evaluation.figures import pyplot
from based_mp.evaluation.recall import TASKS


def read_points(path: Path) -> dict[str, dict[str, Any]]:
    """By model name: accuracy (mean *contains* over its recall tasks), tasks, state_bytes, tokens_per_second.

    From a file of launch/evaluate.py. Raises UserError for a model without recall tasks or without speed, and for
    models that were measured on different tasks or different batches.
    """
    points: dict[str, dict[str, Any]] = {}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} as results of launch/evaluate.py: {error}") from error
    for name, record in results.items():
        tasks = {task: record["tasks"][task]["metrics"]["contains"] for task in TASKS
                 if task in record.get("tasks", {})}
        if not tasks or "speed" not in record:
            missing = "--speed" if tasks else f"--task for one of {', '.join(TASKS)}"
            raise UserError(f"{name} in {path} has no result of {missing}: run launch/evaluate.py with it")
        speed = record["speed"]
        points[name] = {
            "tasks": sorted(tasks), "shape": [speed[key] for key in ("batch", "prompt", "new", "device")],
            "accuracy": sum(m["value"] for m in tasks.values()) / len(tasks),
            "error": 1.96 * sum(m.get("stderr", 0.0) ** 2 for m in tasks.values()) ** 0.5 / len(tasks),
            "state_bytes": speed["state_bytes"], "tokens_per_second": speed["tokens_per_second"]}
    if not points:
        raise UserError("the results hold no model: run launch/evaluate.py first")
    for key, what in (("tasks", "recall tasks"), ("shape", "batch, lengths and device of --speed")):
        kinds = {json.dumps(point[key]) for point in points.values()}
        if len(kinds) > 1:
            raise UserError(f"the models were measured with different {what} ({' and '.join(sorted(kinds)[:2])}): "
                            "measure them alike")
    return points


def table(points: dict[str, dict[str, Any]]) -> str:
    """In Markdown."""
    lines = ["| model | recall accuracy (95%) | state bytes a sequence | generated tokens/s |", "|---|---|---|---|"]
    for name, p in points.items():
        lines.append(f"| {name} | {100 * p['accuracy']:.1f} ± {100 * p['error']:.1f} | {p['state_bytes']:,} | "
                     f"{p['tokens_per_second']:,.0f} |")
    return "\n".join(lines)


def plot(points: dict[str, dict[str, Any]], path: Path) -> None:
    """Two panels, accuracy against state bytes and against tokens/s, as a PNG."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    first = next(iter(points.values()))
    batch, prompt, new, device = first["shape"]
    labels = {"state_bytes": "bytes of generation state a sequence",
              "tokens_per_second": f"generated tokens/s, batch {batch}, {prompt} + {new} tokens, {device}"}
    for axes, (key, label) in zip(panels, labels.items(), strict=True):
        for name, p in points.items():
            axes.errorbar(p[key], 100 * p["accuracy"], yerr=100 * p["error"], marker="o", capsize=3, label=name)
        axes.set(xscale="log", xlabel=label)
        axes.grid(True, which="both", alpha=0.3)
    panels[0].set_ylabel(f"recall accuracy (%), mean of {', '.join(first['tasks'])}")
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
