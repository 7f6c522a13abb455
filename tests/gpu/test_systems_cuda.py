"""The compared systems on a GPU in bf16: against fp32 in plain torch, generation, flash-linear-attention's kernels."""

import pytest
import torch

from based_mp.ops import backends, recurrences
from based_mp.parallel import state
from tests.parity.test_systems import SYSTEMS, Rows, full_logits, system_config, tokens_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(autouse=True)
def untuned(monkeypatch):
    """Triton's tuners take their first configuration: the fastest takes a minute to find and computes the same."""
    from triton.runtime.autotuner import Autotuner
    monkeypatch.setattr(Autotuner, "prune_configs", lambda tuner, options: tuner.configs[:1])


@pytest.fixture
def gpu_process():
    yield state.initialize(device="cuda", seed=3)
    state.destroy()


WITH_KERNELS = ("gla", "mamba", "rwkv")


@pytest.mark.parametrize("kind, kernels", [(kind, "torch") for kind in SYSTEMS] + [(k, "auto") for k in WITH_KERNELS])
def test_training_and_generation_in_bf16(kind, kernels, gpu_process):
    from based_mp.inference.model import InferenceModel
    from based_mp.model.based_model import build_model, forward_loss
    tokens, losses, weights = tokens_of(200).cuda(), {}, None
    batch = {"tokens": tokens, "labels": tokens.roll(-1, 1), "loss_mask": torch.ones(2, 200, device="cuda")}
    for precision, used in (("fp32", "torch"), ("bf16", kernels)):
        torch.manual_seed(5)
        config = system_config(kind, model={"init_std": 0.05, "kernels": used, "rwkv": {"head_dim": 32}},
                               training={"precision": precision, "device": "cuda", "seq_length": 256})
        model = build_model(config)
        if weights is not None:
            model.load_state_dict({name: value.bfloat16() for name, value in weights.items()})
        weights = model.state_dict()
        loss = forward_loss(model, batch)
        loss.backward()
        losses[precision] = loss.item()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=1e-2)
    rows = Rows(InferenceModel(model.eval(), config.model), 2)
    steps = [torch.stack(rows.feed([row[:150].tolist() for row in tokens]))]
    steps += [rows.step(tokens[:, t])[:, None] for t in range(150, 200)]
    full = full_logits(model, tokens).float()
    assert ((torch.cat(steps, 1).float() - full).norm() / full.norm()).item() < 3e-2


@pytest.mark.skipif(backends.fla_ops() is None, reason="needs the extra fla")
@pytest.mark.parametrize("with_bonus", [False, True])
def test_flash_linear_attention_equals_plain_torch(with_bonus):
    q, k, v = (torch.randn(2, 300, 3, 32, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    decay = -torch.rand(2, 300, 3, 32, device="cuda")
    bonus = torch.randn(3, 32, device="cuda") if with_bonus else None
    initial = torch.randn(2, 3, 32, 32, device="cuda")
    expected, last = recurrences.gated_linear_attention(
        q.double(), k.double(), v.double(), decay.double(), scale=0.2, bonus=bonus, initial=initial.double())
    got, final = backends.gated_linear_attention(q, k, v, decay, scale=0.2, bonus=bonus, initial=initial, kernels="fla")
    assert ((got - expected).norm() / expected.norm()).item() < 1e-2
    assert ((final - last).norm() / last.norm()).item() < 1e-2


def test_a_small_sweep_learns_on_the_gpu(gpu_process):
    """BASED at d' = 16 solves 16 pairs in 64 tokens."""
    from based_mp.config import ModelConfig
    from based_mp.evaluation.mqar import Recipe, train_mqar
    model = ModelConfig(d_model=64, num_layers=2, num_heads=1, vocab_size=1024, ffn_hidden_size=0, init_std=0.1,
                        mixer_layers={"gated_conv": [0]}, other_layers="linear_attention", feature_dim=16)
    recipe = Recipe(train=((64, 8, 1.0), (64, 16, 1.0)), test=((64, 16), (128, 16)), vocab_size=1024, batch_tokens=8192,
                    steps=600, warmup_steps=50, lr=3e-3, seed=0, weight_decay=0.1, test_rows=128, check_interval=100,
                    stop_accuracy=0.99, precision="bf16")
    result = train_mqar(model, recipe, torch.device("cuda"))
    assert result["accuracy"]["64x16"] > 0.98, result
