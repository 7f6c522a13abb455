"""Whole runs on two or four processes: resume, signals, faults while saving, other layouts."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from based_mp.inference.load import full_state
from based_mp.model.based_model import build_model
from data_prep.indexed import write_index
from tests.helpers import REPO, run_distributed
from tests.models import tiny_config

WORKER = REPO / "tests" / "dist" / "run_worker.py"
LIMIT = 1e-5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """40 documents of 300 tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    lengths = np.full(40, 300, np.int32)
    tokens = np.random.default_rng(0).zipf(1.5, int(lengths.sum()))
    np.minimum(tokens, 119).astype(np.uint16).tofile(folder / "c.bin")
    write_index(folder / "c.idx", [lengths], np.dtype(np.uint16), len(lengths))
    return folder / "c"


def write_config(folder: Path, corpus: Path, name: str = "run", steps: int = 6, log_interval: int = 1,
                 save_interval: int = 0, precision: str = "fp32", **parallel) -> Path:
    folder.mkdir(exist_ok=True)
    config = tiny_config(
        parallel=parallel, data={"train": [{"path": str(corpus)}], "cache_dir": str(corpus.parent / "cache")},
        training={"steps": steps, "precision": precision}, validation={"interval": 0}, logging={"log_interval": log_interval},
        checkpoint={"dir": str(folder / name), "interval": save_interval})
    file = folder / f"{name}.yaml"
    file.write_text(config.to_yaml())
    return file


def train(processes, config, *args, check=True):
    """[step, loss, gradient norm] of every step."""
    out = config.with_suffix(".json")
    outputs = run_distributed(processes, WORKER, [config, out, *args], check=check)
    return json.loads(out.read_text()) if out.is_file() else [], outputs


def flip(file: Path) -> None:
    """Another byte amid the numbers; the file's size and structure are as before."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    file.write_bytes(data)


def start_from(folder: Path, source: str, step: str, target: str) -> None:
    """A checkpoint.dir that holds one checkpoint of another run."""
    shutil.copytree(folder / source / step, folder / target / step)
    (folder / target / "latest").write_text(step)


def tensors(value, name=""):
    """Every tensor in a nested checkpoint, with its path."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key in value:
            yield from tensors(value[key], f"{name}/{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from tensors(item, f"{name}/{i}")


@pytest.mark.parametrize("processes, tp, zero", [(2, 1, 1), (2, 2, 2), (2, 1, 3), (1, 1, 0)])
def test_resume_is_bitwise(tmp_path, corpus, processes, tp, zero):
    layout = {"tensor_parallel_size": tp, "zero_stage": zero}
    whole, _ = train(processes, write_config(tmp_path, corpus, "straight", save_interval=3, **layout))
    start_from(tmp_path, "straight", "step_00000003", "broken")
    rest, _ = train(processes, write_config(tmp_path, corpus, "broken", **layout))
    assert [step for step, *_ in whole] == [1, 2, 3, 4, 5, 6]
    assert rest == whole[3:]
    a, b = (tmp_path / name / "step_00000006" for name in ("straight", "broken"))
    compared = 0
    for file in sorted(a.glob("*.pt")):
        ours, theirs = (dict(tensors(torch.load(p / file.name, weights_only=False))) for p in (a, b))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        compared += len(ours)
    assert compared > 20


def test_bf16_resumes_and_reshards(tmp_path, corpus):
    """Saved with ZeRO-2 on two processes: bitwise there, with ZeRO-1 but for the order of sums, on one near."""
    options = {"precision": "bf16", "zero_stage": 2}
    whole, outputs = train(2, write_config(tmp_path, corpus, "straight", save_interval=3, **options))
    assert not any(" GB" in output for output in outputs), outputs             # DeepSpeed's reports of memory
    for name in ("same", "zero_1"):
        start_from(tmp_path, "straight", "step_00000003", name)
    subprocess.run([sys.executable, "launch/convert.py", "reshard", "--checkpoint", tmp_path / "same",
                    "--output", tmp_path / "one"], cwd=REPO, check=True)
    for name, processes, stage, limit in (("same", 2, 2, 0), ("zero_1", 2, 1, 1e-4), ("one", 1, 1, 5e-3)):
        rest, outputs = train(processes, write_config(tmp_path, corpus, name, precision="bf16", zero_stage=stage))
        assert "step_00000003 at step 3" in outputs[0] and [step for step, *_ in rest] == [4, 5, 6]
        assert max(abs(a[1] - b[1]) for a, b in zip(rest, whole[3:], strict=True)) <= limit, (name, rest, whole)
        assert max(abs(a[2] - b[2]) / b[2] for a, b in zip(rest, whole[3:], strict=True)) <= limit, (name, rest, whole)


@pytest.mark.parametrize("fault", ["die_in_save", "disk_full_1"])
def test_failed_save_leaves_the_older_checkpoint(tmp_path, corpus, fault):
    """What was saved before stays and is gone on from; the reason, known to one rank, is told once."""
    config = write_config(tmp_path, corpus, save_interval=2)
    before, outputs = train(2, config, 4, fault, check=False)
    if fault == "disk_full_1":
        lines = [line for output in outputs for line in output.splitlines()]
        errors = [line for line in lines if line.startswith("error:")]
        assert len(errors) == 1 and "older checkpoints are unchanged" in errors[0] and "write" in errors[0], outputs
        assert not any("Traceback" in line for line in lines), outputs
        assert [step for step, *_ in before] == [1, 2, 3, 4]
    assert (tmp_path / "run" / "latest").read_text() == "step_00000002"
    steps, _ = train(2, config, 3)
    assert [step for step, *_ in steps] == [3]
    assert not list((tmp_path / "run").glob(".writing_*"))


@pytest.mark.parametrize("layout", [{}, {"tensor_parallel_size": 2}, {"zero_stage": 3}],
                         ids=["zero 1", "tensor parallel", "zero 3"])
def test_every_rank_learns_of_a_failed_save_or_load(tmp_path, corpus, layout):
    """Whatever one rank fails to write, all raise its reason, nothing of it stays, and the run could go on.

    So do they where one rank fails to read.
    """
    config, out = write_config(tmp_path, corpus, steps=20, **layout), tmp_path / "out.json"
    run_distributed(2, REPO / "tests" / "dist" / "save_worker.py", [config, out])
    result = json.loads(out.read_text())
    assert len(result["faults"]) == 8
    for name, fault in result["faults"].items():
        assert len(set(fault["told"])) == 1 and "older checkpoints are unchanged: " in fault["told"][0], (name, fault)
        assert fault["latest"] == "step_00000002", (name, fault)
        expected = ["latest", "step_00000002"] + ["step_00000010"] * (name == "latest")
        assert fault["there"] == expected, (name, fault)
    assert result["step"] == 11 and result["latest"] == "step_00000011"
    shards = sorted((tmp_path / "run" / "step_00000011").glob("*.pt"))
    flip(shards[-1])                                                # read by rank 1 alone
    assert shards[-1].name.startswith("zero_pp_rank_1") or "mp_rank_01" in shards[-1].name
    _, outputs = train(2, config, check=False)
    errors = [line for output in outputs for line in output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and f"the bytes of {shards[-1].name} are damaged" in errors[0], outputs
    assert not any("Traceback" in output for output in outputs), outputs


def test_loss_that_is_no_number_is_not_saved(tmp_path, corpus):
    config = write_config(tmp_path, corpus, log_interval=100, save_interval=1)
    _, outputs = train(1, config, 6, "nan", check=False)
    assert "error: the loss of step 3 is nan" in outputs[0] and "step_00000002" in outputs[0]
    assert (tmp_path / "run" / "latest").read_text() == "step_00000002"


def test_zero_0_counts_the_gradient_norm_as_zero_1_does(tmp_path, corpus):
    """DeepSpeed reports none at stage 0: the loop sums it, over tensor-parallel ranks once each."""
    four, _ = train(4, write_config(tmp_path, corpus, "four", tensor_parallel_size=2, zero_stage=0), 3)
    one, _ = train(1, write_config(tmp_path, corpus, "one"), 3)
    assert max(abs(a[1] - b[1]) for a, b in zip(four, one, strict=True)) < LIMIT
    assert max(abs(a[2] - b[2]) / b[2] for a, b in zip(four, one, strict=True)) < LIMIT


@pytest.mark.timeout(600)
def test_reshard(tmp_path, corpus, gloo_process):
    """TP 2 × DP 2 goes on at other layouts with the same losses: same weights, moments and data order."""
    straight = write_config(tmp_path, corpus, "straight", save_interval=3, tensor_parallel_size=2,
                            sequence_parallel=True)
    expected = train(4, straight)[0][3:]
    start_from(tmp_path, "straight", "step_00000003", "source")
    other = write_config(tmp_path, corpus, "source", tensor_parallel_size=1)
    _, outputs = train(1, other, check=False)
    assert "TP 2 × DP 2" in outputs[0] and "launch/convert.py reshard" in outputs[0]
    for processes, tp in [(1, 1), (4, 1), (4, 4)]:
        name = f"to_{tp}_{processes}"
        subprocess.run([sys.executable, "launch/convert.py", "reshard", "--checkpoint", tmp_path / "source",
                        "--output", tmp_path / name], cwd=REPO, check=True)
        steps, _ = train(processes, write_config(tmp_path, corpus, name, tensor_parallel_size=tp))
        assert [step for step, *_ in steps] == [4, 5, 6]
        assert max(abs(a[1] - b[1]) for a, b in zip(steps, expected, strict=True)) < LIMIT
        assert max(abs(a[2] - b[2]) / b[2] for a, b in zip(steps, expected, strict=True)) < LIMIT
    model = build_model(tiny_config())
    source, universal = (full_state(tmp_path / name / "step_00000003", model) for name in ("source", "to_1_1"))
    assert all(torch.equal(source[name], universal[name]) for name in source)
