"""The configuration: one strict tree of pydantic models, read from YAML plus `a.b=value` overrides.

An unknown key, a wrong type or a combination that cannot work is one `UserError` before any process group exists.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from based_mp.errors import UserError
from based_mp.systems import (
    GLAConfig,
    H3Config,
    HyenaConfig,
    MambaConfig,
    NonNegative,
    Positive,
    RWKVConfig,
    Section,
    Seed,
)

BASED_MIXERS = ("gated_conv", "softmax_attention", "linear_attention", "sliding_attention")   # and attention's baseline
MIXERS = (*BASED_MIXERS, "gla", "mamba", "h3", "hyena", "rwkv")


class ModelConfig(Section):
    """Architecture (Arora et al. 2024, section 5 and appendix)."""

    d_model: Positive = Field(description="width of the residual stream")
    num_layers: Positive = Field(description="layers, each a mixer and an MLP")
    num_heads: Positive = Field(description="heads of every attention mixer; head_dim = d_model / num_heads")
    vocab_size: Positive = Field(50257, description="tokens of the tokenizer")
    pad_vocab_to_multiple_of: Positive = Field(128, description="embedding rows are rounded up to a multiple of this")
    linear_attention_layers: list[int] = Field([], description="0-based layers with Taylor linear attention")
    sliding_attention_layers: list[int] = Field([], description="0-based layers with sliding-window attention")
    mixer_layers: dict[Literal[MIXERS], list[int]] = Field(
        {}, description="0-based layers of any other mixer by its name, such as {gated_conv: [0]}")
    other_layers: Literal[MIXERS] = Field(
        "gated_conv", description="mixer of all other layers: gated_conv, (full) softmax_attention, gla, mamba, h3, "
        "hyena, rwkv, linear_attention or sliding_attention")
    feature_dim: Positive = Field(16, description="query/key width d' of linear attention")
    window: Positive = Field(256, description="tokens a sliding-window position sees, its own included")
    decay_exponent: Annotated[int, Field(lt=0)] | None = Field(
        None, description="c in the per-head log decay log(1 − 2^(c−h)) of linear attention; null: no decay")
    ffn_hidden_size: int | None = Field(
        None, ge=0, description="SwiGLU width; null: 2·d_model rounded up to a multiple of 256; 0: layers without MLP")
    conv_kernel: Annotated[int, Field(ge=2)] = Field(3, description="width of the short convolution")
    rotary_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0, description="part of head_dim that RoPE rotates in softmax mixers")
    rotary_base: Annotated[float, Field(gt=0)] = Field(10000.0, description="base of the RoPE frequencies")
    tie_embeddings: bool = Field(True, description="the LM head shares the embedding's weight")
    fp32_residual: bool = Field(False, description="keep the residual stream in fp32 under bf16")
    norm_eps: Annotated[float, Field(gt=0)] = Field(1e-5, description="epsilon of RMSNorm")
    init_std: Annotated[float, Field(gt=0)] = Field(
        0.02, description="std of the initial weights; output projections are divided by √(2·num_layers)")
    kernels: Literal["auto", "torch", "fla"] = Field(
        "auto", description="of gla, rwkv and mamba on a GPU: auto = flash-linear-attention's for gla and rwkv "
        "where it is installed (pip install '.[fla]'), Triton for mamba; fla = auto, but must be there; torch = none")
    gla: GLAConfig = Field(default_factory=GLAConfig, description="settings of the gla mixer")
    mamba: MambaConfig = Field(default_factory=MambaConfig, description="settings of the mamba mixer")
    h3: H3Config = Field(default_factory=H3Config, description="settings of the h3 mixer")
    hyena: HyenaConfig = Field(default_factory=HyenaConfig, description="settings of the hyena mixer")
    rwkv: RWKVConfig = Field(default_factory=RWKVConfig, description="settings of the rwkv mixer")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads

    @property
    def ffn_size(self) -> int:
        """The MLP's hidden width."""
        return -(-2 * self.d_model // 256) * 256 if self.ffn_hidden_size is None else self.ffn_hidden_size

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding; the same at every tensor-parallel size, so that checkpoints reshard."""
        multiple = self.pad_vocab_to_multiple_of
        return -(-self.vocab_size // multiple) * multiple

    @property
    def mixers(self) -> list[str]:
        """The mixer of every layer."""
        kinds = [str(self.other_layers)] * self.num_layers
        for kind, layers in self._listed().items():
            for layer in layers:
                kinds[layer] = kind
        return kinds

    def _listed(self) -> dict[str, list[int]]:
        """Layers by mixer, of every list."""
        listed = {"linear_attention": list(self.linear_attention_layers),
                  "sliding_attention": list(self.sliding_attention_layers)}
        for kind, layers in self.mixer_layers.items():
            listed[kind] = listed.get(kind, []) + layers
        return listed

    @model_validator(mode="after")
    def _layers_and_heads(self) -> ModelConfig:
        if self.d_model % self.num_heads:
            raise ValueError(f"model.d_model={self.d_model} is not divisible by model.num_heads={self.num_heads}")
        listed = sum(self._listed().values(), [])
        outside = [layer for layer in listed if not 0 <= layer < self.num_layers]
        if outside:
            raise ValueError(f"layers {outside} do not exist: model.num_layers={self.num_layers}, counted from 0")
        twice = sorted({layer for layer in listed if listed.count(layer) > 1})
        if twice:
            raise ValueError(f"layers {twice} are listed twice in model.linear_attention_layers, "
                             "model.sliding_attention_layers and model.mixer_layers: give each layer one mixer")
        self._systems()
        return self

    def _systems(self) -> None:
        """Widths of the mixers in use fit the model."""
        used, d, gla = set(self.mixers), self.d_model, self.gla
        if "gla" in used and any((d * e) % gla.num_heads for e in (gla.expand_k, gla.expand_v)):
            raise ValueError(f"model.gla.num_heads={gla.num_heads} does not divide model.d_model={d} × expand_k="
                             f"{gla.expand_k} and expand_v={gla.expand_v}")
        if "rwkv" in used and d % self.rwkv.head_dim:
            raise ValueError(f"model.d_model={d} is not divisible by model.rwkv.head_dim={self.rwkv.head_dim}")
        if self.hyena.filter_embedding % 2 == 0:
            raise ValueError(f"model.hyena.filter_embedding={self.hyena.filter_embedding} must be odd")

    @property
    def keeps_every_token(self) -> bool:
        """Whether the generation state grows with the text."""
        return "softmax_attention" in self.mixers or "hyena" in self.mixers

    def split_sizes(self) -> dict[str, int]:
        """What tensor parallelism must divide, by the keys that set it."""
        sizes = {"num_heads": self.num_heads, "ffn_hidden_size": self.ffn_size, "d_model": self.d_model,
                 "padded vocabulary": self.padded_vocab_size}
        if "gla" in self.mixers:
            sizes |= {"gla.num_heads": self.gla.num_heads, "gla.gate_rank": self.gla.gate_rank}
        if "rwkv" in self.mixers:
            sizes["d_model / rwkv.head_dim"] = self.d_model // self.rwkv.head_dim
        return sizes


class ParallelConfig(Section):
    """How the model and the optimizer are spread; data parallelism takes the processes left over."""

    tensor_parallel_size: Positive = Field(1, description="processes that share one copy of every layer")
    sequence_parallel: bool = Field(False, description="split norms and residuals over the tensor-parallel group")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1, description="DeepSpeed ZeRO: 1 shards optimizer state, 2 gradients too, 3 parameters too")


class Corpus(Section):
    """One indexed dataset."""

    path: str = Field(description="prefix of the .bin/.idx pair, in a folder or in an S3-compatible store (s3://…)")
    weight: Annotated[float, Field(gt=0)] = Field(1.0, description="share in the blend; normalised over the list")
    name: str | None = Field(None, description="name in logs; null: the last part of the path")


class TokenizerConfig(Section):
    """The tokenizer of samples and generation; training itself reads token ids."""

    type: Literal["sentencepiece", "gpt2", "hf"] = Field(description="sentencepiece, gpt2 or hf (tokenizers JSON)")
    model: str | None = Field(None, description="SentencePiece .model or tokenizers .json file")
    vocab_file: str | None = Field(None, description="gpt2: vocab.json")
    merge_file: str | None = Field(None, description="gpt2: merges.txt")
    eod_token: str | None = Field(None, description="end-of-document token; null: the tokenizer's own")


class DataConfig(Section):
    """Indexed datasets, blended by weight."""

    train: list[Corpus] = Field(description="training corpora")
    valid: list[Corpus] = Field([], description="validation corpora, reported one by one and together")
    test: list[Corpus] = Field([], description="test corpora, evaluated once at the end")
    split: str | None = Field(
        None, description='"train,valid,test" shares cut from data.train, such as "98,1,1"; then valid, test are []')
    cache_dir: str | None = Field(
        None, description="folder of the sample indices, shared or each node's own; null: beside the first corpus")
    num_workers: NonNegative = Field(2, description="loader processes a rank")
    seed: Seed = Field(1234, description="of the shuffle")
    eod_mask_loss: bool = Field(False, description="no loss on predicting the token after an end of document")
    reset_state_at_documents: bool = Field(False, description="mixers do not look across document boundaries")
    tokenizer: TokenizerConfig | None = Field(None, description="needed for sample text; stored in checkpoints")

    @model_validator(mode="after")
    def _split_or_lists(self) -> DataConfig:
        if not self.train:
            raise ValueError("data.train is empty: give at least one corpus (path of a .bin/.idx pair)")
        if self.cache_dir is None and self.train[0].path.startswith("s3://"):
            raise ValueError("data.train is in an S3 store: set data.cache_dir to a local folder for its indices")
        if self.split is not None:
            parts = self.split.split(",")
            numbers = len(parts) == 3 and all(re.fullmatch(r"\s*\d+(\.\d+)?\s*", p) for p in parts)
            if not numbers or float(parts[0]) == 0:
                raise ValueError(f'data.split={self.split!r} must be three shares such as "98,1,1", the first above 0')
            if self.valid or self.test:
                raise ValueError("data.split cuts validation and test from data.train: remove data.valid and "
                                 "data.test, or set data.split to null")
        return self


class TrainingConfig(Section):
    """Batch, length and arithmetic."""

    seq_length: Positive = Field(2048, description="tokens of a sequence")
    micro_batch_size: Positive = Field(8, description="sequences a data-parallel rank runs at once")
    global_batch_size: Positive = Field(256, description="sequences an optimizer step sees over all ranks")
    steps: Positive = Field(
        20000, description="optimizer steps; where corpora are read more than once, their order depends on it")
    precision: Literal["bf16", "fp32"] = Field("bf16", description="bf16 (with fp32 master weights) or fp32")
    fp8: Literal["none", "rowwise"] = Field(
        "none", description="rowwise: linear layers multiply fp8 operands with a scale a row (GPUs since compute "
        "capability 8.9); weight gradients, embedding and LM head stay in bf16")
    seed: Seed = Field(1234, description="of the initial weights")
    recompute: Literal["none", "norms", "selective", "full"] = Field(
        "none", description="activations done again in backward: norms, selective = norms, SwiGLU and convolutions, "
                            "full = whole layers")
    cuda_graph: bool = Field(
        True, description="bf16 on a GPU, ZeRO-1 or 2: a micro-batch is recorded once and started as a CUDA graph")
    device: Literal["auto", "cuda", "cpu"] = Field("auto", description="auto takes the GPU when there is one")


class OptimizerConfig(Section):
    """AdamW, linear warm-up, cosine decay (spec: training of all systems)."""

    lr: Annotated[float, Field(gt=0)] = Field(8e-4, description="peak learning rate")
    min_lr: Annotated[float, Field(ge=0)] = Field(8e-5, description="learning rate at the end of the cosine")
    warmup_steps: NonNegative = Field(200, description="steps of linear warm-up")
    warmup_start_lr: Annotated[float, Field(ge=0)] = Field(1e-6, description="learning rate of the first step")
    decay_steps: Positive | None = Field(None, description="step at which min_lr is reached; null: training.steps")
    beta1: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="AdamW beta1")
    beta2: Annotated[float, Field(ge=0, lt=1)] = Field(0.95, description="AdamW beta2")
    eps: Annotated[float, Field(gt=0)] = Field(1e-8, description="AdamW epsilon")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.1, description="on matrices; none on biases and norms")
    clip_grad_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="global gradient norm is clipped to this")


class ValidationConfig(Section):
    """Validation while training."""

    interval: NonNegative = Field(1000, description="steps between validations; 0: never")
    batches: Positive = Field(10, description="global batches a corpus and validation")
    recall_slices: bool = Field(
        False, description="perplexity of AR hits (bigrams seen before in the context and rare in training) and others")
    rare_below: Positive = Field(1250, description="a bigram is rare when it is fewer times in the training corpora")


class LoggingConfig(Section):
    """What a person sees."""

    log_interval: Positive = Field(10, description="steps between log lines")
    tensorboard_dir: str | None = Field(None, description="folder of TensorBoard events; null: none written")
    sample_interval: NonNegative = Field(
        0, description="steps between text samples; 0: never")
    sample_prompt: str = Field("The", description="prompt of the text samples")
    sample_tokens: Positive = Field(64, description="tokens of a text sample")
    peak_tflops: Annotated[float, Field(gt=0)] = Field(
        800.0, description="TFLOP/s of one device that MFU is measured against")


class CheckpointConfig(Section):
    """Where training state goes."""

    dir: str | None = Field(None, description="folder of the checkpoints; null: none written")
    interval: NonNegative = Field(1000, description="steps between checkpoints; 0: only at the end and on SIGTERM")
    keep_last: Positive = Field(3, description="newest checkpoints kept")
    resume: bool = Field(True, description="go on from the newest checkpoint in dir; false: dir must hold none")


class Config(Section):
    """Everything `launch/pretrain.py` needs."""

    model: ModelConfig
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    data: DataConfig
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    validation: ValidationConfig = Field(default_factory=ValidationConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)

    @model_validator(mode="after")
    def _combinations(self) -> Config:
        model, tp = self.model, self.parallel.tensor_parallel_size
        for name, value in model.split_sizes().items():
            if value % tp:
                raise ValueError(f"model.{name}={value} is not divisible by parallel.tensor_parallel_size={tp}: "
                                 "change one of them")
        if self.parallel.sequence_parallel and self.training.seq_length % tp:
            raise ValueError(f"training.seq_length={self.training.seq_length} is not divisible by "
                             f"parallel.tensor_parallel_size={tp}, which sequence_parallel needs")
        if self.parallel.sequence_parallel and "rwkv" in model.mixers:
            raise ValueError("the token shift of rwkv looks across the borders of sequence parallelism: set "
                             "parallel.sequence_parallel to false")
        if "hyena" in model.mixers and self.training.seq_length > model.hyena.filter_length:
            raise ValueError(f"training.seq_length={self.training.seq_length} is longer than model.hyena.filter_length="
                             f"{model.hyena.filter_length}: raise the latter")
        if self.parallel.zero_stage == 0 and self.training.precision == "bf16":
            raise ValueError("DeepSpeed has no bf16 training with fp32 sums at zero_stage 0: set parallel.zero_stage=1")
        if self.training.fp8 != "none" and self.training.precision != "bf16":
            raise ValueError(f"training.fp8={self.training.fp8} needs training.precision=bf16")
        if self.training.fp8 != "none" and self.parallel.zero_stage == 3:
            raise ValueError("training.fp8 keeps copies of whole weights, which zero_stage 3 cuts among ranks: set "
                             "parallel.zero_stage=1")
        if self.parallel.sequence_parallel and tp == 1:
            raise ValueError("parallel.sequence_parallel needs parallel.tensor_parallel_size > 1: set it to false")
        if self.training.global_batch_size % self.training.micro_batch_size:
            raise ValueError(f"training.global_batch_size={self.training.global_batch_size} is not divisible by "
                             f"training.micro_batch_size={self.training.micro_batch_size}")
        if self.optimizer.min_lr > self.optimizer.lr:
            raise ValueError("optimizer.min_lr is above optimizer.lr")
        if self.logging.sample_interval and self.data.tokenizer is None:
            raise ValueError("logging.sample_interval needs data.tokenizer to write text: give it, or set 0")
        return self

    @property
    def shards_gradients(self) -> bool:
        """Whether training/bf16_optimizer.py does, for ZeRO-2 in bf16; the rest of it is DeepSpeed's ZeRO-1."""
        return self.parallel.zero_stage == 2 and self.training.precision == "bf16"

    @property
    def deepspeed_stage(self) -> int:
        return 1 if self.shards_gradients else self.parallel.zero_stage

    @property
    def decay_steps(self) -> int:
        return self.optimizer.decay_steps or self.training.steps

    def check_world(self, world_size: int) -> tuple[int, int]:
        """(data-parallel size, micro-batches a step) for this many processes; UserError where they do not fit."""
        tp = self.parallel.tensor_parallel_size
        if world_size % tp:
            raise UserError(f"{world_size} processes are not a multiple of parallel.tensor_parallel_size={tp}")
        dp = world_size // tp
        rows = self.training.micro_batch_size * dp
        if self.training.global_batch_size % rows:
            raise UserError(
                f"training.global_batch_size={self.training.global_batch_size} is not divisible by "
                f"micro_batch_size × data parallel = {self.training.micro_batch_size} × {dp}: change one of them")
        return dp, self.training.global_batch_size // rows

    def to_yaml(self) -> str:
        """The whole tree, defaults included, as YAML that `load_config` reads back."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False)


class NumberLoader(yaml.SafeLoader):
    """YAML 1.1 reads 8e-4 as a string; here it is a number. A key that stands twice is an error, not overwritten."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value} stands twice (line {key.start_mark.line + 1})")
        return super().construct_mapping(node, deep)


NumberLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.\d[\d_]*([eE][-+]?\d+)?)$"),
    list("-+0123456789."))


def read_yaml(path: str | Path, what: str) -> Any:
    """What a YAML file holds. Raises UserError, which calls the file `what`."""
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), NumberLoader)
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply `a.b=value` overrides (values are YAML), validate. Raises UserError."""
    tree = read_yaml(path, "config")
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold sections such as model: and data:, found {type(tree).__name__}")
    for item in overrides or []:
        _override(tree, item)
    try:
        return Config.model_validate(_ints_to_floats(tree, Config))
    except ValidationError as error:
        raise UserError(f"{path}: {one_sentence(error)}") from error


def _override(tree: dict[str, Any], item: str) -> None:
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise UserError(f"override {item!r} must have the form section.key=value")
    try:
        value = yaml.load(text, NumberLoader)
    except yaml.YAMLError as error:
        raise UserError(f"override {item!r}: the value is not valid YAML") from error
    *parents, last = key.split(".")
    node: Any = tree
    for name in parents:
        if isinstance(node, list) and name.isdigit() and int(name) < len(node):
            node = node[int(name)]
        elif isinstance(node, dict):
            if node.get(name) is None:
                node[name] = {}
            node = node[name]
        else:
            raise UserError(f"override {item!r}: {name!r} has no keys below it")
    if isinstance(node, list) and last.isdigit() and int(last) < len(node):
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise UserError(f"override {item!r}: there is no {last!r} in {'.'.join(parents)}")


def _ints_to_floats(value: Any, kind: Any) -> Any:
    """`lr: 1` is a fine float, though strict mode would refuse the int."""
    if isinstance(value, dict) and isinstance(kind, type) and issubclass(kind, BaseModel):
        fields = kind.model_fields
        return {k: _ints_to_floats(v, _plain(fields[k].annotation)) if k in fields else v for k, v in value.items()}
    if isinstance(value, list) and kind is Corpus:
        return [_ints_to_floats(v, Corpus) for v in value]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def _plain(annotation: Any) -> Any:
    """The type inside Annotated[…], list[…] and … | None."""
    arguments = [a for a in getattr(annotation, "__args__", ()) if a is not type(None)]
    if annotation in (int, float, str, bool) or not arguments:
        return annotation
    return _plain(arguments[0])


def one_sentence(error: ValidationError) -> str:
    """The first mistake, named by its key."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, [name for name, _ in _keys()], n=1, cutoff=0.5)
        return f"unknown key {key}" + (f": did you mean {close[0]}?" if close else "")
    if first["type"] == "missing":
        return f"{key} is missing"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    if first["type"] == "model_type":
        return f"{key}={first['input']!r}: this is a section and needs keys of its own"
    return f"{key}={first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _keys(kind: type[BaseModel] = Config, prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, field in kind.model_fields.items():
        inner = _plain(field.annotation)
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            index = "[]" if "list" in str(field.annotation) else ""
            if field.description:
                found.append((prefix + name, field))
            found += _keys(inner, f"{prefix}{name}{index}.")
        else:
            found.append((prefix + name, field))
    return found


def help_text() -> str:
    """Every key with its default and meaning, a line each."""
    lines = ["Keys of the configuration (YAML file; override on the command line with section.key=value):"]
    for name, field in _keys():
        if field.is_required():
            default = "required"
        else:
            value = field.get_default(call_default_factory=True)
            default = "default null" if value is None else f"default {value}"
        lines.append(f"  {name:36} {field.description} ({default})")
    return "\n".join(lines)
