"""Tensor parallel × data parallel × ZeRO against plain PyTorch in one process: losses, gradient norms, replicas."""

import json

import pytest

from tests.helpers import REPO, run_distributed

WORKER = REPO / "tests" / "dist" / "train_worker.py"
# processes, tensor parallel size, ZeRO stage, sequence parallel, steps
LAYOUTS = [(4, 2, 1, True, 20), (4, 2, 2, True, 20), (4, 2, 3, True, 20), (4, 2, 1, False, 5), (4, 4, 1, True, 5),
           (4, 4, 1, False, 5), (2, 1, 2, False, 5)]
BF16 = [(2, 1), (4, 2)]                                   # processes, tensor parallel size
# Partial gradients that are not summed; sharded parameters of one kind of mixer that are not tagged as such.
FAULTS = [("norms", 4, 3), ("norms", 2, 1), ("GatedConv", 2, 1), ("LinearAttention", 2, 1), ("SoftmaxAttention", 2, 1)]
# Other models and ways to compute: heads of 112, an untied output, decay, recomputation, bf16.
CHANGES = {
    "head dimension 112": {"model": {"d_model": 224, "num_heads": 2}}, "untied": {"model": {"tie_embeddings": False}},
    "decay": {"model": {"decay_exponent": -3}}, "full recomputation": {"training": {"steps": 3, "recompute": "full"}},
    "selective recomputation": {"training": {"steps": 3, "recompute": "selective"}},
    "bf16": {"training": {"steps": 3, "precision": "bf16"}},
    "fp8": {"training": {"steps": 3, "precision": "bf16", "fp8": "rowwise"}}}


def compared(*systems):
    """A model of the systems that BASED is compared with, a layer each."""
    return {"model": {
        "num_layers": len(systems), "linear_attention_layers": [], "sliding_attention_layers": [],
        "mixer_layers": {kind: [i] for i, kind in enumerate(systems)}, "gla": {"num_heads": 2, "gate_rank": 4},
        "rwkv": {"head_dim": 16}, "mamba": {"d_state": 4}, "h3": {"d_state": 8},
        # With the usual 14, sines of sines of sines turn rounding noise into another run within two steps.
        "hyena": {"sine_frequency": 1.0}}}


SYSTEMS = [(compared("gla", "mamba", "h3", "hyena"), True), (compared("rwkv", "gla"), False)]     # sequence parallel?


def case(tp, zero, sp, steps=20, fault="none", changes=None):
    return {"tp": tp, "zero": zero, "sp": sp, "fault": fault, "steps": steps, "changes": changes or {}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The result of a case; one start of the processes runs all cases that need as many."""
    cases = [(1, case(1, None, False))] + [(processes, case(*layout)) for processes, *layout in LAYOUTS]
    cases += [(processes, case(2, zero, True, 3, fault)) for fault, processes, zero in FAULTS]
    cases += [(2, case(2, 1, True, 3, changes=changes)) for changes in CHANGES.values()]
    cases += [(n, case(tp, zero, tp > 1, 3, changes=CHANGES["bf16"])) for n, tp in BF16 for zero in (1, 2)]
    cases += [(1, case(1, None, False, 3, changes={"model": changes["model"]})) for changes in CHANGES.values()
              if "model" in changes]
    for changes, sp in SYSTEMS:
        cases += [(1, case(1, None, False, 3, changes=changes)), (2, case(2, 1, sp, 3, changes=changes))]
    results = {}

    def of(processes, wanted):
        together = [c for n, c in cases if n == processes and c["tp"] == wanted["tp"]]
        if str(wanted) not in results:
            out = tmp_path_factory.mktemp("trained") / "out.json"
            run_distributed(processes, WORKER, [out, json.dumps(together)])
            results.update(zip(map(str, together), json.loads(out.read_text()), strict=True))
        return results[str(wanted)]

    return of


@pytest.fixture(scope="module")
def plain(trained):
    """20 AdamW steps of plain PyTorch; clipping must be active, or the norm would not be tested."""
    history = trained(1, case(1, None, False))["history"]
    assert len(history) == 20 and all(norm > 0.5 for _, norm in history)
    return history


def deviation(result, plain):
    """Largest |Δloss| and relative |Δ gradient norm| over the steps."""
    pairs = list(zip(result["history"], plain, strict=True))
    return max(abs(a[0] - b[0]) for a, b in pairs), max(abs(a[1] - b[1]) / b[1] for a, b in pairs)


@pytest.mark.parametrize("processes, tp, zero, sp, steps", LAYOUTS)
def test_equals_plain_pytorch(trained, plain, processes, tp, zero, sp, steps):
    result = trained(processes, case(tp, zero, sp, steps))
    loss, norm = deviation(result, plain[:steps])
    assert loss < 1e-5 and norm < 1e-5
    assert result["unequal"] == 0


@pytest.mark.parametrize("fault, processes, zero", FAULTS)
def test_negative_controls_are_caught(trained, plain, fault, processes, zero):
    """The faults that the limits above are there for do exceed them."""
    result = trained(processes, case(2, zero, True, 3, fault))
    _, norm = deviation(result, plain[:3])
    assert norm > 1e-5
    assert result["unequal"] > 0


@pytest.mark.parametrize("name", CHANGES)
def test_other_models_and_computations(trained, plain, name):
    changes = CHANGES[name]
    if "model" in changes:
        plain = trained(1, case(1, None, False, 3, changes=changes))["history"]
    result = trained(2, case(2, 1, True, 3, changes=changes))
    loss, norm = deviation(result, plain[:3])
    assert result["unequal"] == 0
    if name in ("bf16", "fp8"):
        assert 1e-5 < loss < 0.02 and 1e-5 < norm < 0.03
    else:
        assert loss < 1e-5 and norm < 1e-5


@pytest.mark.parametrize("processes, tp", BF16)
def test_bf16_data_parallel(trained, plain, processes, tp):
    """ZeRO-2 differs from ZeRO-1 in the order of sums alone."""
    zero_1, zero_2 = (trained(processes, case(tp, zero, tp > 1, 3, changes=CHANGES["bf16"])) for zero in (1, 2))
    loss, norm = deviation(zero_1, plain[:3])
    assert zero_1["unequal"] == 0 and 1e-5 < loss < 0.02 and 1e-5 < norm < 0.03
    loss, norm = deviation(zero_2, zero_1["history"])
    assert zero_2["unequal"] == 0 and loss < 1e-4 and norm < 1e-4


@pytest.mark.parametrize("changes, sp", SYSTEMS, ids=["gla, mamba, h3, hyena", "rwkv, gla"])
def test_compared_systems_equal_plain_pytorch(trained, changes, sp):
    plain = trained(1, case(1, None, False, 3, changes=changes))["history"]
    result = trained(2, case(2, 1, sp, 3, changes=changes))
    loss, norm = deviation(result, plain)
    assert loss < 1e-5 and norm < 1e-5
    assert result["unequal"] == 0
