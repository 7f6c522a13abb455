"""Pile-format shards from text every machine has: the running Python's standard library.

    python -m data_prep.demo_corpus --output data/quickstart

Two components, each with a training and a validation shard: PythonSource (source files) and PythonDocs (the
docstrings of modules, classes and functions, as prose). A module is in the training or in the validation shards of both
components, so that no validation docstring stands in a training source.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import zstandard

from data_prep.errors import UserError, run_cli

VALIDATION_EVERY = 12


def source_files() -> list[Path]:
    """Standard library sources in a fixed order, spread over the library, without tests and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}
    files = [p for p in sorted(root.rglob("*.py")) if not skipped & set(p.relative_to(root).parts)]
    # A stride coprime with the count mixes packages, so that both splits see all of them.
    return [files[i * 7919 % len(files)] for i in range(len(files))] if len(files) % 7919 else files


def docstrings(source: str, name: str) -> str:
    """The docstrings of a module as one text, each under the name it documents."""
    parts = []
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text and len(text) > 40:
                parts.append(f"{getattr(node, 'name', name)}\n\n{inspect.cleandoc(text)}")
    return "\n\n".join(parts)


def documents() -> Iterator[tuple[int, str, str]]:
    """(module number, component, text), deterministic for one Python version."""
    for number, path in enumerate(source_files()):
        try:
            source = path.read_text(encoding="utf-8")
            prose = docstrings(source, path.stem)
        except (UnicodeDecodeError, SyntaxError, OSError, ValueError):
            continue
        if source.strip():
            yield number, "PythonSource", source
        if prose:
            yield number, "PythonDocs", prose


def write(output: Path, max_megabytes: float) -> dict[str, int]:
    """Write the shards into `output`; returns bytes of text by shard."""
    output.mkdir(parents=True, exist_ok=True)
    shards: dict[str, list[bytes]] = {}
    sizes: dict[str, int] = {}
    for number, component, text in documents():
        if sum(sizes.values()) > max_megabytes * 1e6:
            break
        name = f"{component}_{'val' if number % VALIDATION_EVERY == 0 else 'train'}"
        record = {"text": text, "meta": {"pile_set_name": component}}
        shards.setdefault(name, []).append(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        sizes[name] = sizes.get(name, 0) + len(text.encode())
    if len(shards) < 4:
        raise UserError("too little text for training and validation: raise --max-megabytes, or install this Python's "
                        "standard library with its sources")
    for name, lines in shards.items():
        compressor = zstandard.ZstdCompressor(level=3, write_checksum=True)
        (output / f"{name}.jsonl.zst").write_bytes(compressor.compress(b"".join(lines)))
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_prep.demo_corpus", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--max-megabytes", type=float, default=12, help="text in all")
    a = parser.parse_args()
    for name, size in sorted(write(a.output, a.max_megabytes).items()):
        print(f"{a.output / name}.jsonl.zst: {size:,} bytes of text")


if __name__ == "__main__":
    run_cli(main)
