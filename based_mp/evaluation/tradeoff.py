"""The trade-off of the BASED paper (figure 2): recall against the generation state's size and against speed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from based_mp.errors import UserError
from based_mp.evaluation.figures import pyplot
from based_mp.evaluation.recall import TASKS


def read_points(path: Path) -> dict[str, dict[str, Any]]:
    """By model name: accuracy (mean *contains* over its recall tasks), its 95% interval, tasks, state_bytes,
    tokens_per_second.

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
            **_mean(list(tasks.values())),
            "state_bytes": speed["state_bytes"], "tokens_per_second": speed["tokens_per_second"]}
    if not points:
        raise UserError("the results hold no model: run launch/evaluate.py first")
    for key, what in (("tasks", "recall tasks"), ("shape", "batch, lengths and device of --speed")):
        kinds = {json.dumps(point[key]) for point in points.values()}
        if len(kinds) > 1:
            raise UserError(f"the models were measured with different {what} ({' and '.join(sorted(kinds)[:2])}): "
                            "measure them alike")
    return points


def _mean(tasks: list[dict[str, Any]]) -> dict[str, Any]:
    """The tasks' mean and its interval from theirs (MOVER, Zou & Donner 2008): none of 50 is not 0 ± 0."""
    count, mean = len(tasks), sum(task["value"] for task in tasks) / len(tasks)
    below, above = (sum((task.get("ci95", [0.0, 1.0])[side] - task["value"]) ** 2 for task in tasks) ** 0.5 / count
                    for side in (0, 1))
    return {"accuracy": mean, "interval": [mean - below, mean + above]}


def table(points: dict[str, dict[str, Any]]) -> str:
    """In Markdown."""
    lines = ["| model | recall accuracy (95%) | state bytes a sequence | generated tokens/s |", "|---|---|---|---|"]
    for name, p in points.items():
        low, high = p["interval"]
        lines.append(f"| {name} | {100 * p['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f}) | "
                     f"{p['state_bytes']:,} | {p['tokens_per_second']:,.0f} |")
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
            low, high = p["interval"]
            spread = [[100 * (p["accuracy"] - low)], [100 * (high - p["accuracy"])]]
            axes.errorbar(p[key], 100 * p["accuracy"], yerr=spread, marker="o", capsize=3, label=name)
        axes.set(xscale="log", xlabel=label)
        axes.grid(True, which="both", alpha=0.3)
    panels[0].set_ylabel(f"recall accuracy (%), mean of\n{', '.join(first['tasks'])}")
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
