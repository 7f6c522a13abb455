"""Show documents of an indexed dataset as text.

    python -m data_prep.inspect data/train --document 3 --tokenizer-type sentencepiece --tokenizer-model …
"""

from __future__ import annotations

import argparse

from data_prep.errors import UserError, run_cli
from data_prep.indexed import IndexedDataset
from data_prep.tokenize import add_tokenizer_arguments, tokenizer_arguments
from data_prep.tokenizers import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_prep.inspect", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", help="prefix of a .bin/.idx pair")
    parser.add_argument("--document", type=int, nargs="+", default=[0], help="0-based document numbers")
    add_tokenizer_arguments(parser)
    a = parser.parse_args()
    dataset, tokenizer = IndexedDataset(a.prefix), load_tokenizer(**tokenizer_arguments(a))
    for number in a.document:
        if not 0 <= number < len(dataset):
            raise UserError(f"{a.prefix} has documents 0 to {len(dataset) - 1}, not {number}")
        ids = dataset.tokens(number).tolist()
        print(f"--- document {number}: {len(ids)} tokens\n{tokenizer.decode([i for i in ids if i != tokenizer.eod])}")


if __name__ == "__main__":
    run_cli(main)
