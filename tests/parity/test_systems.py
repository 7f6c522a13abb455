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


@pytest.fixture
def inference(model, request):
    return inference_of(model, system_config(request.node.callspec.params["model"]))


def inference_of(model, config):
    from based_mp.inference.model import InferenceModel
    return InferenceModel(model, config.model)


class Rows:
    """Sequences in slots: `feed` gives the logits after every token."""

    def __init__(self, inference, count):
        self.inference, self.pool, self.seen = inference, inference.new_pool(count + 2, 200), [0] * count
        self.slots = [count + 1 - i for i in range(count)]

    def feed(self, pieces):
        """pieces: token ids a row, none empty; as a pack."""
        rows = [i for i, piece in enumerate(pieces) if piece]
        out = self.inference.prefill(self.pool, [pieces[i] for i in rows], [self.slots[i] for i in rows],
                                     [self.seen[i] for i in rows], every=True)
        for i in rows:
            self.seen[i] += len(pieces[i])
        return out.split([len(pieces[i]) for i in rows])

    def step(self, tokens):
        """One token a row, int64 [rows] → logits [rows, vocab]."""
        slots = torch.tensor(self.slots, device=self.pool.tokens.device)
        self.pool.tokens[slots] = tokens.int()
        out = self.inference.step(self.pool, slots.int())
        self.pool.positions[slots] += 1
        self.seen = [n + 1 for n in self.seen]
        return out


def tokens_of(length, batch=2):
    return torch.randint(1, 120, (batch, length), generator=torch.Generator().manual_seed(length))


def full_logits(model, tokens):
    with torch.no_grad():
        return model(tokens, torch.zeros_like(tokens), None)


@pytest.mark.parametrize("length", [1, 7, 65, 150])
def test_prefill_and_decode_equal_the_full_forward(model, inference, length):
    tokens, cut = tokens_of(length), (length + 1) // 2
    rows, out = Rows(inference, 2), []
    for a, e in ((0, cut // 3), (cut // 3, cut)):
        if e > a:
            out.append(torch.stack(rows.feed([row[a:e].tolist() for row in tokens])))
    out += [rows.step(tokens[:, t])[:, None] for t in range(cut, length)]
    torch.testing.assert_close(torch.cat(out, 1), full_logits(model, tokens), rtol=1e-4, atol=1e-4)


def test_ragged_prefill_in_pieces_equals_each_row_alone(model, inference):
    sequences = [tokens_of(n, 1) for n in (1, 40, 90)]
    rows = Rows(inference, 3)
    for start, stop in ((0, 30), (30, 90)):
        rows.feed([row[0, start:stop].tolist() for row in sequences])
    follower = torch.tensor([5, 7, 9])
    logits = rows.step(follower)
    for i, row in enumerate(sequences):
        alone = full_logits(model, torch.cat([row, follower[None, i : i + 1]], 1))[0, -1]
        torch.testing.assert_close(logits[i], alone, rtol=1e-4, atol=1e-4)


def test_generation_batches_slots_and_equals_one_by_one(inference):
    from based_mp.inference.generate import Generator
    from tests.parity.test_generation import Letters
    prompts = [tokens_of(n, 1)[0].tolist() for n in (1, 40, 9, 23)]
    together = Generator(inference, Letters(), max_batch=3).generate(prompts, max_new_tokens=12)
    for prompt, completion in zip(prompts, together, strict=True):
        assert Generator(inference, Letters()).generate([prompt], max_new_tokens=12)[0].tokens == completion.tokens


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


@pytest.mark.parametrize("model", SYSTEMS, indirect=True)
def test_the_state_grows_for_hyena_alone(model, inference, request):
    from based_mp.evaluation.speed import state_bytes
    kind = request.node.callspec.params["model"]
    assert (state_bytes(inference, 200) > state_bytes(inference, 20)) == (kind == "hyena")
    assert inference.config.keeps_every_token == (kind == "hyena")


def test_layers_without_mlp(gloo_process):
    from based_mp.model.based_model import build_model
    config = system_config("mamba", model={"ffn_hidden_size": 0})
    model = build_model(config).eval()
    assert not any("mlp" in name for name, _ in model.named_parameters())
    tokens = tokens_of(9)
    rows = Rows(inference_of(model, config), 2)
    got = torch.cat([torch.stack(rows.feed([row[:5].tolist() for row in tokens])),
                     torch.stack(rows.feed([row[5:].tolist() for row in tokens]))], 1)
    torch.testing.assert_close(got, full_logits(model, tokens), rtol=1e-4, atol=1e-4)


def test_hyena_refuses_texts_beyond_its_filters(gloo_process):
    from based_mp.errors import UserError
    from based_mp.inference.generate import Generator
    from based_mp.model.based_model import build_model
    from tests.parity.test_generation import Letters
    config = system_config("hyena")
    model = build_model(config).eval()
    with pytest.raises(UserError, match="at most 256"):
        Generator(inference_of(model, config), Letters()).generate([[1] * 250], max_new_tokens=7)


def test_mixed_layers_and_refusals(monkeypatch):
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
    monkeypatch.setattr(backends, "fla_ops", lambda: None)
    with pytest.raises(UserError, match=r"pip install '\.\[fla\]'"):
        mixer_spec("gla", system_config("gla", model={"kernels": "fla"}).model)


@pytest.mark.parametrize("kind", SYSTEMS)
def test_bf16_follows_fp32(kind, gloo_process):
    from based_mp.model.based_model import build_model, forward_loss
    tokens, losses = tokens_of(40), {}
    batch = {"tokens": tokens, "labels": tokens.roll(-1, 1), "loss_mask": torch.ones(2, 40)}
    for precision in ("fp32", "bf16"):
        torch.manual_seed(5)
        config = system_config(kind, model={"init_std": 0.05}, training={"precision": precision})
        model = build_model(config)
        loss = forward_loss(model, batch)
        loss.backward()
        losses[precision] = loss.item()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=1e-2)
    rows = Rows(inference_of(model, config), 2)
    steps = [torch.stack(rows.feed([row[:30].tolist() for row in tokens]))]
    steps += [rows.step(tokens[:, t])[:, None] for t in range(30, 40)]
    full = full_logits(model, tokens).float()
    assert ((torch.cat(steps, 1).float() - full).norm() / full.norm()).item() < 2e-2
