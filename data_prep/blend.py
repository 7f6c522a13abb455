"""Weights of several corpora, as the `data:` section of a training configuration.

    python -m data_prep.blend data/pile_* [--temperature 1.5 | --pile-weights] > blend.yaml
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from data_prep.errors import UserError, run_cli

# Gao et al., "The Pile" (arXiv 2101.00027), table 1: share of each component in the training set, epochs included.
PILE_WEIGHTS = {
    "Pile-CC": 0.1811, "PubMed Central": 0.1440, "Books3": 0.1207, "OpenWebText2": 0.1001, "ArXiv": 0.0896,
    "Github": 0.0759, "FreeLaw": 0.0612, "StackExchange": 0.0513, "USPTO Backgrounds": 0.0365,
    "PubMed Abstracts": 0.0307, "Gutenberg (PG-19)": 0.0217, "OpenSubtitles": 0.0155, "Wikipedia (en)": 0.0153,
    "DM Mathematics": 0.0124, "Ubuntu IRC": 0.0088, "BookCorpus2": 0.0075, "EuroParl": 0.0073, "HackerNews": 0.0062,
    "YoutubeSubtitles": 0.0060, "PhilPapers": 0.0038, "NIH ExPorter": 0.0030, "Enron Emails": 0.0014,
}


def _manifest(prefix: str) -> dict:
    path = Path(prefix + ".json")
    try:
        manifest = json.loads(path.read_text())
        assert manifest["tokens"] > 0 and manifest["components"]
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: give prefixes that data_prep.tokenize wrote") from error
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f"{path} is no manifest of data_prep.tokenize: make the dataset again") from error
    return manifest


def token_weights(prefixes: list[str], temperature: float = 1.0) -> list[float]:
    """tokens^(1/temperature), normalised: 1 keeps the natural shares, larger values even them out."""
    if temperature <= 0:
        raise UserError(f"--temperature {temperature}: give a number above 0")
    return _normalised([_manifest(p)["tokens"] ** (1 / temperature) for p in prefixes])


def pile_weights(prefixes: list[str]) -> list[float]:
    """The Pile's published share of each dataset's one component, normalised over those given."""
    weights = []
    for prefix in prefixes:
        components = list(_manifest(prefix)["components"])
        if len(components) != 1:
            raise UserError(f"{prefix} mixes {len(components)} components: tokenize with --split-by-component")
        if components[0] not in PILE_WEIGHTS:
            raise UserError(f"{components[0]!r} is no component of the Pile: leave out --pile-weights")
        weights.append(PILE_WEIGHTS[components[0]])
    return _normalised(weights)


def _normalised(weights: list[float]) -> list[float]:
    return [weight / sum(weights) for weight in weights]


def split_blend(prefixes: list[str]) -> str:
    """YAML for the datasets of --split-by-component: the Pile's weights, or where one is none of its, by tokens."""
    known = all(set(_manifest(prefix)["components"]) <= set(PILE_WEIGHTS) for prefix in prefixes)
    comment = "the Pile's published weights" if known else "shares of tokens: not every component is one of the Pile's"
    weights = pile_weights(prefixes) if known else token_weights(prefixes)
    return f"# {comment}\n{fragment(prefixes, weights, 'train')}"


def fragment(prefixes: list[str], weights: list[float], key: str) -> str:
    """YAML of the section: data.<key> with a line a corpus."""
    rows = [f"    - {{path: {json.dumps(p)}, weight: {w:.6g}}}" for p, w in zip(prefixes, weights, strict=True)]
    return "\n".join(["data:", f"  {key}:", *rows]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_prep.blend", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", nargs="+", help="prefixes of indexed datasets with their manifests")
    parser.add_argument("--key", choices=["train", "valid", "test"], default="train", help="list under data:")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--temperature", type=float, default=1.0, help="weights are tokens^(1/temperature)")
    choice.add_argument("--pile-weights", action="store_true", help="the Pile's published shares by pile_set_name")
    a = parser.parse_args()
    weights = pile_weights(a.prefix) if a.pile_weights else token_weights(a.prefix, a.temperature)
    print(fragment(a.prefix, weights, a.key), end="")


if __name__ == "__main__":
    run_cli(main)
