"""The bf16 optimizer with few passes over the gradients against DeepSpeed's own."""

import gc
import weakref

import pytest
import torch
from megatron.core import parallel_state

from based_mp.model.based_model import forward_loss
from based_mp.training import bf16_optimizer
from based_mp.training.engine import build_engine
from based_mp.training.sharded_gradients import ShardedGradients
from tests.models import MODEL, tiny_config

STEPS = 3


@pytest.fixture
def ranks(gloo_process):
    return gloo_process


def train(ranks, steps, *, model=None, start=None, before_step=lambda step: None, **optimizer):
    """The engine after `steps` steps of four micro-batches, gradient norms, and fp32 weights before and after each.

    start: the first bf16 weights, flat. before_step(step) is called before each; no step waits for the GPU by itself.
    """
    torch.manual_seed(4)
    device = ranks.device.type
    engine = build_engine(tiny_config(training={"precision": "bf16", "device": device}, optimizer=optimizer,
                                      model={**MODEL, **(model or {})}), ranks)
    if start is not None:
        for flat, values in zip(engine.optimizer.bf16_groups_flat, start, strict=True):
            flat.data.copy_(values)
        engine.optimizer.refresh_fp32_params()
    masters = engine.optimizer.fp32_groups_flat_partition
    norms, weights = [], [[w.detach().clone() for w in masters]]
    ids = torch.randint(0, 120, (steps, 4, 2, 33), generator=torch.Generator().manual_seed(1)).to(device)
    mask = torch.ones(2, 32, device=device)
    for step in range(steps):
        before_step(step)
        for micro_batch in ids[step]:
            batch = {"tokens": micro_batch[:, :-1], "labels": micro_batch[:, 1:], "loss_mask": mask}
            engine.backward(forward_loss(engine, batch))
            engine.step()
        norms.append(engine.get_global_grad_norm())
        weights.append([w.detach().clone() for w in masters])
    before_step(steps)
    return engine, norms, weights


@pytest.mark.parametrize("clip", [0.5, 100.0])
def test_equals_deepspeeds(ranks, monkeypatch, clip):
    engine, norms, weights = train(ranks, STEPS, clip_grad_norm=clip)
    assert type(engine.optimizer) is bf16_optimizer.FusedBF16Optimizer
    monkeypatch.setattr(bf16_optimizer, "fuse", lambda engine, **_: None)
    plain, expected, expected_weights = train(ranks, STEPS, clip_grad_norm=clip)
    assert type(plain.optimizer) is not bf16_optimizer.FusedBF16Optimizer
    assert [float(n) for n in norms] == pytest.approx([float(n) for n in expected], rel=2e-3) and min(norms) > 0.5
    for before, after, truth in zip(weights[:-1], weights[1:], expected_weights[1:], strict=True):
        for start, a, b in zip(before, after, truth, strict=True):
            assert (a - b).norm() < 0.03 * (b - start).norm()


def test_first_moments_are_those_of_clipped_gradients(ranks):
    engine, (norm,), _ = train(ranks, 1, clip_grad_norm=0.5)
    moments = [engine.optimizer.state[w]["exp_avg"] for w in engine.optimizer.fp32_groups_flat_partition]
    assert norm > 0.5
    assert torch.nn.utils.get_total_norm(moments) == pytest.approx(0.1 * 0.5, rel=1e-4)            # 1 − β1 = 0.1


def test_a_step_with_infinite_gradients_changes_nothing(ranks):
    engine, _, _ = train(ranks, 1)
    weights = [p.detach().clone() for p in engine.module.parameters()]
    states = [{k: v.clone() for k, v in s.items()} for s in engine.optimizer.state.values()]
    ids = torch.zeros(2, 33, dtype=torch.long)
    for micro_batch in range(4):
        engine.backward(forward_loss(engine, {"tokens": ids[:, :-1], "labels": ids[:, 1:],
                                              "loss_mask": torch.ones(2, 32)}))
        if micro_batch == 2:
            next(engine.module.parameters()).main_grad[0, 0] = float("inf")
        engine.step()
    assert not torch.isfinite(torch.as_tensor(engine.get_global_grad_norm()))
    assert all(torch.equal(a, b) for a, b in zip(weights, engine.module.parameters(), strict=True))
    for before, after in zip(states, engine.optimizer.state.values(), strict=True):
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(not s.any() for s in engine.optimizer.fp32_groups_gradients_flat)


@pytest.mark.parametrize("zero", [1, 2])
def test_what_a_destroyed_engine_held_is_freed(ranks, zero):
    engine, *_ = train(ranks, 1)
    if zero == 2:
        engine.optimizer.shard_gradients(engine.module)
    optimizer = engine.optimizer
    held = [weakref.ref(t) for t in (*optimizer.fp32_groups_flat_partition, *optimizer.fp32_groups_gradients_flat,
                                     *optimizer.bf16_groups_flat, *(p.main_grad for p in engine.module.parameters()))]
    engine.destroy()
    del engine, optimizer
    gc.collect()
    assert len(held) > 30 and not any(reference() is not None for reference in held)


def sharded(names, ranks, twice=None):
    """Gradients of two values each, all of them kept by the one rank."""
    parameters = {name: torch.nn.Parameter(torch.zeros(2)) for name in names}
    kept, group = torch.zeros(2 * len(names)), parallel_state.get_data_parallel_group()
    return parameters, ShardedGradients(parameters.items(), kept, group, twice=parameters.get(twice))


def test_sharded_gradients_of_layers_share_two_buffers(ranks):
    names = ["embedding.weight", *(f"decoder.layers.{i}.{part}.weight" for i in range(3) for part in "ab")]
    parameters, gradients = sharded(names, ranks, twice=names[0])
    starts = [p.main_grad.data_ptr() for p in parameters.values()]
    assert starts[1] == starts[5] and starts[2] == starts[6] and len(set(starts)) == 5
    for micro_batch in (1, 2):                  # the LM head's, which shares the embedding, comes before all others
        for i, name in [(10, names[0]), *reversed(list(enumerate(names)))]:
            parameters[name].main_grad += micro_batch * i
            gradients.made(parameters[name])
        gradients.check_complete()
    assert gradients.kept.tolist() == [3 * (i or 10) for i in range(7) for _ in range(2)]
    assert not any(p.main_grad.any() for p in parameters.values())


def test_sharded_gradients_tell_of_another_order_and_of_missing_parameters(ranks):
    names = [f"layers.{i}.weight" for i in range(3)]
    parameters, gradients = sharded(names, ranks)
    gradients.made(parameters["layers.2.weight"])
    with pytest.raises(RuntimeError, match="set parallel.zero_stage=1"):
        gradients.check_complete()
    with pytest.raises(RuntimeError, match="left the order .* set parallel.zero_stage=1"):
        gradients.made(parameters["layers.0.weight"])
