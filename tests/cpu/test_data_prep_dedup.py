"""Documents to leave out: exact and near duplicates, shared 13-grams; the list as tokenize reads it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from data_prep import dedup as dedup_module
from data_prep.dedup import Options, dedup
from data_prep.errors import UserError
from data_prep.run import Options as TokenizeOptions
from data_prep.run import tokenize
from tests.cpu.test_data_prep_tokenize import record, tokenizer_file, write_shard  # noqa: F401

VOCABULARY = [f"word{i}" for i in range(3000)]


def text(rng: random.Random, count: int = 300) -> list[str]:
    return [rng.choice(VOCABULARY) for _ in range(count)]


def changed(words: list[str], count: int) -> list[str]:
    """So many words replaced, evenly spread: each is in 5 of the about 300 shingles."""
    places = {len(words) * i // count for i in range(count)}
    return ["another" if i in places else w for i, w in enumerate(words)]


@pytest.fixture
def corpus(tmp_path: Path) -> dict[str, str]:
    """Two shards; documents by line: see the asserts."""
    rng = random.Random(1)
    base = [text(rng) for _ in range(40)]
    question = text(rng, 30)
    a = [" ".join(w) for w in base[:20]]
    b = [a[3], a[3] + " ", " ".join(changed(base[4], 2)), " ".join(changed(base[5], 20)),
         " ".join(base[21] + question[5:18]), " ".join(base[22] + question[5:17]), *(" ".join(w) for w in base[23:])]
    evaluation = write_shard(tmp_path / "eval.jsonl", [record(" ".join(question).upper())])
    return {"a": write_shard(tmp_path / "a.jsonl.zst", [record(t, "Web") for t in a]),
            "b": write_shard(tmp_path / "b.jsonl", [b"{", *(record(t, "Code") for t in b), record(a[0])]),
            "evaluation": evaluation}


def found(tmp_path: Path, corpus: dict[str, str], **options: object) -> tuple[dict, dict]:
    """({(shard, line): (reason, like)}, report)"""
    path = tmp_path / "list.jsonl"
    report = dedup(Options([corpus["a"], corpus["b"]], str(path), **options))
    names = {corpus["a"]: "a", corpus["b"]: "b"}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {(names[r["file"]], r["line"]): (r["reason"], r["like"]) for r in rows}, report


def test_exact(tmp_path, corpus):
    rows, report = found(tmp_path, corpus, exact=True)
    assert rows == {("b", 2): ("exact", {"file": corpus["a"], "line": 4}),
                    ("b", len(Path(corpus["b"]).read_text().splitlines())): ("exact", {"file": corpus["a"], "line": 1})}
    assert report == json.loads((tmp_path / "list.report.json").read_text())
    assert report["kept"]["documents"] == 20 + 24 - 2 and report["left_out"]["exact"]["Code"]["documents"] == 1


def test_near(tmp_path, corpus):
    pytest.importorskip("rensa", reason="rensa is not installed (pip install '.[dedup]')")
    rows, _ = found(tmp_path, corpus, threshold=0.8)
    # Line 4: 2 words of 300 changed, similarity 0.93; line 5: 20, 0.5.
    last = len(Path(corpus["b"]).read_text().splitlines())
    assert {place: row[0] for place, row in rows.items()} == dict.fromkeys(
        [("b", 2), ("b", 3), ("b", 4), ("b", last)], "near")
    assert rows["b", 4][1] == {"file": corpus["a"], "line": 5}
    both, report = found(tmp_path, corpus, exact=True, threshold=0.8)
    assert both["b", 2][0] == "exact" and both["b", 3][0] == "near" and len(both) == 4
    assert set(report["left_out"]) == {"exact", "near"}


def test_contaminated(tmp_path, corpus):
    rows, _ = found(tmp_path, corpus, evaluation=(corpus["evaluation"],))
    assert list(rows) == [("b", 6)] and rows["b", 6][0] == "contaminated" and len(rows["b", 6][1].split()) == 13


def test_the_list_does_not_depend_on_workers_and_tokenize_reads_it(tmp_path, corpus, tokenizer_file,  # noqa: F811
                                                                   monkeypatch):
    pytest.importorskip("rensa", reason="rensa is not installed (pip install '.[dedup]')")
    options = {"exact": True, "threshold": 0.8, "evaluation": (corpus["evaluation"],)}
    one, report = found(tmp_path, corpus, **options)
    shard = dedup_module.Shard
    monkeypatch.setattr(dedup_module, "Shard", lambda path: shard(path, 3000))
    assert found(tmp_path, corpus, workers=2, **options)[0] == one and len(one) == 5
    prefix = str(tmp_path / "out" / "data")
    manifest = tokenize(TokenizeOptions([corpus["a"], corpus["b"]], prefix, {"kind": "hf", "model": tokenizer_file},
                                        max_bad=1, exclude=str(tmp_path / "list.jsonl")))[prefix]
    assert manifest["documents"] == report["kept"]["documents"] and manifest["excluded_documents"] == 5


def test_a_damaged_shard_leaves_no_list(tmp_path, corpus):
    damaged = Path(corpus["a"])
    damaged.write_bytes(damaged.read_bytes()[:-30])
    with pytest.raises(UserError, match="is damaged after line"):
        found(tmp_path, corpus, exact=True)
    assert not list(tmp_path.glob("*list*"))
