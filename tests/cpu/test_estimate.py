"""The arithmetic of `--dry-run`, against the specification and against the model as built."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from based_mp.config import load_config
from based_mp.errors import UserError
from based_mp.estimate import (
    estimate_text,
    flops_per_token,
    memory_per_gpu,
    mixing_flops,
    parameter_counts,
)

CONFIGS = Path(__file__).parents[2] / "configs"


def by_hand(d, layers, linear, sliding, heads=16, f=16, rows=50304):
    """The specification's layers, written out once more."""
    conv = layers - linear - sliding
    return (rows * d + layers * (2 * d + 3 * d * 2 * d) + d
            + linear * (2 * d * heads * f + d * d + d * d) + sliding * (3 * d * d + d * d)
            + conv * (4 * d * d + 4 * d + 3 * 2 * d + 2 * d * d + d))


@pytest.mark.parametrize(("name", "expected", "millions"), [
    ("based_360m", by_hand(1024, 27, 5, 5), 362.6), ("based_1.3b", by_hand(1792, 36, 7, 7), 1350),
    ("attention_360m", None, 350), ("attention_1.3b", None, 1304),
    ("gla_360m", None, 360.5), ("gla_1.3b", None, 1337.5), ("mamba_360m", None, 358.2), ("mamba_1.3b", None, 1319),
    ("hyena_360m", None, 361.6), ("hyena_1.3b", None, 1308), ("h3_360m", None, 355.2), ("rwkv_360m", None, 375.8),
])
def test_parameter_counts(name, expected, millions):
    total = sum(parameter_counts(load_config(CONFIGS / f"{name}.yaml").model).values())
    assert total == (expected or total)
    assert total / 1e6 == pytest.approx(millions, rel=2e-3)


def test_attention_at_the_width_of_based():
    wide = ["model.d_model=1792", "model.num_heads=16", "model.ffn_hidden_size=4736"]
    model = load_config(CONFIGS / "attention_1.3b.yaml", wide).model
    assert sum(parameter_counts(model).values()) / 1e6 == pytest.approx(1469, abs=0.5)


@pytest.mark.parametrize("name", ["smoke_cpu", "based_360m", "based_1.3b", "attention_360m", "attention_1.3b"])
def test_the_built_model_has_the_counted_parameters(name, gloo_process, monkeypatch):
    import torch

    from based_mp.model.based_model import build_model
    config = load_config(CONFIGS / f"{name}.yaml", ["training.device=cpu"])
    monkeypatch.setattr(torch.Tensor, "normal_", lambda self, *args, **kwargs: self)       # only shapes matter here
    model = build_model(config)
    assert sum(p.numel() for p in model.parameters()) == sum(parameter_counts(config.model).values())


def test_untied_head_is_counted():
    overrides = ["model.tie_embeddings=false"]
    model = load_config(CONFIGS / "smoke_cpu.yaml", overrides).model
    assert parameter_counts(model)["head"] == 128 * model.padded_vocab_size
    tied = load_config(CONFIGS / "smoke_cpu.yaml")
    assert flops_per_token(load_config(CONFIGS / "smoke_cpu.yaml", overrides)) == flops_per_token(tied)


def test_mixing_flops_of_softmax_count_visible_keys():
    model = load_config(CONFIGS / "smoke_cpu.yaml", ["model.linear_attention_layers=[]",
                                                     "model.other_layers=softmax_attention"]).model
    n, w = 100, model.window
    window = sum(min(t + 1, w) for t in range(n)) / n
    full = sum(t + 1 for t in range(n)) / n
    assert mixing_flops(model, n) == pytest.approx(4 * model.d_model * (window + 4 * full))


def test_flops_are_six_per_matrix_parameter_and_the_mixing():
    config = load_config(CONFIGS / "based_360m.yaml")
    counts = parameter_counts(config.model)
    matrices = sum(counts.values()) - counts["norms"]
    assert flops_per_token(config) == pytest.approx(6 * matrices + 3 * mixing_flops(config.model, 2048))
    assert flops_per_token(config) / (6 * matrices) < 1.1


def test_zero_and_tensor_parallelism_shrink_memory():
    def parts(*overrides, world=8):
        return memory_per_gpu(load_config(CONFIGS / "based_1.3b.yaml", list(overrides)), world)

    total = sum(parameter_counts(load_config(CONFIGS / "based_1.3b.yaml").model).values())
    stages = {stage: parts(f"parallel.zero_stage={stage}") for stage in (1, 2, 3)}
    assert stages[1]["weights"] == 2 * total and stages[1]["optimizer"] == 12 * total / 8
    assert stages[3]["gradients"] == stages[1]["gradients"] / 8 and stages[3]["weights"] == 2 * total / 8
    assert stages[3]["gradients"] + 4 * 50304 * 1792 < stages[2]["gradients"] < stages[1]["gradients"] / 3
    assert parts("parallel.zero_stage=2", world=1) == parts(world=1)
    assert parts("parallel.tensor_parallel_size=2")["weights"] == total
    whole, split = (parts("parallel.tensor_parallel_size=2", f"parallel.sequence_parallel={sp}")["activations"]
                    for sp in ("false", "true"))
    assert split == parts()["activations"] / 2 < whole < parts()["activations"]
    assert parts("training.recompute=full")["activations"] < parts()["activations"] / 3
    copies = parts("training.fp8=rowwise", "parallel.tensor_parallel_size=2")["fp8 weights"]
    assert 0.9 * total < copies < total - 50304 * 1792 and "fp8 weights" not in parts()


def test_text_says_batch_run_and_time():
    text = estimate_text(load_config(CONFIGS / "based_360m.yaml"), world_size=8, tokens=10e9, mfu=0.5)
    assert "362,661,888" in text
    assert "8 sequences × 4 micro-batches × 8 ranks = 256 sequences = 524,288 tokens" in text
    assert "20,000 steps = 10.486B tokens" in text and "at MFU 50%" in text


def pretrain(monkeypatch, *arguments):
    """launch/pretrain.py's main, in this process."""
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *map(str, arguments)])
    return runpy.run_path(str(CONFIGS.parent / "launch" / "pretrain.py"))["main"]()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_dry_run_of_every_config(path, monkeypatch, capsys):
    pretrain(monkeypatch, "--config", path, "--dry-run")
    told = capsys.readouterr().out
    total = sum(parameter_counts(load_config(path).model).values())
    assert f"{total:,}" in told
    for word in ("FLOPs", "per GPU", "optimizer", "micro-batches", "at MFU 40%"):
        assert word in told, (word, told)


@pytest.mark.parametrize("options", [
    ["--dry-run", "--mfu", "0"], ["--dry-run", "--mfu", "nan"], ["--dry-run", "--mfu", "40"],
    ["--dry-run", "--tokens", "-1"], ["--dry-run", "--tokens", "inf"], ["--dry-run", "--world-size", "0"],
    ["--world-size", "2"]])
def test_options_out_of_range_are_refused(options, monkeypatch):
    with pytest.raises(UserError, match=options[-2]):
        pretrain(monkeypatch, "--config", CONFIGS / "smoke_cpu.yaml", *options)
