"""Associative recall: the generator against its definition, a model that learns it, and the sweep around it."""

import json
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from based_mp.errors import UserError
from based_mp.evaluation.mqar import distinct, mqar_rows
from based_mp.evaluation.recall_sweep import load_sweep
from tests.helpers import REPO

pytestmark = pytest.mark.timeout(300)
SWEEP = """
model: {d_model: 32, num_layers: 2, num_heads: 1, vocab_size: 64, pad_vocab_to_multiple_of: 16, ffn_hidden_size: 0}
families:
  attention: {model: {other_layers: softmax_attention, mixer_layers: {gated_conv: [0]}}}
  window: {model: {other_layers: sliding_attention, mixer_layers: {gated_conv: [0]}}, sweep: {window: [2]}}
train: [{length: 16, pairs: 2}, {length: 16, pairs: 4}]
test: [{length: 16, pairs: 4}, {length: 32, pairs: 4}]
learning_rates: [1e-2]
steps: 400
warmup_steps: 20
batch_tokens: 512
test_rows: 64
check_interval: 50
stop_accuracy: 0.99
precision: fp32
device: cpu
processes: 2
"""


@pytest.mark.parametrize("length, pairs", [(64, 4), (64, 16), (256, 64), (1024, 256)])
def test_every_answer_is_the_value_of_its_key(length, pairs):
    rows = mqar_rows(8, length, pairs, seed=3)
    assert rows.tokens.shape == (8, length) and rows.tokens.min() >= 0 and rows.tokens.max() < 8192
    for tokens, positions, targets in zip(rows.tokens, rows.positions, rows.targets, strict=True):
        stored = dict(zip(tokens[0 : 2 * pairs : 2].tolist(), tokens[1 : 2 * pairs : 2].tolist(), strict=True))
        assert len(stored) == pairs == len(set(stored.values()))
        assert all(1 <= key < 4096 <= value < 8192 for key, value in stored.items())
        asked = {int(tokens[p]): int(t) for p, t in zip(positions, targets, strict=True)}
        assert asked == stored
        assert len(set(positions.tolist())) == pairs
        assert all(p >= 2 * pairs and (p - 2 * pairs) % 2 == 0 and p < length for p in positions)


def test_gaps_follow_the_power_law():
    """The first of one query a row: slot i with probability ∝ (i + 1)^(−0.99)."""
    positions = mqar_rows(20000, 64, 1, seed=1).positions[:, 0]
    slots = (positions - 2) // 2
    weight = np.arange(1.0, 32) ** -0.99
    expected = weight / weight.sum()
    found = np.bincount(slots, minlength=31) / len(slots)
    assert np.abs(found - expected).max() < 0.012


def test_rows_are_a_function_of_the_seed():
    a, b, c = (mqar_rows(4, 64, 8, seed=s) for s in ([1, 2], [1, 2], [1, 3]))
    assert (a.tokens == b.tokens).all() and (a.targets == b.targets).all()
    assert (a.tokens != c.tokens).any()


def test_distinct_draws_are_uniform_and_without_replacement():
    drawn = distinct(np.random.default_rng(0), 5000, 7, 3, 11)
    assert all(len(set(row)) == 7 for row in drawn.tolist()) and drawn.min() == 3 and drawn.max() == 10
    share = np.bincount(drawn.flatten() - 3) / drawn.size
    assert np.abs(share - 1 / 8).max() < 0.005
    assert np.abs(np.bincount(drawn[:, 0] - 3) / 5000 - 1 / 8).max() < 0.02


def test_pairs_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="260 tokens"):
        mqar_rows(1, 256, 65)
    with pytest.raises(UserError, match="vocabulary of 16"):
        mqar_rows(1, 64, 8, vocab_size=16)


@pytest.mark.parametrize("path", sorted((REPO / "configs" / "recall").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_named_sweeps_can_run(path):
    found = load_sweep(path)
    assert len({run["family"] for run in found.runs()}) == 9
    for setting in found.train + found.test:
        mqar_rows(1, setting.length, setting.pairs, vocab_size=found.model["vocab_size"])
    longest = max(setting.length for setting in found.test)
    assert all(run["model"].get("hyena", {}).get("filter_length", longest) >= longest for run in found.runs())


def sweep(folder, text, *options):
    (folder / "sweep.yaml").write_text(text)
    return subprocess.run([sys.executable, "launch/recall_sweep.py", "--config", folder / "sweep.yaml", "--output",
                           folder / "out", *options], cwd=REPO, capture_output=True, text=True, timeout=250)


def test_a_sweep_learns_resumes_and_reports(tmp_path):
    pytest.importorskip("matplotlib")
    first = sweep(tmp_path, SWEEP)
    assert first.returncode == 0, first.stderr
    results = tmp_path / "out" / "results.jsonl"
    records = {r["family"]: r for r in map(json.loads, results.read_text().splitlines())}
    assert records["attention"]["accuracy"]["16x4"] > 0.95
    assert records["window"]["accuracy"]["16x4"] < 0.5               # two tokens: the pairs are out of sight
    # conv carry 2 × 64 and 32 keys and values of 32, fp32; the window keeps two.
    assert records["attention"]["state_bytes"]["32"] == 4 * (2 * 64 + 2 * 32 * 32)
    assert records["window"]["state_bytes"]["32"] == 4 * (2 * 64 + 2 * 2 * 32)
    assert (tmp_path / "out" / "frontier.png").read_bytes()[:4] == b"\x89PNG"
    one, two = results.read_text().splitlines()
    results.write_text(f"{one}\n{two[:99]}")                           # killed while it wrote
    report = sweep(tmp_path, SWEEP, "--report")
    assert report.returncode == 0 and len(report.stdout.splitlines()) == 3 and "0 runs" not in report.stderr
    again = sweep(tmp_path, SWEEP)
    assert again.returncode == 0
    assert [line for line in again.stdout.splitlines() if "seed=0:" in line] != []       # one run was repeated
    assert again.stdout.splitlines()[-4:] == first.stdout.splitlines()[-4:]
    assert results.read_text().splitlines()[0] == one and len(results.read_text().splitlines()) == 3
    third = sweep(tmp_path, SWEEP)
    assert third.returncode == 0 and third.stdout.splitlines() == first.stdout.splitlines()[-4:]
    assert "| window | window=2 |" in third.stdout


@pytest.mark.parametrize("change, told", [
    ("window: [2]", "windows: [2]"), ("learning_rates: [1e-2]", "learning_rates: []"), ("steps: 400", "step: 400"),
    ("length: 32", "length: fast")])
def test_mistakes_in_a_sweep_are_one_sentence(tmp_path, change, told):
    result = sweep(tmp_path, SWEEP.replace(change, told))
    assert result.returncode != 0 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_a_terminated_sweep_leaves_no_process(tmp_path):
    (tmp_path / "sweep.yaml").write_text(SWEEP.replace("steps: 400", "steps: 100000").replace("0.99\n", "2.0\n"))
    process = subprocess.Popen([sys.executable, "launch/recall_sweep.py", "--config", tmp_path / "sweep.yaml",
                                "--output", tmp_path / "out"], cwd=REPO, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while len(children := psutil.Process(process.pid).children(recursive=True)) < 3 and time.monotonic() < end:
            time.sleep(0.2)                                              # two runs and multiprocessing's tracker
        assert len(children) >= 3
        process.terminate()
        assert process.wait(20) == 143
        _, alive = psutil.wait_procs(children, timeout=20)
        assert alive == []
    finally:
        process.kill()


def test_a_report_of_nothing_is_refused(tmp_path):
    result = sweep(tmp_path, SWEEP, "--report")
    assert result.returncode != 0 and "leave out --report" in result.stderr


def test_failed_runs_are_told_and_the_others_kept(tmp_path):
    broken = SWEEP.replace("test: [", "test: [{length: 16, pairs: 5}, ").replace("steps: 400", "steps: 1")
    result = sweep(tmp_path, broken)
    assert result.returncode != 0 and "2 of 2 runs failed" in result.stderr
