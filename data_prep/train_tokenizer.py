"""Train a SentencePiece BPE model from Pile-format shards.

    python -m data_prep.train_tokenizer --input shard.jsonl.zst … --model-prefix data/tokenizer --vocab-size 4096
    python -m data_prep.train_tokenizer … --weight Github=2 --weight "Pile-CC=1"      # or --pile-weights

Writes PREFIX.model and the report PREFIX.json: of every component its weight, the text used and the bytes per token.
"""

from __future__ import annotations

import argparse
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

from data_prep.blend import PILE_WEIGHTS
from data_prep.errors import UserError, run_cli
from data_prep.shards import BadRecord, read_shard

MEASURED_BYTES = 1_000_000           # text of every component on which bytes per token are measured


class Sample:
    """Documents of the shards, in order, until every component has its share of `max_bytes`.

    weights: components and their shares; None: documents as they come.
    """

    def __init__(self, inputs: list[str], max_bytes: float, weights: dict[str, float] | None) -> None:
        self.inputs = inputs
        self.budgets = {"": max_bytes} if weights is None else \
            {name: max_bytes * weight / sum(weights.values()) for name, weight in weights.items()}
        self.weights = weights
        self.used: dict[str, dict[str, int]] = {}
        self.measured: dict[str, list[str]] = {}

    def documents(self) -> Iterator[str]:
        spent = dict.fromkeys(self.budgets, 0)
        for path in self.inputs:
            for record in read_shard(path):
                if isinstance(record, BadRecord):
                    raise UserError(f"{record}; repair it before training a tokenizer")
                key = record.component if self.weights is not None else ""
                if key in spent and spent[key] < self.budgets[key] and record.text:
                    size = len(record.text.encode())
                    spent[key] += size
                    self._count(record.component, record.text, size)
                    yield record.text
                elif all(spent[k] >= budget for k, budget in self.budgets.items()):
                    return

    def _count(self, component: str, text: str, size: int) -> None:
        used = self.used.setdefault(component, {"documents": 0, "bytes": 0})
        if used["bytes"] < MEASURED_BYTES:
            self.measured.setdefault(component, []).append(text)
        used["documents"] += 1
        used["bytes"] += size


def train(inputs: list[str], model_prefix: str, vocab_size: int, max_megabytes: float,
          weights: dict[str, float] | None = None) -> dict:
    """Write PREFIX.model and PREFIX.json (report); text round-trips exactly. Returns the report.

    weights: share of every component (pile_set_name) in the text used; components without one are left out.
    """
    import sentencepiece
    sample = Sample(inputs, max_megabytes * 1e6, weights)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(sample), model_writer=model, vocab_size=vocab_size, model_type="bpe",
            byte_fallback=True, character_coverage=0.9995, normalization_rule_name="identity",
            remove_extra_whitespaces=False, add_dummy_prefix=False, allow_whitespace_only_pieces=True,
            split_digits=True, user_defined_symbols=["\n"], minloglevel=2, num_threads=os.cpu_count() or 1)
    except RuntimeError as error:
        size = sum(used["bytes"] for used in sample.used.values())
        raise UserError(f"SentencePiece could not train {vocab_size} pieces on {size:,} bytes "
                        f"({' '.join(str(error).split())[-160:]}): give more text or a smaller --vocab-size") from error
    missing = sorted(set(weights or {}) - set(sample.used))
    if missing and weights != PILE_WEIGHTS:                       # a part of the Pile may lack some components
        raise UserError(f"no document of component {missing[0]!r} in the shards: correct its --weight")
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    totals = {key: sum(used[key] for used in sample.used.values()) for key in ("documents", "bytes")}
    components = {}
    for name, used in sorted(sample.used.items()):
        texts = sample.measured[name]
        tokens = sum(map(len, processor.encode(texts)))
        components[name] = {**used, "share": round(used["bytes"] / totals["bytes"], 4),
                            "bytes_per_token": round(sum(len(t.encode()) for t in texts) / max(tokens, 1), 4)}
        if weights is not None:
            components[name]["weight"] = round(weights[name] / sum(weights.values()), 4)
    report = {"vocab_size": vocab_size, "inputs": inputs, **totals, "components": components}
    for ending, data in ((".model", model.getvalue()), (".json", json.dumps(report, indent=1).encode())):
        path = Path(model_prefix + ending)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.writing")
        temporary.write_bytes(data)
        os.replace(temporary, path)
    return report


def _lines(sample: Sample) -> Iterator[str]:
    for text in sample.documents():
        # SentencePiece refuses very long lines, and NUL separates nothing here.
        for line in text.replace("\0", "").splitlines():
            yield line[:4000]


def parse_weights(given: list[str], pile: bool) -> dict[str, float] | None:
    if pile:
        return dict(PILE_WEIGHTS)
    try:
        weights = {name: float(weight) for name, _, weight in (item.rpartition("=") for item in given)}
    except ValueError as error:
        raise UserError(f"--weight {' '.join(given)}: give COMPONENT=NUMBER") from error
    if any(not name or not weight > 0 for name, weight in weights.items()):
        raise UserError(f"--weight {' '.join(given)}: give COMPONENT=NUMBER with numbers above 0")
    return weights or None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_prep.train_tokenizer", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help="Pile-format shards")
    parser.add_argument("--model-prefix", required=True, help="writes PREFIX.model and PREFIX.json")
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--max-megabytes", type=float, default=100, help="text used, from the start of the shards")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--weight", action="append", default=[], metavar="COMPONENT=NUMBER",
                        help="share of a component (pile_set_name) in the text used; those without one are left out")
    choice.add_argument("--pile-weights", action="store_true", help="the Pile's published shares")
    a = parser.parse_args()
    report = train(a.input, a.model_prefix, a.vocab_size, a.max_megabytes, parse_weights(a.weight, a.pile_weights))
    for name, c in report["components"].items():
        print(f"{name or 'unnamed'}: {c['documents']:,} documents, {c['bytes']:,} bytes ({100 * c['share']:.1f} %), "
              f"{c['bytes_per_token']:.2f} bytes per token")
    print(f"{a.model_prefix}.model: {report['vocab_size']:,} pieces from {report['documents']:,} documents, "
          f"{report['bytes']:,} bytes")


if __name__ == "__main__":
    run_cli(main)
