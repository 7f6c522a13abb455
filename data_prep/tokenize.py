"""Turn Pile-format shards into a Megatron indexed dataset (.bin/.idx) with a manifest.

    python -m data_prep.tokenize --input shard.jsonl.zst … --output-prefix data/train \\
        --tokenizer-type sentencepiece --tokenizer-model data/tokenizer.model --workers 4
    mpirun -n 512 --map-by ppr:16:node --bind-to none python -m data_prep.tokenize --mpi --workers 3 …

The result does not depend on the number of processes. The same command goes on with a run that was killed.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from data_prep.blend import split_blend
from data_prep.errors import UserError, run_cli
from data_prep.ranks import Alone, Mpi
from data_prep.run import Options, tokenize


def parse(arguments: list[str] | None = None) -> tuple[Options, bool]:
    """(options, whether the processes of mpirun share the work)."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.tokenize", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help=".jsonl, .jsonl.gz or .jsonl.zst shards")
    parser.add_argument("--output-prefix", required=True, help="writes PREFIX.bin, PREFIX.idx and PREFIX.json")
    add_tokenizer_arguments(parser)
    parser.add_argument("--backend", choices=["reference", "gigatoken"], default="reference",
                        help="gigatoken: the same tokens, much faster (pip install '.[fast]'); not for sentencepiece")
    parser.add_argument("--workers", type=int, default=1, help="worker processes (with --mpi: of every MPI process)")
    parser.add_argument("--mpi", action="store_true", help="share the work among the processes of mpirun")
    parser.add_argument("--on-bad-record", choices=["fail", "skip"], default="fail",
                        help="a line that is no document, an empty, damaged or duplicate shard: stop, or leave it out "
                             "and list it in the manifest")
    parser.add_argument("--max-bad", type=int, default=1000, help="with skip: more bad records than this stop the run")
    parser.add_argument("--max-line-megabytes", type=int, default=32, help="a longer line is a bad record")
    parser.add_argument("--exclude", help="leave out the documents on this list of data_prep.dedup")
    parser.add_argument("--overwrite", action="store_true", help="replace existing outputs")
    parser.add_argument("--split-by-component", action="store_true",
                        help="one dataset a pile_set_name, PREFIX_COMPONENT.bin, .idx and .json, and PREFIX_blend.yaml "
                             "with the Pile's published weights")
    a = parser.parse_args(arguments)
    for name in ("workers", "max_line_megabytes"):
        if getattr(a, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(a, name)}: give at least 1")
    tokenizer = {**tokenizer_arguments(a), "backend": a.backend}
    return Options(a.input, a.output_prefix, tokenizer, a.workers, a.max_bad if a.on_bad_record == "skip" else 0,
                   a.overwrite, a.split_by_component, a.exclude, a.max_line_megabytes << 20), a.mpi


def add_tokenizer_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """The options every program with a tokenizer shares."""
    parser.add_argument("--tokenizer-type", choices=["sentencepiece", "gpt2", "hf"], required=required)
    parser.add_argument("--tokenizer-model", help="SentencePiece .model, or tokenizers .json for hf")
    parser.add_argument("--vocab-file", help="gpt2: vocab.json")
    parser.add_argument("--merge-file", help="gpt2: merges.txt")
    parser.add_argument("--eod-token", help="end-of-document token of hf and gpt2 (default <|endoftext|>)")


def tokenizer_arguments(a: argparse.Namespace) -> dict[str, str | None]:
    return {"kind": a.tokenizer_type, "model": a.tokenizer_model, "vocab_file": a.vocab_file,
            "merge_file": a.merge_file, "eod_token": a.eod_token}


def main() -> None:
    options, mpi = parse()
    ranks = Mpi() if mpi else Alone()
    started = time.perf_counter()
    manifests = ranks.run(lambda: tokenize(options, ranks))
    seconds = time.perf_counter() - started
    for prefix, m in sorted(manifests.items()):
        print(f"{prefix}: {m['tokens']:,} tokens, {m['documents']:,} documents, {m['text_bytes']:,} bytes of text")
    if manifests:
        m = next(iter(manifests.values()))
        size = sum(m["text_bytes"] for m in manifests.values())
        print(f"{seconds:.1f} s, {size / 1e6 / seconds:.2f} MB/s, {len(m['rejects'])} records rejected")
        for reject in m["rejects"][:10]:
            print(f"rejected: {reject['file']} line {reject['line']}: {reject['reason']}", file=sys.stderr)
        if options.split_by_component:
            blend = Path(options.output_prefix + "_blend.yaml")
            blend.write_text(split_blend(sorted(manifests)))
            print(f"{blend}: the data.train section of a training configuration")


if __name__ == "__main__":
    run_cli(main)
