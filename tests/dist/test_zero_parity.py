"""Tensor parallel × data parallel × ZeRO against plain PyTorch in one process: losses, gradient norms, replicas."""

import json

import pytest

from tests.helpers import REPO, run_distributed

WORKER = REPO / "tests" / "dist" / "train_worker.py"


def train(folder, processes, tp=1, zero=1, sp=False, fault="none", reference=False, systems=()):
    out = folder / f"{processes}_{tp}_{zero}_{int(sp)}_{fault}_{int(reference)}.json"
    run_distributed(processes, WORKER, [out, tp, zero, int(sp), fault, int(reference), *systems])
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """20 AdamW steps of plain PyTorch; clipping must be active, or the norm would not be tested."""
    result = train(tmp_path_factory.mktemp("plain"), 1, zero=0, reference=True)
    assert all(norm > 0.5 for _, norm in result["history"])
    return result["history"]


def deviation(result, plain):
    """Largest |Δloss| and relative |Δ gradient norm| over the steps."""
    assert len(result["history"]) == len(plain) == 20
    pairs = list(zip(result["history"], plain, strict=True))
    return max(abs(a[0] - b[0]) for a, b in pairs), max(abs(a[1] - b[1]) / b[1] for a, b in pairs)


@pytest.mark.parametrize("processes, tp, zero, sp", [
    (4, 2, 1, True), (4, 2, 2, True), (4, 2, 3, True), (4, 2, 1, False), (4, 4, 1, True), (2, 1, 2, False)])
def test_equals_plain_pytorch(tmp_path, plain, processes, tp, zero, sp):
    result = train(tmp_path, processes, tp, zero, sp)
    loss, norm = deviation(result, plain)
    assert loss < 1e-5 and norm < 1e-5
    assert result["unequal"] == 0


@pytest.mark.parametrize("fault", ["norms", "attributes"])
def test_negative_controls_are_caught(tmp_path, plain, fault):
    """The faults the limits above are there for do exceed them (the attributes only in the norm)."""
    loss, norm = deviation(train(tmp_path, 4, 2, 1, sp=True, fault=fault), plain)
    assert norm > 1e-5


@pytest.mark.parametrize("systems, sp", [(("gla", "mamba", "h3", "hyena"), True), (("rwkv", "gla"), False)])
def test_compared_systems_equal_plain_pytorch(tmp_path, systems, sp):
    plain = train(tmp_path, 1, zero=0, reference=True, systems=systems)["history"]
    result = train(tmp_path, 2, 2, 1, sp, systems=systems)
    loss, norm = deviation(result, plain)
    assert loss < 1e-5 and norm < 1e-5
    assert result["unequal"] == 0
