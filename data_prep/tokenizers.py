"""Tokenizers from local files behind one small interface."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from abc import ABC, abstractmethod
from itertools import chain
from pathlib import Path

import numpy as np

from data_prep.errors import UserError

END_OF_TEXT = "<|endoftext|>"
# The `tokenizers` library needs about 130 bytes of memory a byte of text that it is given at once.
BATCH_BYTES = 1 << 18
# Byte-level BPE with the GPT-2 pattern never has a token across these places, so long texts may be cut there.
SAFE_CUT = re.compile(r"(?<=[a-z])(?= [A-Za-z])")


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

    @abstractmethod
    def encode_batch(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(ids of all texts in a row, uint32 or int32; int64 [texts], how many are each text's). As `encode`."""

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

    def encode_batch(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        return _in_a_row(self.model.encode(texts, num_threads=1))

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
        self.may_cut = _has_gpt2_pattern(json.loads(self.model.to_str()))

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        rows: list[list[int]] = []
        for batch in _batches(texts):
            if len(batch) == 1 and len(batch[0]) > BATCH_BYTES and self.may_cut:
                rows.append(list(chain.from_iterable(self.encode(part) for part in _parts(batch[0]))))
            else:
                # The fast variant leaves out character offsets; the ids are the same.
                rows += [e.ids for e in self.model.encode_batch_fast(batch, add_special_tokens=False)]
        return _in_a_row(rows)

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids, skip_special_tokens=False)


class GigatokenTokenizer(Tokenizer):
    """The same ids as `reference`, from the gigatoken library, much faster. Refuses what it cannot equal."""

    def __init__(self, reference: Tokenizer) -> None:
        if importlib.util.find_spec("gigatoken") is None:
            raise UserError("gigatoken is not installed: pip install '.[fast]', or leave out --backend")
        import gigatoken
        self.reference, self.kind, self.files = reference, reference.kind, reference.files
        self.vocab_size, self.eod = reference.vocab_size, reference.eod
        try:
            self.model = gigatoken.Tokenizer.from_sentencepiece(reference.files[0]) \
                if isinstance(reference, SentencePieceTokenizer) else \
                gigatoken.Tokenizer.from_json(reference.model.to_str())
        except (ValueError, RuntimeError, TypeError, KeyError) as error:
            raise UserError(f"gigatoken does not know this tokenizer ({str(error)[:150]}): leave out --backend") \
                from error
        for text in PROBES:
            if self.encode(text) != reference.encode(text):
                raise UserError(f"gigatoken and the {self.kind} tokenizer differ on {text[:40]!r}: leave out --backend")

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text).tolist()

    def encode_batch(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        if not texts:
            return np.zeros(0, np.uint32), np.zeros(0, np.int64)
        layout = self.model.encode_batch(texts, parallel=False).layout
        offsets = np.asarray(layout.offsets.data)
        return np.asarray(layout.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)

    def decode(self, ids: list[int]) -> str:
        return self.reference.decode(ids)


PROBES = [
    "Hello world's 12345 words, they'll've don't\n\n\n  three  spaces\ttab\r\nend  ", "", " ", "\n", "  \n \n  x",
    "naïve “quotes” 数学的 😀👩‍👩‍👧 \u200b\u00a0\u3000\u2028 e\u0301 ﬁ Ⅷ ½ ١٢٣",
    "<|endoftext|> <s></s><unk> <|padding|>", "\0\x01\x7f",
    "def f(x):\n    return {'a': x**2}  # ____ ==== ----", "\u2581a \u2581 b", "ÀÉÎ" * 20 + " " * 40 + "a" * 300,
]


def _in_a_row(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    counts = np.fromiter(map(len, rows), np.int64, len(rows))
    return np.fromiter(chain.from_iterable(rows), np.int32, int(counts.sum())), counts


def _batches(texts: list[str]) -> list[list[str]]:
    """Consecutive texts of about BATCH_BYTES characters together; a longer one is alone."""
    batches: list[list[str]] = [[]]
    size = 0
    for text in texts:
        if batches[-1] and size + len(text) > BATCH_BYTES:
            batches.append([])
            size = 0
        batches[-1].append(text)
        size += len(text)
    return batches


def _parts(text: str) -> list[str]:
    """A long text cut at safe places into parts of about BATCH_BYTES characters."""
    parts, start = [], 0
    while len(text) - start > BATCH_BYTES and (cut := SAFE_CUT.search(text, start + BATCH_BYTES)):
        parts.append(text[start : cut.start()])
        start = cut.start()
    return [*parts, text[start:]]


def _has_gpt2_pattern(settings: dict) -> bool:
    """Byte-level pre-tokenizer with its own pattern, and nothing that could see or join words across a space."""
    pattern, normalizer = settings.get("pre_tokenizer") or {}, settings.get("normalizer") or {}
    added = [token["content"] for token in settings.get("added_tokens", [])]
    return (pattern.get("type") == "ByteLevel" and pattern.get("use_regex", True)
            and not pattern.get("add_prefix_space") and normalizer.get("type", "NFC") == "NFC"
            and not any(SAFE_CUT.search(content) for content in added)
            and not any(token.get("lstrip") or token.get("rstrip") for token in settings.get("added_tokens", [])))


def load_tokenizer(kind: str, *, model: str | None = None, vocab_file: str | None = None,
                   merge_file: str | None = None, eod_token: str | None = None,
                   backend: str = "reference") -> Tokenizer:
    """kind: "sentencepiece" (model: .model), "hf" (model: tokenizers .json) or "gpt2" (vocab_file and merge_file).

    backend: "reference", the library whose format it is, or "gigatoken".
    """
    tokenizer = _reference(kind, model, vocab_file, merge_file, eod_token)
    return GigatokenTokenizer(tokenizer) if backend == "gigatoken" else tokenizer


def _reference(kind: str, model: str | None, vocab_file: str | None, merge_file: str | None,
               eod_token: str | None) -> Tokenizer:
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
