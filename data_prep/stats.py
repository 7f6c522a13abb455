"""Statistics of indexed datasets, from their manifests: documents, tokens, bytes per token and a histogram a component.

    python -m data_prep.stats data/pile/train [--plot stats.png] > stats.json
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import orjson

from data_prep.errors import UserError, run_cli
from data_prep.verify import read_manifest


def statistics(prefixes: list[str]) -> dict[str, Any]:
    """{"datasets": prefix → its components as in the manifest, "total": of all}."""
    datasets = {prefix: read_manifest(prefix)["components"] for prefix in prefixes}
    everything = [counts for components in datasets.values() for counts in components.values()]
    total = {key: sum(counts[key] for counts in everything) for key in ("documents", "tokens", "bytes")}
    return {"datasets": datasets, "total": {**total, "bytes_per_token": round(total["bytes"] / total["tokens"], 4)}}


def plot(found: dict[str, Any], path: str) -> None:
    """Shares of tokens, bytes per token and document lengths of every component."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib: pip install '.[plot]'")
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    rows = {f"{name or Path(prefix).name}": counts for prefix, components in found["datasets"].items()
            for name, counts in components.items()}
    rows = dict(sorted(rows.items(), key=lambda item: item[1]["tokens"]))
    figure, (shares, density, lengths) = pyplot.subplots(1, 3, figsize=(15, 2 + 0.3 * len(rows)), layout="constrained")
    shares.barh(list(rows), [100 * c["tokens"] / found["total"]["tokens"] for c in rows.values()])
    shares.set_xlabel("% of all tokens")
    density.barh(list(rows), [c["bytes_per_token"] for c in rows.values()])
    density.set_xlabel("bytes of text per token")
    density.set_yticklabels([])
    of = [{int(b.split("-")[0]).bit_length(): n for b, n in c["documents_by_tokens"].items()} for c in rows.values()]
    first, last = min(min(o) for o in of), max(max(o) for o in of)
    shades = [[100 * o.get(bits, 0) / sum(o.values()) for bits in range(first, last + 1)] for o in of]
    edges = [2.0 ** (bits - 1) for bits in range(first, last + 2)]
    mesh = lengths.pcolormesh(edges, [i - 0.5 for i in range(len(rows) + 1)], shades, cmap="Blues")
    figure.colorbar(mesh, label="% of the component's documents")
    lengths.set_xscale("log", base=2)
    lengths.set_xlabel("tokens of a document")
    lengths.set_yticks([])
    lengths.set_ylim(shares.get_ylim())
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_prep.stats", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", nargs="+", help="prefixes of datasets that data_prep.tokenize wrote")
    parser.add_argument("--plot", help="also draw them into this file (.png, .pdf or .svg)")
    a = parser.parse_args()
    found = statistics(a.prefix)
    print(orjson.dumps(found, option=orjson.OPT_INDENT_2).decode())
    if a.plot:
        plot(found, a.plot)


if __name__ == "__main__":
    run_cli(main)
