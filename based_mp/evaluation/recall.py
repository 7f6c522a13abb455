"""SWDE, FDA and SQuAD completion as the BASED paper scores them: prompts, the metric *contains*, local files.

One JSON object a line with at least `text` (the prompt) and `value` (what must come out).
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import zstandard

from based_mp.errors import UserError

TASKS = ("swde", "fda", "squad_completion")
MAX_NEW_TOKENS = 48
STOP = "\n"


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Every line of a .jsonl or .jsonl.zst file. Raises UserError with file and line."""
    path = Path(path)
    try:
        raw = path.read_bytes()
        if path.suffix == ".zst":
            raw = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(raw)).read()
        lines = raw.decode("utf-8").split("\n")
    except (OSError, zstandard.ZstdError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    documents = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number} is not JSON: correct it, or give another file") from error
        if not isinstance(document, dict):
            raise UserError(f"{path}, line {number} is not a JSON object: correct it, or give another file")
        documents.append(document)
    if not documents:
        raise UserError(f"{path} has no document: give a file with one JSON object a line")
    return documents


def read_recall_documents(path: str | Path) -> list[dict[str, Any]]:
    """The documents of a recall task, with what it needs. Raises UserError."""
    documents = read_jsonl(path)
    for number, document in enumerate(documents, 1):
        for field in ("text", "value"):
            if not isinstance(document.get(field), str) or not document[field].strip():
                raise UserError(f"{path}, document {number} has no {field}: SWDE, FDA and SQuAD completion need text "
                                "(the prompt) and value (the answer)")
    return documents


def prompt(document: dict[str, Any]) -> str:
    """What the model continues: `text`, stripped."""
    return document["text"].strip()


def contains(value: str, continuation: str) -> bool:
    """The value, stripped, stands anywhere in the continuation; case ignored."""
    return re.search(re.escape(value.strip()), continuation, re.IGNORECASE) is not None
