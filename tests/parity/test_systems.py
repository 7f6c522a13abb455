"""Every compared system in the same model: prefill and decode = full forward, ragged = alone, packed = separate."""

import pytest
import torch

from based_mp.parallel import state
from tests.models import tiny_config

SYSTEMS = ("gla", "mamba", "h3", "hyena", "rwkv")
SMALL = {"gla": {"num_heads": 2, "gate_rank": 4}, "mamba": {"d_state": 4}, "h3": {"d_state": 24},
         "hyena": {"filter_length": 256, "filter_width": 8, "filter_embedding": 5}, "rwkv": {"head_dim": 16}}


def system_config(kind, **sections):
    model = {"num_layers": 2, "linear_attention_layers": [], "sliding_attention_layers": [], "other_layers": kind,
             "init_std": 0.2, **SMALL} | sections.pop("model", {})
    return tiny_config(model=model, **sections)


@pytest.fixture(scope="module", params=SYSTEMS)
def model(request):
    state.initialize(device="cpu", seed=3)
    from based_mp.model.based_model import build_model
    yield build_model(system_config(request.param)).eval()
    state.destroy()


def tokens_of(length, batch=2):
    return torch.randint(1, 120, (batch, length), generator=torch.Generator().manual_seed(length))


def full_logits(model, tokens):
    with torch.no_grad():
        return model(tokens, torch.zeros_like(tokens), None)


@pytest.mark.parametrize("length", [1, 7, 65, 150])
def test_prefill_and_decode_equal_the_full_forward(model, length):
    from based_mp.model.based_model import extend, init_states
    tokens, states, cut = tokens_of(length), init_states(model, 2), (length + 1) // 2
    pieces = [tokens[:, : cut // 3], tokens[:, cut // 3 : cut]] + [tokens[:, t : t + 1] for t in range(cut, length)]
    steps = [extend(model, piece, states) for piece in pieces if piece.shape[1]]
    torch.testing.assert_close(torch.cat(steps, 1), full_logits(model, tokens), rtol=1e-4, atol=1e-4)


def test_ragged_prefill_in_pieces_equals_each_row_alone(model):
    from based_mp.model.based_model import extend, init_states
    rows = [tokens_of(n, 1) for n in (1, 40, 90)]
    states = init_states(model, 3)
    for start, stop in ((0, 30), (30, 90)):
        pieces = [row[:, start:stop] for row in rows]
        bounds = torch.tensor([0, *(p.shape[1] for p in pieces)]).cumsum(0).to(torch.int32)
        extend(model, torch.cat(pieces, 1), states, bounds)
    follower = torch.tensor([[5], [7], [9]])
    logits = extend(model, follower, states)
    for i, row in enumerate(rows):
        alone = full_logits(model, torch.cat([row, follower[i : i + 1]], 1))[0, -1]
        torch.testing.assert_close(logits[i, 0], alone, rtol=1e-4, atol=1e-4)


def test_packed_training_equals_separate_documents(model):
    from based_mp.model.based_model import token_losses
    tokens = tokens_of(40)
    bounds = torch.tensor([0, 10, 40, 55, 80], dtype=torch.int32)
    batch = {"tokens": tokens, "labels": tokens.roll(-1, 1), "cu_seqlens": bounds}
    with torch.no_grad():
        packed = token_losses(model, batch).flatten()
        for a, b in zip(bounds[:-1], bounds[1:], strict=True):
            piece = {k: v.flatten()[a:b][None] for k, v in batch.items() if k != "cu_seqlens"}
            torch.testing.assert_close(packed[a:b], token_losses(model, piece)[0], rtol=1e-4, atol=1e-4)


def test_every_parameter_gets_a_gradient_and_is_counted(model):
    from based_mp.estimate import parameter_counts
    from based_mp.model.based_model import forward_loss
    tokens = tokens_of(33)
    forward_loss(model, {"tokens": tokens, "labels": tokens.roll(-1, 1),
                         "loss_mask": torch.ones(2, 33)}).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    kind = type(model.decoder.layers[0].self_attention).__name__.lower()
    assert sum(p.numel() for p in model.parameters()) == sum(parameter_counts(system_config(kind).model).values())


@pytest.mark.parametrize("model", ["gla", "mamba", "h3", "rwkv"], indirect=True)
def test_the_state_does_not_grow(model):
    from based_mp.inference.state import map_states
    from based_mp.model.based_model import extend, init_states
    states = init_states(model, 2)
    sizes = []
    for length in (3, 50):
        extend(model, tokens_of(length), states)
        count = []
        map_states(lambda t, count=count: count.append(t.numel()) or t, states)
        sizes.append(sum(count))
    assert sizes[0] == sizes[1]


def test_layers_without_mlp(gloo_process):
    from based_mp.model.based_model import build_model, extend, init_states
    config = system_config("mamba", model={"ffn_hidden_size": 0})
    model = build_model(config).eval()
    assert not any("mlp" in name for name, _ in model.named_parameters())
    tokens = tokens_of(9)
    got = torch.cat([extend(model, tokens[:, :5], states := init_states(model, 2)),
                     extend(model, tokens[:, 5:], states)], 1)
    torch.testing.assert_close(got, full_logits(model, tokens), rtol=1e-4, atol=1e-4)


def test_mixed_layers_and_refusals():
    from based_mp.errors import UserError
    from based_mp.model.layer_specs import mixer_spec
    from based_mp.ops import backends
    mixed = system_config("gla", model={"num_layers": 4, "mixer_layers": {"gated_conv": [0], "h3": [2]}})
    assert mixed.model.mixers == ["gated_conv", "gla", "h3", "gla"]
    with pytest.raises(ValueError, match="listed twice"):
        system_config("gla", model={"mixer_layers": {"gated_conv": [0], "h3": [0]}})
    with pytest.raises(ValueError, match="gla.num_heads=2"):
        system_config("gla", parallel={"tensor_parallel_size": 4})
    with pytest.raises(ValueError, match="token shift"):
        system_config("rwkv", parallel={"tensor_parallel_size": 2, "sequence_parallel": True})
    with pytest.raises(ValueError, match="filter_length"):
        system_config("hyena", training={"seq_length": 512})
    if backends.fla_ops() is None:
        with pytest.raises(UserError, match=r"pip install '\.\[fla\]'"):
            mixer_spec("gla", system_config("gla", model={"kernels": "fla"}).model)


@pytest.mark.parametrize("kind", SYSTEMS)
def test_bf16_follows_fp32(kind, gloo_process):
    from based_mp.model.based_model import build_model, extend, forward_loss, init_states
    tokens, losses = tokens_of(40), {}
    batch = {"tokens": tokens, "labels": tokens.roll(-1, 1), "loss_mask": torch.ones(2, 40)}
    for precision in ("fp32", "bf16"):
        torch.manual_seed(5)
        model = build_model(system_config(kind, model={"init_std": 0.05}, training={"precision": precision}))
        loss = forward_loss(model, batch)
        loss.backward()
        losses[precision] = loss.item()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=1e-2)
    states = init_states(model, 2)
    steps = [extend(model, tokens[:, :30], states)] + [extend(model, tokens[:, t : t + 1], states)
                                                       for t in range(30, 40)]
    full = full_logits(model, tokens).float()
    assert ((torch.cat(steps, 1).float() - full).norm() / full.norm()).item() < 2e-2
