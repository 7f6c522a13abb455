"""Published checkpoint names: an independent forward pass over the exported tensors gives our logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from based_mp.errors import UserError
from based_mp.export import export_safetensors, from_reference, import_safetensors, to_reference
from based_mp.parallel import state
from based_mp.training import checkpoint as ckpt
from tests.models import tiny_config

HEADS, D, F_DIM, WINDOW = 4, 64, 8, 8
KINDS = ["gated_conv", "linear_attention", "sliding_attention", "gated_conv"]


@pytest.fixture(scope="module")
def config():
    return tiny_config(model={"init_std": 0.3})


@pytest.fixture(scope="module")
def model(config):
    state.initialize(device="cpu", seed=5)
    from based_mp.model.based_model import build_model
    model = build_model(config).eval()
    with torch.no_grad():                               # norms and biases that are not their initial ones and zeros
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    yield model
    state.destroy()


def whole(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def norm(x, w):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w


def heads(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def published_mixer(kind, x, w):
    n = x.shape[1]
    if kind == "gated_conv":
        u1, u2 = F.linear(x, w["in_proj.weight"], w["in_proj.bias"]).chunk(2, -1)
        conv = F.conv1d(u1.transpose(1, 2), w["conv.conv.weight"], padding=2, groups=2 * D)[..., :n].transpose(1, 2)
        return F.linear(F.silu(conv) * u2, w["out_proj.weight"], w["out_proj.bias"])
    distance = torch.arange(n)[:, None] - torch.arange(n)
    if kind == "linear_attention":
        q, k, v = (heads(x @ w[f"proj_{name}.weight"].T) for name in "qkv")
        s = q @ k.transpose(-1, -2) / math.sqrt(F_DIM)
        weight = (1 + s + s * s / 2) * (distance >= 0)
        o = weight @ v / weight.sum(-1, keepdim=True)
    else:
        q, k, v = (heads(part) for part in (x @ w["Wqkv.weight"].T).chunk(3, -1))
        half = q.shape[-1] // 2
        angle = torch.arange(n)[:, None] * 10000.0 ** (-torch.arange(half) / half)
        turn = torch.polar(torch.ones_like(angle), angle)

        def rotate(t):
            pairs = torch.complex(t[..., :half], t[..., half:]) * turn
            return torch.cat([pairs.real, pairs.imag], -1)

        s = rotate(q) @ rotate(k).transpose(-1, -2) / math.sqrt(q.shape[-1])
        o = s.masked_fill((distance < 0) | (distance >= WINDOW), -torch.inf).softmax(-1) @ v
    return o.transpose(1, 2).flatten(2) @ w["out_proj.weight"].T


def published_forward(tensors, tokens):
    """The architecture of the specification over tensors with the published names."""
    x = tensors["transformer.embeddings.word_embeddings.weight"][tokens]
    for layer, kind in enumerate(KINDS):
        prefix = f"transformer.layers.{layer}."
        w = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        mixer = {name.removeprefix("mixer."): t for name, t in w.items() if name.startswith("mixer.")}
        x = x + published_mixer(kind, norm(x, w["norm1.weight"]), mixer)
        first, second = (norm(x, w["norm2.weight"]) @ w["mlp.fc1.weight"].T).chunk(2, -1)
        x = x + (first * F.silu(second)) @ w["mlp.fc2.weight"].T
    return norm(x, tensors["transformer.ln_f.weight"]) @ tensors["lm_head.weight"].T


def test_exported_weights_give_the_same_logits(model, config):
    tokens = torch.randint(0, 120, (2, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = model(tokens, torch.zeros_like(tokens), None)[..., :120]
        theirs = published_forward(to_reference(whole(model), config.model), tokens)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_round_trip_is_exact(model, config):
    exported = to_reference(whole(model), config.model)
    noisy = {f"model.{name}": t for name, t in exported.items()} | {"model.train_metrics.loss": torch.zeros(1)}
    back = to_reference(from_reference(noisy, config.model), config.model)
    assert back.keys() == exported.keys()
    assert all(torch.equal(back[name], exported[name]) for name in exported)


def test_imported_file_loads_and_exports_again(model, config, tmp_path):
    exported = to_reference(whole(model), config.model)
    save_file(exported, tmp_path / "in.safetensors")
    folder = import_safetensors(tmp_path / "in.safetensors", config, tmp_path / "run")
    assert ckpt.resolve(tmp_path / "run") == folder
    export_safetensors(tmp_path / "run", tmp_path / "out.safetensors", model)
    again = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(again[name], exported[name]) for name in exported)


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop("transformer.ln_f.weight"), "missing transformer.ln_f.weight"),
    (lambda t: t.update(extra=torch.zeros(1)), "unknown extra"),
    (lambda t: t.update({"transformer.ln_f.weight": torch.zeros(3)}), r"transformer.ln_f.weight is \(3,\)")])
def test_weights_that_do_not_fit_are_refused(model, config, change, message):
    tensors = to_reference(whole(model), config.model)
    change(tensors)
    with pytest.raises(UserError, match=message):
        from_reference(tensors, config.model)


@pytest.mark.parametrize("dim, stride", [(0, 1), (1, 1), (0, 2)])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_cut_and_merge_are_inverse(dim, stride, size):
    from based_mp.inference.load import cut, merge
    weight = torch.randn(16, 8)
    parts = [cut(weight, dim, stride, rank, size) for rank in range(size)]
    assert torch.equal(merge(parts, dim, stride), weight)
    if stride == 2:
        assert torch.equal(parts[0], torch.cat([h.chunk(size)[0] for h in weight.chunk(2)]))
