"""Tokenizers from local files behind one small interface."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from pathlib import Path

from data_prep.errors import UserError

END_OF_TEXT = "<|endoftext|>"


class Tokenizer(ABC):
    """vocab_size: number of ids; eod: the id that ends a document; files: what it was made from."""

    kind: str
    vocab_size: int
    eod: int
    files: list[Path]

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without any special token."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """The text of token ids."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def fingerprint(self) -> str:
        """sha256 over the files' bytes: equal for equal tokenizers."""
        digest = hashlib.sha256(self.kind.encode())
        for file in self.files:
            digest.update(file.read_bytes())
        return digest.hexdigest()


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece .model; documents end with its </s>."""

    kind = "sentencepiece"

    def __init__(self, model: Path) -> None:
        import sentencepiece
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(model))
        except (RuntimeError, OSError) as error:
            raise UserError(f"{model} is not a SentencePiece model: give the .model file") from error
        self.files, self.vocab_size, self.eod = [model], self.model.vocab_size(), self.model.eos_id()
        if self.eod < 0:
            raise UserError(f"{model} has no end-of-sentence piece to end documents with: train it with one")

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self.model.encode(texts, num_threads=1)

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)


class JsonTokenizer(Tokenizer):
    """Byte-level BPE of the `tokenizers` library: a JSON file (NeoX) or GPT-2's vocab.json and merges.txt."""

    def __init__(self, kind: str, files: list[Path], eod_token: str | None) -> None:
        import tokenizers
        self.kind, self.files = kind, files
        try:
            if kind == "gpt2":
                # The files hold no special tokens; <|endoftext|> is the last id of vocab.json.
                self.model = tokenizers.ByteLevelBPETokenizer(*(str(f) for f in files))._tokenizer
            else:
                self.model = tokenizers.Tokenizer.from_file(str(files[0]))
        except Exception as error:                                # the library raises bare Exception
            raise UserError(f"{' and '.join(str(f) for f in files)} cannot be read as a {kind} tokenizer: "
                            f"{str(error)[:200]}") from error
        self.vocab_size = self.model.get_vocab_size(with_added_tokens=True)
        token = eod_token or END_OF_TEXT
        eod = self.model.token_to_id(token)
        if eod is None:
            raise UserError(f"{files[0]} has no token {token!r} to end documents with: name one with --eod-token")
        self.eod = eod

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        # The fast variant leaves out character offsets; the ids are the same.
        return [e.ids for e in self.model.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids, skip_special_tokens=False)


def load_tokenizer(kind: str, *, model: str | None = None, vocab_file: str | None = None,
                   merge_file: str | None = None, eod_token: str | None = None) -> Tokenizer:
    """kind: "sentencepiece" (model: .model), "hf" (model: tokenizers .json) or "gpt2" (vocab_file and merge_file)."""
    if kind == "gpt2":
        if vocab_file is None or merge_file is None:
            raise UserError("the gpt2 tokenizer needs its vocab.json (vocab_file) and merges.txt (merge_file)")
        return JsonTokenizer(kind, [_existing(vocab_file), _existing(merge_file)], eod_token)
    if kind not in ("sentencepiece", "hf"):
        raise UserError(f"unknown tokenizer type {kind!r}: use sentencepiece, gpt2 or hf")
    if model is None:
        raise UserError(f"the {kind} tokenizer needs its file (model)")
    path = _existing(model)
    return SentencePieceTokenizer(path) if kind == "sentencepiece" else JsonTokenizer(kind, [path], eod_token)


def _existing(path: str) -> Path:
    if not Path(path).is_file():
        raise UserError(f"the tokenizer file {path} is missing: correct the path")
    return Path(path)
