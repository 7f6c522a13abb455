"""The table and the figure of a recall sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from based_mp.evaluation.figures import pyplot


def best_runs(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best learning rate of every model (by the mean over its test settings, averaged over the seeds)."""
    groups: dict[tuple, dict[float, list[dict]]] = {}
    for record in records:
        size = " ".join(f"{key}={value}" for key, value in record["size"].items())
        groups.setdefault((record["family"], size), {}).setdefault(record["lr"], []).append(record)
    out = []
    for (family, size), by_lr in groups.items():
        lr, runs = max(by_lr.items(), key=lambda item: sum(sum(r["accuracy"].values()) for r in item[1]) / len(item[1]))
        mean = {name: sum(r["accuracy"][name] for r in runs) / len(runs) for name in runs[0]["accuracy"]}
        out.append({"family": family, "size": size, "lr": lr, "accuracy": mean, "state_bytes": runs[0]["state_bytes"],
                    "seeds": len(runs)})
    return out


def table(records: list[dict[str, Any]]) -> str:
    """Accuracy of every model by test setting, and the bytes of its state at the longest, in Markdown."""
    rows = best_runs(records)
    settings = list(rows[0]["accuracy"])
    longest = max(rows[0]["state_bytes"], key=int)
    head = ["model", "size", *(f"{s.split('x')[1]} pairs in {s.split('x')[0]}" for s in settings),
            f"state bytes at {longest} tokens", "learning rate"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [row["family"], row["size"], *(f"{row['accuracy'][s]:.3f}" for s in settings),
                 f"{row['state_bytes'][longest]:,}", f"{row['lr']:g}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def frontier(records: list[dict[str, Any]], setting: str, path: Path) -> None:
    """Accuracy at one setting ("LENGTHxPAIRS") against state bytes at its length, a line a system, as a PNG."""
    plt = pyplot()
    length, pairs = setting.split("x")
    points: dict[str, list[tuple[int, float, str]]] = {}
    for row in best_runs(records):
        points.setdefault(row["family"], []).append((row["state_bytes"][length], row["accuracy"][setting], row["size"]))
    figure, axes = plt.subplots(figsize=(9, 4.5))
    for family, values in points.items():
        values.sort()
        axes.plot([v[0] for v in values], [v[1] for v in values], marker="o", label=family)
    axes.set(xscale="log", xlabel=f"bytes of generation state at {length} tokens",
             ylabel=f"accuracy, {pairs} pairs in {length} tokens", ylim=(-0.03, 1.03))
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
