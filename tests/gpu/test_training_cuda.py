"""Training steps on a GPU: the bf16 optimizer against DeepSpeed's, CUDA graphs, and that the host never waits."""

from __future__ import annotations

import shutil

import pytest
import torch

from based_mp.ops import backends
from based_mp.parallel import state
from based_mp.training import bf16_optimizer, loop, reshard
from benchmarks.train_throughput import synthetic
from tests.models import MODEL, tiny_config
from tests.parity.test_bf16_optimizer import train

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or backends.extension() is None, reason="needs a Hopper GPU and based_mp._C")
SMALL = {"d_model": 256, "feature_dim": 16, "ffn_hidden_size": 512}


@pytest.fixture(scope="module")
def ranks():
    yield state.initialize(device="cuda", seed=3)
    state.destroy()


@pytest.mark.parametrize("tokens, inputs, outputs", [(16384, 1024, 4096), (4096, 2048, 1024), (96, 48, 136), (1, 8, 8)])
def test_weight_gradient_is_added_in_fp32(tokens, inputs, outputs):
    x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn(tokens, outputs, device="cuda", dtype=torch.bfloat16)
    total = torch.randn(outputs, inputs, device="cuda")
    expected = total.double() + 2 * (dy.double().t() @ x.double())
    for _ in range(2):
        bf16_optimizer.add_weight_gradient(x, dy, total)
    # Sums of 16384 products in the tensor cores' fp32; a bf16 gradient would be off by 2e-3.
    assert (total.double() - expected).norm() < 5e-5 * expected.norm()


def test_steps_equal_deepspeeds(ranks, monkeypatch):
    _, norms, weights = train(ranks, 3, model=SMALL)
    start = [w.to(torch.bfloat16) for w in weights[0]]
    monkeypatch.setattr(bf16_optimizer, "fuse", lambda engine, **_: None)
    _, expected, expected_weights = train(ranks, 3, model=SMALL, start=start)
    assert [float(n) for n in norms] == pytest.approx([float(n) for n in expected], rel=5e-3) and min(norms) > 0.5
    for before, after, truth in zip(weights[:-1], weights[1:], expected_weights[1:], strict=True):
        for first, a, b in zip(before, after, truth, strict=True):
            assert (a - b).norm() < 0.1 * (b - first).norm()


def test_the_host_never_waits(ranks, monkeypatch):
    """After the first steps, which allocate and compile."""
    def waits(*args):
        raise AssertionError("torch.cuda.synchronize")

    def settled(step):
        if step == 2:
            monkeypatch.setattr(torch.cuda, "synchronize", waits)
        torch.cuda.set_sync_debug_mode("error" if step in (2, 3) else "default")

    try:
        train(ranks, 4, model=SMALL, before_step=settled)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def run(ranks, folder, *, steps, graph=True, before_step=lambda step: None, **sections):
    """[(loss, gradient norm)] of every step of a run of launch/pretrain.py's loop, and the trainer."""
    if not (folder / "data.idx").exists():
        synthetic(folder / "data", 40_000, 120)
    ours = {"model": SMALL, "data": {"train": [{"path": str(folder / "data")}], "cache_dir": str(folder / "cache")},
            "training": {"precision": "bf16", "device": "cuda", "steps": steps, "seq_length": 128, "cuda_graph": graph},
            "optimizer": {"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 4}, "validation": {"interval": 0},
            "logging": {"log_interval": 1}}
    config = tiny_config(**{name: {**(MODEL if name == "model" else {}), **ours.get(name, {}), **sections.get(name, {})}
                            for name in ours.keys() | sections.keys()})
    state.initialize(device="cuda", seed=5)
    trainer, lines = loop.Trainer(config, ranks), []
    trainer.metrics.log_step = lambda step, loss, lr, norm: lines.append((loss, norm))
    step = trainer._train_step
    trainer._train_step = lambda *args: (before_step(trainer.step), step(*args))[1]
    trainer.run()
    return lines, trainer


@pytest.mark.parametrize("recompute, fp8", [("none", "none"), ("norms", "none"), ("selective", "none"),
                                            ("norms", "rowwise")])
def test_graph_equals_eager(ranks, tmp_path, recompute, fp8):
    training = {"recompute": recompute, "fp8": fp8}
    ours, trainer = run(ranks, tmp_path, steps=8, training=training)
    expected, eager = run(ranks, tmp_path, steps=8, graph=False, training=training)
    assert trainer.micro_batch.graph is not None and eager.micro_batch.graph is None
    assert ours[0] == expected[0] and len({loss for loss, _ in ours}) == 8
    for (loss, norm), (other, other_norm) in zip(ours, expected, strict=True):
        assert loss == pytest.approx(other, abs=2e-3) and norm == pytest.approx(other_norm, rel=5e-3)


def test_sharded_gradients_equal_whole_ones(ranks, tmp_path, monkeypatch):
    """ZeRO-2's buffers and its stream in CUDA graphs; one GPU keeps all partitions."""
    expected, _ = run(ranks, tmp_path, steps=8)
    fuse = bf16_optimizer.fuse

    def sharding(engine, **_):
        fuse(engine)
        engine.optimizer.shard_gradients()

    monkeypatch.setattr(bf16_optimizer, "fuse", sharding)
    ours, trainer = run(ranks, tmp_path, steps=8)
    assert trainer.micro_batch.graph is not None and trainer.engine.optimizer.sharded is not None
    assert len(ours) == 8 and len({loss for loss, _ in ours}) == 8
    for (loss, norm), (other, other_norm) in zip(ours, expected, strict=True):
        assert loss == pytest.approx(other, abs=2e-3) and norm == pytest.approx(other_norm, rel=5e-3)


def test_the_host_never_waits_for_graphs(ranks, tmp_path):
    """But to log a line, which does not happen in `_train_step`."""
    def settled(step):
        torch.cuda.set_sync_debug_mode("error" if step in (3, 4) else "default")

    try:
        run(ranks, tmp_path, steps=6, before_step=settled, logging={"log_interval": 6})
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_goes_on_from_saved_and_resharded(ranks, tmp_path):
    """The last 4 of 8 steps once more: from the checkpoint itself, and from it resharded."""
    straight, _ = run(ranks, tmp_path, steps=8, checkpoint={"dir": str(tmp_path / "straight"), "interval": 4})
    saved = tmp_path / "straight/step_00000004"
    shutil.copytree(saved, tmp_path / "saved" / saved.name)
    (tmp_path / "saved/latest").write_text(saved.name)
    reshard.reshard(saved, tmp_path / "resharded")
    for folder in ("saved", "resharded"):
        lines, trainer = run(ranks, tmp_path, steps=8, checkpoint={"dir": str(tmp_path / folder), "interval": 4})
        assert len(lines) == 4 and trainer.step == 8
        for (loss, norm), (other, other_norm) in zip(lines, straight[4:], strict=True):
            assert loss == pytest.approx(other, abs=2e-3) and norm == pytest.approx(other_norm, rel=5e-3)
