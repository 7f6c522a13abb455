"""benchmarks/scaling.py itself, on CPU processes: its rows, what fails, what no time is left for."""

import dataclasses
import sys
import time

import pytest

from based_mp.config import load_config
from tests.helpers import REPO

from benchmarks import scaling

LATER = 1e10


@pytest.fixture
def place(tmp_path):
    return scaling.Place(tmp_path, 2, True, time.time() + 225)


@pytest.fixture
def report():
    return scaling.Report({"rows": []})


@pytest.mark.timeout(240)
def test_rows_failures_and_the_budget(place, report, monkeypatch, capsys):
    """Equality on two processes beside one; a row that fails and one that takes too long leave the others alone."""
    monkeypatch.setattr(scaling, "START", 0)
    scaling.synthetic(place.folder / "synthetic", 200_000, 2048)
    (one,), (zero_1, zero_2), _ = [[dataclasses.replace(case, steps=6) for case in group]
                                   for group in scaling.plan(place, ["equality"], quick=True)]
    broken = dataclasses.replace(zero_1, arguments=[*zero_1.arguments, "optimizer.lr=1e30", "optimizer.min_lr=1e30"])
    cases = [zero_1, broken, zero_2, dataclasses.replace(zero_2, seconds=1e6)]
    started = [scaling.launched(place, group, str(i)) for i, group in enumerate([[one], cases])]
    try:
        for group, start in zip([[one], cases], started, strict=True):
            for case, result in scaling.run_group(place, group, start, place.end):
                report.case(case, result)
    finally:
        for job in scaling.Job.started:
            job.stop()
    first, equal, failed, also, skipped = report.record["rows"]
    assert len(first["losses"]) == 6 and first["losses"][-1] < first["losses"][0] - 0.1
    for row in (equal, also):
        assert row["within_limits"] is True and row["loss_difference"] < 1e-4 and row["norm_difference"] < 1e-3, row
        assert row["unequal_replicas"] == 0 and len(row["norms"]) == 6
    assert "the loss of step" in failed["error"] and skipped["skipped"]
    assert "failed: UserError" in capsys.readouterr().out


def test_what_hangs_is_ended_and_the_rest_skipped(place, monkeypatch):
    monkeypatch.setattr(scaling, "GRACE", 0)
    case = scaling.plan(place, ["equality"], quick=True)[0][0]
    hanging = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    job = scaling.Job([[sys.executable, "-c", hanging]], [place.environment(1)], place.folder / "log")
    results = list(scaling.run_group(place, [case, case], (job, place.folder / "go"), time.time() + 1))
    assert "killed" in results[0][1]["error"] and results[1][1]["skipped"]
    assert job.state() == "failed"


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_every_row_of_the_plan_can_start(tmp_path, gpus):
    """The configurations divide; a GPU has as many tokens a step as the one it is compared with."""
    groups = scaling.plan(scaling.Place(tmp_path, gpus, False, LATER), scaling.STAGES, quick=False)
    cases = [case for group in groups for case in group if case.kind != "generate"]
    batches = {}
    for case in cases:
        config = load_config(REPO / f"configs/{case.config}.yaml", [
            *case.arguments, f"parallel.tensor_parallel_size={case.tp}"])
        config.check_world(case.processes)
        batches.setdefault((case.kind, case.config), []).append(
            config.training.global_batch_size / (case.processes if case.kind == "speed" else 1))
    assert all(len(set(sizes)) == 1 for sizes in batches.values())
    assert len(cases) == (4 if gpus == 1 else 15) and all(len({(c.processes, c.tp) for c in g}) == 1 for g in groups)


def test_verdicts(report):
    """Each limit is missed once by a little."""
    def row(kind, processes, tp, **result):
        case = scaling.Case(kind, "based_360m", processes, tp, 1, 1, [])
        report.case(case, {"losses": [3.0, 2.0], "norms": [2.0, 1.0], "peak_bytes": 95, "predicted_bytes": 100,
                           "unequal_replicas": 0, "seconds_a_step": 1.0, "tokens_a_step": 1000 * processes} | result)
        return report.record["rows"][-1]["within_limits"]

    row("equality", 1, 1)
    assert row("equality", 2, 1, losses=[3.0, 2.004]) is True
    assert row("equality", 2, 1, losses=[3.006, 2.0]) is False
    assert row("equality", 2, 1, norms=[2.0, 1.006]) is False
    assert row("equality", 2, 1, unequal_replicas=1) is False
    row("speed", 1, 1)
    assert row("speed", 2, 1, seconds_a_step=1.05) is True
    assert row("speed", 2, 1, seconds_a_step=1.06) is False
    assert row("speed", 2, 2, seconds_a_step=1.24) is True
    assert row("speed", 2, 2, seconds_a_step=1.26) is False
    assert row("speed", 2, 1, peak_bytes=89) is False
    text = [{"tokens": [5, 6], "logprobs": [-1.0, -2.0], "text": "ab"}]
    assert row("generate", 1, 1, texts=text) is None
    assert row("generate", 2, 2, texts=text) is True
    assert row("generate", 2, 2, texts=[{**text[0], "tokens": [5, 7]}]) is False


def test_losses_of_a_resumed_run():
    straight = {step: 1.0 for step in range(1, 7)}
    resumed = {5: 1.0, 6: 1.0}
    assert scaling.difference(resumed, straight, 4, 6) == 0
    assert scaling.difference(resumed | {5: 1.25}, straight, 4, 6) == 0.25
    for wrong in (straight, {5: 1.0}, {}):
        with pytest.raises(ValueError):
            scaling.difference(wrong, straight, 4, 6)


def test_overlap_and_estimate(report, capsys):
    kernels = [("ncclDevKernel_AllReduce", 0, 10_000), ("gemm", 5_000, 8_000), ("add", 7_000, 12_000),
               ("ncclDevKernel_AllGather", 20_000, 30_000)]
    assert scaling.overlap(kernels) == {"communication_ms": 20, "compute_ms": 7, "overlapped": 0.25}
    # 1/2 × 100M × 6 bytes in 5 ms are 60 GB/s; 127/128 of 0.6 GB at 50 GB/s are 11.9 ms, half of it hidden.
    parts = scaling.estimated(0.1, 0.005, 0.5, 2, 100_000_000, 128, 50e9)
    assert parts["ring_bytes_per_second"] == pytest.approx(60e9)
    assert parts["communication_seconds"] == pytest.approx(0.01190625)
    assert parts["step_seconds"] == pytest.approx(0.105953125)
    report.solo["speed based_360m"] = {"seconds_a_step": 0.1, "tokens_per_second_per_gpu": 1000}
    report.record["rows"] = [{
        "stage": "speed", "configuration": "based_360m", "tensor_parallel": 1, "zero_stage": 1, "processes": 2,
        "parameters": 100_000_000, "communication": {"communication_ms": 5.0, "compute_ms": 90, "overlapped": 0.5}}]
    scaling.estimates(report, 16, 400, 1.0)
    assert "12 ms of communication at 50 GB/s, 944 tokens/s a GPU = 0.944" in capsys.readouterr().out


def test_no_gpu_is_one_sentence(monkeypatch):
    monkeypatch.setattr(scaling.torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(sys, "argv", ["scaling.py"])
    with pytest.raises(SystemExit, match="0 GPUs: needs 1, 2, 4 or 8"):
        scaling.main()


