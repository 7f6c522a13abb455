"""The configuration: what it accepts, and that every mistake is one sentence naming the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from based_mp.config import Config, help_text, load_config
from based_mp.errors import UserError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
SMALL = """
model: {d_model: 128, num_layers: 5, num_heads: 4, vocab_size: 2048, linear_attention_layers: [1, 3],
        sliding_attention_layers: [2], feature_dim: 8, window: 32}
data:
  train: [{path: data/a}]
  split: "96,3,1"
  tokenizer: {type: sentencepiece, model: data/tokenizer.model}
training: {seq_length: 128, micro_batch_size: 8, global_batch_size: 16, precision: fp32, device: cpu}
logging: {sample_interval: 10}
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_named_config_loads_and_survives_its_own_yaml(path, tmp_path):
    config = load_config(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(config.to_yaml())
    assert load_config(copy) == config


@pytest.mark.parametrize(("size", "d_model", "layers", "linear", "sliding"), [
    ("360m", 1024, 27, [1, 6, 11, 16, 21], [2, 7, 12, 17, 22]),
    ("1.3b", 1792, 36, [1, 6, 11, 16, 21, 27, 33], [2, 7, 12, 17, 22, 28, 34]),
])
@pytest.mark.parametrize(("suffix", "window"), [("", 256), ("_window64", 64), ("_window128", 128)])
def test_based_configs_carry_the_published_hyperparameters(size, d_model, layers, linear, sliding, suffix, window):
    config = load_config(CONFIGS[0].parent / f"based_{size}{suffix}.yaml")
    model, training, optimizer = config.model, config.training, config.optimizer
    assert (model.d_model, model.num_layers, model.num_heads) == (d_model, layers, 16)
    assert (model.linear_attention_layers, model.sliding_attention_layers) == (linear, sliding)
    assert model.mixers.count("gated_conv") == layers - len(linear) - len(sliding)
    assert (model.feature_dim, model.window, model.ffn_size, model.vocab_size) == (16, window, 2 * d_model, 50257)
    assert model.head_dim == {"360m": 64, "1.3b": 112}[size]
    assert (training.seq_length, training.global_batch_size, training.precision) == (2048, 256, "bf16")
    assert (optimizer.lr, optimizer.min_lr, optimizer.warmup_start_lr) == (8e-4, 8e-5, 1e-6)
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay, optimizer.clip_grad_norm) == (0.9, 0.95, 0.1, 1)
    assert (training.steps, optimizer.warmup_steps, config.decay_steps) == (20000, 200, 20000)


@pytest.mark.parametrize(("size", "shape"), [("360m", (1024, 24, 16)), ("1.3b", (1680, 36, 24))])
def test_attention_configs_carry_the_published_shapes(size, shape):
    model = load_config(CONFIGS[0].parent / f"attention_{size}.yaml").model
    assert (model.d_model, model.num_layers, model.num_heads) == shape
    assert set(model.mixers) == {"softmax_attention"} and model.rotary_fraction == 0.5


def test_overrides_reach_into_lists_and_read_numbers(small):
    config = load_config(small, ["optimizer.lr=3e-4", "data.train.0.weight=2", "optimizer.decay_steps=null",
                                 "model.linear_attention_layers=[0, 4]", "logging.sample_prompt=class A"])
    assert config.optimizer.lr == 3e-4 and config.data.train[0].weight == 2.0
    assert config.model.mixers[0] == config.model.mixers[4] == "linear_attention"
    assert config.logging.sample_prompt == "class A"


def test_scientific_notation_without_a_dot_is_a_number(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(SMALL + "optimizer: {lr: 8e-4, min_lr: 1E-5}")
    assert load_config(path).optimizer.lr == 8e-4 and load_config(path).optimizer.min_lr == 1e-5


@pytest.mark.parametrize(("override", "told"), [
    ("optimizer.learning_rate=1e-3", ["unknown key optimizer.learning_rate"]),
    ("optimizer.beta=0.9", ["unknown key optimizer.beta", "did you mean optimizer.beta"]),
    ("trainin.steps=3", ["unknown key trainin", "did you mean training"]),
    ("training.steps=many", ["training.steps='many'", "integer"]),
    ("training.steps=1.5", ["training.steps=1.5", "integer"]),
    ("training.steps=true", ["training.steps=True", "integer"]),
    ("model.tie_embeddings=1", ["model.tie_embeddings=1", "boolean"]),
    ("training.precision=fp16", ["training.precision='fp16'", "bf16"]),
    ("parallel.zero_stage=4", ["parallel.zero_stage=4"]),
    ("model.num_heads=3", ["model.d_model=128", "model.num_heads=3"]),
    ("model.linear_attention_layers=[5]", ["layers [5] do not exist", "num_layers=5"]),
    ("model.linear_attention_layers=[2]", ["[2]", "one mixer"]),
    ("parallel.tensor_parallel_size=3", ["num_heads=4", "tensor_parallel_size=3"]),
    ("parallel.sequence_parallel=true", ["sequence_parallel", "tensor_parallel_size > 1"]),
    ("training.global_batch_size=12", ["global_batch_size=12", "micro_batch_size=8"]),
    ("optimizer.min_lr=1", ["optimizer.min_lr"]),
    ("data.train=[]", ["data.train is empty"]),
    ("data.split=98,2", ["data.split", "three shares"]),
    ("data.valid=[{path: a}]", ["data.split", "data.valid"]),
    ("data.tokenizer=null", ["sample_interval", "data.tokenizer"]),
    ("data.train.3.path=x", ["data.train.3.path=x"]),
    ("optimizer.lr", ["section.key=value"]),
    ("optimizer.lr=.inf", ["optimizer.lr=inf", "finite"]),
    ("optimizer.lr=.nan", ["optimizer.lr=nan"]),
    ("optimizer.lr=0", ["optimizer.lr=0.0", "greater than 0"]),
    ("training.seed=-1", ["training.seed=-1"]),
    ("data.seed=4294967296", ["data.seed=4294967296"]),
    ("model.ffn_hidden_size=-8", ["model.ffn_hidden_size=-8"]),
    ("optimizer.decay_steps=0", ["optimizer.decay_steps=0"]),
    ("model.decay_exponent=0", ["model.decay_exponent=0"]),
    ("optimizer=3", ["optimizer=3", "section"]),
    ("data.split=0,50,50", ["data.split", "first above 0"]),
])
def test_every_mistake_is_one_sentence_that_names_the_key(small, override, told):
    with pytest.raises(UserError) as caught:
        load_config(small, [override])
    message = str(caught.value)
    assert "\n" not in message
    for part in told:
        assert part in message, message


@pytest.mark.parametrize(("overrides", "told"), [
    (["parallel.zero_stage=0", "training.precision=bf16"], "zero_stage=1"),
    (["parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true", "training.seq_length=127"], "seq_length"),
    (["parallel.tensor_parallel_size=4", "model.ffn_hidden_size=90"], "ffn_hidden_size=90"),
])
def test_impossible_combinations_are_refused(small, overrides, told):
    with pytest.raises(UserError, match=told):
        load_config(small, overrides)


def test_world_size_must_fit(small):
    config = load_config(small, ["parallel.tensor_parallel_size=2"])
    assert config.check_world(4) == (2, 1)
    assert config.check_world(2) == (1, 2)
    with pytest.raises(UserError, match="3 processes"):
        config.check_world(3)
    with pytest.raises(UserError, match="global_batch_size=16"):
        config.check_world(6)


@pytest.mark.parametrize(("text", "told"), [
    ("model: [", "not valid YAML"), ("- a", "must hold sections"), ("", "must hold sections"),
    ("model: {d_model: 8}", "is missing"), ("model: {d_model: 8, d_model: 16}", "d_model stands twice"),
    ("training: {steps: 1}\nmodel: {}\ntraining: {steps: 2}", "training stands twice"),
])
def test_broken_files(tmp_path, text, told):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=told):
        load_config(path)


def test_a_missing_file():
    with pytest.raises(UserError, match="cannot read the config nowhere.yaml"):
        load_config("nowhere.yaml")


def test_help_lists_every_key():
    text = help_text()
    for section, field in Config.model_fields.items():
        for name in field.annotation.model_fields:
            assert f"{section}.{name}" in text
    assert "default 0.0008" in text and "required" in text
