"""Train a SentencePiece BPE model from Pile-format shards.

    python -m data_prep.train_tokenizer --input shard.jsonl.zst … --model-prefix data/tokenizer --vocab-size 4096
"""

from __future__ import annotations

import argparse
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

from data_prep.errors import UserError, run_cli
from data_prep.shards import BadRecord, read_shard


def train(inputs: list[str], model_prefix: str, vocab_size: int, max_megabytes: float) -> dict:
    """Write PREFIX.model and PREFIX.json (report); text round-trips exactly. Returns the report."""
    import sentencepiece
    used = {"documents": 0, "bytes": 0}

    def lines() -> Iterator[str]:
        for path in inputs:
            for record in read_shard(path):
                if isinstance(record, BadRecord):
                    raise UserError(f"{record}; repair it before training a tokenizer")
                if used["bytes"] > max_megabytes * 1e6:
                    return
                used["documents"] += 1
                used["bytes"] += len(record.text.encode())
                # SentencePiece refuses very long lines, and NUL separates nothing here.
                for line in record.text.replace("\0", "").splitlines():
                    yield line[:4000]

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(), model_writer=model, vocab_size=vocab_size, model_type="bpe",
            byte_fallback=True, character_coverage=0.9995, normalization_rule_name="identity",
            remove_extra_whitespaces=False, add_dummy_prefix=False, allow_whitespace_only_pieces=True,
            split_digits=True, user_defined_symbols=["\n"], minloglevel=2, num_threads=os.cpu_count() or 1)
    except RuntimeError as error:
        raise UserError(f"SentencePiece could not train {vocab_size} pieces on {used['bytes']:,} bytes "
                        f"({' '.join(str(error).split())[-160:]}): give more text or a smaller --vocab-size") from error
    report = {"vocab_size": vocab_size, "inputs": inputs, **used}
    for ending, data in ((".model", model.getvalue()), (".json", json.dumps(report, indent=1).encode())):
        path = Path(model_prefix + ending)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.writing")
        temporary.write_bytes(data)
        os.replace(temporary, path)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_prep.train_tokenizer", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help="Pile-format shards")
    parser.add_argument("--model-prefix", required=True, help="writes PREFIX.model and PREFIX.json")
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--max-megabytes", type=float, default=100, help="text used, from the start of the shards")
    a = parser.parse_args()
    report = train(a.input, a.model_prefix, a.vocab_size, a.max_megabytes)
    print(f"{a.model_prefix}.model: {report['vocab_size']:,} pieces from {report['documents']:,} documents, "
          f"{report['bytes']:,} bytes")


if __name__ == "__main__":
    run_cli(main)
