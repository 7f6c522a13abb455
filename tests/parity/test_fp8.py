"""fp8 matrix products (training.fp8): scaling, the linear layers' gradients, steps beside bf16, what is refused."""

import warnings

import pytest
import torch
from megatron.core import tensor_parallel
from pydantic import ValidationError

from based_mp.errors import UserError
from based_mp.model import fp8 as linear
from based_mp.model.based_model import build_model, forward_loss
from based_mp.ops import backends, fp8
from based_mp.training.engine import build_engine
from tests.models import tiny_config


def value(operand):
    """In fp64, of (q, scale)."""
    return operand[0].double() * operand[1].double()


def scaled(x):
    return value(fp8.quantize_rows(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_are_scaled_by_the_smallest_power_of_two(dtype):
    x = (torch.randn(50, 96) * torch.logspace(-9, 9, 50)[:, None]).to(dtype)
    x[7] = 0
    q, scale = fp8.quantize_rows(x)
    assert q.dtype == torch.float8_e4m3fn and torch.equal(scale.log2(), scale.log2().round())
    largest = q.float().abs().amax(-1)
    rest = torch.arange(50) != 7
    assert (largest[rest] > 216).all() and (largest <= 448).all() and not q.float()[7].any()
    # Three bits of mantissa: half a unit is 2⁻⁴; what is below 2⁻⁶ after scaling has steps of 2⁻⁹.
    assert ((value((q, scale)) - x.double()).abs() <= (x.double().abs() / 16).clamp(min=2**-10 * scale.double())).all()


def test_the_largest_value_is_not_clipped():
    x = torch.tensor([[448.0] * 16, [449.0] * 16, [2.0] * 16])
    q, scale = fp8.quantize_rows(x)
    assert scale.flatten().tolist() == [1, 2, 2**-7]
    assert value((q, scale))[:, 0].tolist() == [448, 448, 2]


def test_what_is_not_finite_stays_so():
    x = torch.ones(3, 16)
    x[0, 3], x[1, 5] = float("nan"), float("inf")
    assert scaled(x).isfinite().all(-1).tolist() == [False, False, True]


def test_a_weight_has_the_same_values_along_rows_and_columns():
    weight = torch.randn(64, 48).bfloat16()
    big = scaled(weight).abs() > 2**-6 * weight.abs().max()             # the smallest of a slice are rounded coarser
    assert torch.equal(scaled(weight)[big], scaled(weight.t()).t()[big]) and big.float().mean() > 0.9


def test_product():
    a, b = (fp8.quantize_rows(torch.randn(n, 96) * torch.rand(n, 1)) for n in (37, 48))
    expected = value(a) @ value(b).t()
    y = fp8.product(a, b)
    assert y.dtype == torch.bfloat16 and (y.double() - expected).norm() < 3e-3 * expected.norm()


def built(fp8="rowwise", optimizer=None, **sections):
    torch.manual_seed(5)
    sections["training"] = {"precision": "bf16", "fp8": fp8, **sections.get("training", {})}
    model = build_model(tiny_config(**sections))
    if fp8 != "none":
        linear.use_fp8(model, optimizer or torch.optim.AdamW(model.parameters()))
    return model


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("part", ["mlp.linear_fc1", "mlp.linear_fc2", "self_attention.linear_in"])
def test_gradients_of_a_linear_layer(gloo_process, monkeypatch, part, fused):
    from types import SimpleNamespace

    from megatron.core.tensor_parallel import layers

    from based_mp.training.bf16_optimizer import add_weight_gradient
    module = built().decoder.layers[1].get_submodule(part)
    x = torch.randn(8, 2, module.weight.shape[1]).bfloat16().requires_grad_()
    weight = module.weight
    if fused:
        monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda",
                            SimpleNamespace(wgrad_gemm_accum_fp32=add_weight_gradient), raising=False)
        module.gradient_accumulation_fusion, weight.main_grad = True, torch.ones(weight.shape)
    y, bias = module(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    flat, dflat = x.detach().flatten(0, 1), dy.flatten(0, 1)
    expected = scaled(flat) @ scaled(weight.detach()).t()
    dx = scaled(dflat) @ scaled(weight.detach().t()).t()
    dw = dflat.double().t() @ flat.double()
    assert (y.flatten(0, 1).double() - expected).norm() < 3e-3 * expected.norm() and bias is None
    assert (x.grad.flatten(0, 1).double() - dx).norm() < 3e-3 * dx.norm()
    got = weight.main_grad - 1 if fused else weight.grad
    assert (got.double() - dw).norm() < 3e-3 * dw.norm() and (weight.grad is None) == fused


def test_embedding_and_head_stay_in_bf16(gloo_process):
    model = built()
    hidden = torch.randn(4, 1, 64).bfloat16()
    assert torch.equal(model.output_layer(hidden, weight=model.shared_embedding_or_output_weight())[0],
                       hidden @ model.shared_embedding_or_output_weight().t())
    assert sum(getattr(m, "products", None) is not None for m in model.modules()) == 4 * 4


@pytest.mark.parametrize("recompute", ["norms", "selective", "full"])
def test_recomputation_changes_nothing(gloo_process, recompute):
    ids = torch.randint(0, 120, (2, 33), generator=torch.Generator().manual_seed(2))
    grads = []
    for kind in ("none", recompute):
        model = built(training={"recompute": kind})
        forward_loss(model, {"tokens": ids[:, :-1], "labels": ids[:, 1:], "loss_mask": torch.ones(2, 32)}).backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-6)


def losses(ranks, steps, before_forward=lambda: None, **sections):
    """Of every micro-batch in training steps of four."""
    torch.manual_seed(4)
    tensor_parallel.model_parallel_cuda_manual_seed(4)                 # a GPU's initial weights
    sections["training"] = {"precision": "bf16", **sections.get("training", {})}
    engine = build_engine(tiny_config(**sections), ranks)
    device, seen = ranks.device, []
    ids = torch.randint(0, 120, (4, 2, 33), generator=torch.Generator().manual_seed(1)).to(device)
    for _ in range(steps):
        for micro_batch in ids:
            before_forward()
            loss = forward_loss(engine, {"tokens": micro_batch[:, :-1], "labels": micro_batch[:, 1:],
                                         "loss_mask": torch.ones(2, 32, device=device)})
            engine.backward(loss)
            engine.step()
            seen.append(loss.item())
    return seen


def test_steps_lie_near_those_in_bf16(gloo_process):
    exact, ours = (losses(gloo_process, 8, training={"fp8": recipe}) for recipe in ("none", "rowwise"))
    assert exact[-1] < exact[0] - 0.5
    assert 1e-4 < max(abs(a - b) for a, b in zip(exact, ours, strict=True)) < 0.05


@pytest.mark.parametrize("recompute", ["norms", "selective", "full"])
def test_steps_with_recomputation(gloo_process, recompute):
    """With the optimizer's sums, which the layers must find though autograd keeps what recomputation gives it."""
    plain, ours = (losses(gloo_process, 2, training={"fp8": "rowwise", "recompute": kind})
                   for kind in ("none", recompute))
    assert ours == pytest.approx(plain, abs=1e-3)


def test_copies_of_weights_are_made_once_a_step(gloo_process, monkeypatch):
    """And give what copies made for every micro-batch give."""
    made, copies, quantize = [], [], fp8.quantize_rows

    def counted(x):
        made.append(tuple(x.shape))
        return quantize(x)

    class Listed(linear.Copies):
        def __init__(self, weight):
            super().__init__(weight)
            copies.append(self)

    monkeypatch.setattr(fp8, "quantize_rows", counted)
    monkeypatch.setattr(linear, "Copies", Listed)
    kept = losses(gloo_process, 3, training={"fp8": "rowwise"})
    assert len(copies) == 16 and len(made) == 3 * 16 * (2 + 4 * 2)          # of weights; of x and dy a micro-batch
    again = losses(gloo_process, 3, lambda: [c.forget() for c in copies], training={"fp8": "rowwise"})
    assert kept == again


def test_copies_are_renewed_in_place():
    """A CUDA graph reads them where they were when it was recorded."""
    weight = torch.randn(32, 16).bfloat16()
    copies = linear.Copies(weight)
    copies.renew()
    tensors = (*copies.rows, *copies.columns)
    weight.mul_(-8)
    copies.forget()
    copies.renew()
    assert all(a is b for a, b in zip(tensors, (*copies.rows, *copies.columns), strict=True))
    assert torch.equal(value(copies.rows), scaled(weight)) and torch.equal(value(copies.columns), scaled(weight.t()))


def test_widths_that_do_not_fit_stay_in_bf16_with_one_warning(gloo_process):
    with pytest.warns(UserWarning, match="4 linear layers stay in bf16 under training.fp8.*mlp.linear_fc2") as seen:
        model = built(model={"ffn_hidden_size": 88})
    assert len([w for w in seen if "training.fp8" in str(w.message)]) == 1
    layer = model.decoder.layers[0]
    for module, stays in ((layer.mlp.linear_fc1, False), (layer.mlp.linear_fc2, True)):
        x = torch.randn(4, 1, module.weight.shape[1]).bfloat16()
        assert torch.equal(module(x)[0], x @ module.weight.t()) == stays
    with warnings.catch_warnings(record=True) as seen:
        built()
    assert not [w for w in seen if "training.fp8" in str(w.message)]


def test_what_is_refused(monkeypatch):
    with pytest.raises(ValidationError, match="training.fp8=rowwise needs training.precision=bf16"):
        tiny_config(training={"fp8": "rowwise"})
    with pytest.raises(ValidationError, match="set parallel.zero_stage=1"):
        tiny_config(training={"fp8": "rowwise", "precision": "bf16"}, parallel={"zero_stage": 3})
    monkeypatch.setattr(backends, "_capability", lambda index: (8, 0))
    with pytest.raises(UserError, match="needs a GPU of compute capability 8.9 or above .* has 8.0: set training.fp8"):
        backends.check_fp8(torch.device("cuda", 0))
    monkeypatch.setattr(backends, "_capability", lambda index: (9, 0))
    backends.check_fp8(torch.device("cuda", 0))
