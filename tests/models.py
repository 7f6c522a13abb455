"""A small configuration with every mixer, for tests."""

from __future__ import annotations

from typing import Any

import torch

from based_mp.config import Config

MODEL: dict[str, Any] = {
    "d_model": 64, "num_layers": 4, "num_heads": 4, "vocab_size": 120, "pad_vocab_to_multiple_of": 32,
    "linear_attention_layers": [1], "sliding_attention_layers": [2], "feature_dim": 8, "window": 8,
    "ffn_hidden_size": 96}


class Letters:
    """A tokenizer of single characters."""

    vocab_size, eod = 120, 0

    def encode(self, text: str) -> list[int]:
        return [ord(c) - 32 for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i + 32) for i in ids)


@torch.no_grad()
def as_trained(module: torch.nn.Module) -> torch.nn.Module:
    """The module with random norm weights and output biases in its layers, where new ones have ones and zeros."""
    for name, parameter in module.named_parameters():
        if name.endswith(("layernorm.weight", "out_bias")):
            parameter += 0.3 * torch.randn_like(parameter)
    return module


def tiny_generator(device: str = "cpu") -> Any:
    """A generator with the small model, random, in one process; on a GPU in bf16 and of a size the kernels take."""
    from based_mp.inference.generate import Generator
    from based_mp.inference.model import InferenceModel
    from based_mp.model.based_model import build_model
    from based_mp.parallel import state
    state.initialize(device=device, seed=3)
    config = tiny_config(model={"init_std": 0.2})
    if device != "cpu":
        config = tiny_config(model={"init_std": 0.06, "d_model": 256, "feature_dim": 16, "ffn_hidden_size": 512},
                             training={"device": device, "precision": "bf16"})
    return Generator(InferenceModel(build_model(config).eval(), config.model), Letters())


def tiny_config(**sections: dict[str, Any]) -> Config:
    """`tiny_config(parallel={"zero_stage": 2})`: the small model with some keys changed."""
    tree: dict[str, Any] = {
        "model": dict(MODEL), "data": {"train": [{"path": "nowhere"}], "num_workers": 0},
        "training": {"seq_length": 32, "micro_batch_size": 2, "global_batch_size": 8, "steps": 20,
                     "precision": "fp32", "device": "cpu"},
        # With the usual eps of 1e-8 Adam divides rounding noise by rounding noise and the comparison drowns in it.
        "optimizer": {"lr": 3e-3, "min_lr": 3e-3, "warmup_steps": 0, "clip_grad_norm": 0.5, "eps": 1e-5}}
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return Config.model_validate(tree)
