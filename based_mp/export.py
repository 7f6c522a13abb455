"""Weights in the names of the published BASED checkpoints (hazyresearch/based-*), as safetensors.

Ours → theirs, layer N:
* linear attention `linear_in` rows [head][q | k | v] → `proj_q`, `proj_k`, `proj_v`;
* softmax attention `linear_in` rows [head][q | k | v] → `Wqkv`, q, k, v stacked;
* convolution `linear_in` [u1 | u2] → `in_proj`, `conv_weight` [c, 3] → `conv.conv` [c, 1, 3];
* SwiGLU: our fc1 is [gate | value], theirs [value | gate].
The padded rows of the vocabulary are left out, and filled with zeros on the way back.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from based_mp.config import BASED_MIXERS, Config, ModelConfig
from based_mp.errors import UserError
from based_mp.inference.load import full_state, read_config
from based_mp.training import checkpoint as ckpt

EMBEDDING = "transformer.embeddings.word_embeddings.weight"


def _swap_halves(weight: Tensor) -> Tensor:
    return torch.cat(weight.chunk(2)[::-1])


def _split_heads(weight: Tensor, heads: int, sizes: list[int]) -> list[Tensor]:
    """Rows [head][parts] → one matrix a part, heads stacked."""
    parts = weight.unflatten(0, (heads, sum(sizes))).split(sizes, 1)
    return [part.flatten(0, 1) for part in parts]


def _join_heads(parts: list[Tensor], heads: int) -> Tensor:
    return torch.cat([part.unflatten(0, (heads, -1)) for part in parts], 1).flatten(0, 1)


def _mixer_to_reference(kind: str, ours: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    heads, d = model.num_heads, model.head_dim
    out = {"out_proj.weight": ours["linear_out.weight"]}
    if kind == "linear_attention":
        sizes = [model.feature_dim, model.feature_dim, d]
        for name, part in zip("qkv", _split_heads(ours["linear_in.weight"], heads, sizes), strict=True):
            out[f"proj_{name}.weight"] = part
    elif kind == "gated_conv":
        out |= {"in_proj.weight": ours["linear_in.weight"], "in_proj.bias": ours["linear_in.bias"],
                "out_proj.bias": ours["out_bias"], "conv.conv.weight": ours["conv_weight"][:, None]}
    else:
        out["Wqkv.weight"] = torch.cat(_split_heads(ours["linear_in.weight"], heads, [d, d, d]))
    return out


def _mixer_from_reference(kind: str, theirs: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    out = {"linear_out.weight": theirs["out_proj.weight"]}
    if kind == "linear_attention":
        out["linear_in.weight"] = _join_heads([theirs[f"proj_{n}.weight"] for n in "qkv"], model.num_heads)
    elif kind == "gated_conv":
        out |= {"linear_in.weight": theirs["in_proj.weight"], "linear_in.bias": theirs["in_proj.bias"],
                "out_bias": theirs["out_proj.bias"], "conv_weight": theirs["conv.conv.weight"][:, 0]}
    else:
        out["linear_in.weight"] = _join_heads(list(theirs["Wqkv.weight"].chunk(3)), model.num_heads)
    return out


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix):]: value for name, value in tensors.items() if name.startswith(prefix)}


def to_reference(state: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Whole weights by our names → by the published ones."""
    _check_mixers(model)
    vocab = model.vocab_size
    out = {EMBEDDING: state["embedding.word_embeddings.weight"][:vocab],
           "transformer.ln_f.weight": state["decoder.final_layernorm.weight"]}
    out["lm_head.weight"] = out[EMBEDDING] if model.tie_embeddings else state["output_layer.weight"][:vocab]
    for layer, kind in enumerate(model.mixers):
        ours, theirs = f"decoder.layers.{layer}.", f"transformer.layers.{layer}."
        out[theirs + "norm1.weight"] = state[ours + "input_layernorm.weight"]
        out[theirs + "norm2.weight"] = state[ours + "pre_mlp_layernorm.weight"]
        out[theirs + "mlp.fc1.weight"] = _swap_halves(state[ours + "mlp.linear_fc1.weight"])
        out[theirs + "mlp.fc2.weight"] = state[ours + "mlp.linear_fc2.weight"]
        mixer = _mixer_to_reference(kind, _under(state, ours + "self_attention."), model)
        out |= {theirs + "mixer." + name: value for name, value in mixer.items()}
    return {name: value.clone().contiguous() for name, value in out.items()}


def from_reference(tensors: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """By the published names (a `model.` prefix and `*metrics*` are dropped) → ours. Raises UserError."""
    tensors = {name.removeprefix("model."): value for name, value in tensors.items() if "metrics" not in name}
    _check_names(tensors, model)
    padding = (0, 0, 0, model.padded_vocab_size - model.vocab_size)
    out = {"embedding.word_embeddings.weight": torch.nn.functional.pad(tensors[EMBEDDING], padding),
           "decoder.final_layernorm.weight": tensors["transformer.ln_f.weight"]}
    if not model.tie_embeddings:
        out["output_layer.weight"] = torch.nn.functional.pad(tensors["lm_head.weight"], padding)
    for layer, kind in enumerate(model.mixers):
        ours, theirs = f"decoder.layers.{layer}.", f"transformer.layers.{layer}."
        out[ours + "input_layernorm.weight"] = tensors[theirs + "norm1.weight"]
        out[ours + "pre_mlp_layernorm.weight"] = tensors[theirs + "norm2.weight"]
        out[ours + "mlp.linear_fc1.weight"] = _swap_halves(tensors[theirs + "mlp.fc1.weight"])
        out[ours + "mlp.linear_fc2.weight"] = tensors[theirs + "mlp.fc2.weight"]
        mixer = _mixer_from_reference(kind, _under(tensors, theirs + "mixer."), model)
        out |= {ours + "self_attention." + name: value for name, value in mixer.items()}
    return out


def _check_names(tensors: dict[str, Tensor], model: ModelConfig) -> None:
    _check_mixers(model)
    expected = set(_reference_shapes(model))
    given = set(tensors) | ({"lm_head.weight"} if model.tie_embeddings else set())
    missing, unknown = sorted(expected - given), sorted(given - expected)
    if missing or unknown:
        raise UserError("the weights do not fit the configuration: "
                        + "; ".join(f"{what} {', '.join(names[:4])}{' …' if len(names) > 4 else ''}"
                                    for what, names in (("missing", missing), ("unknown", unknown)) if names))
    for name, shape in _reference_shapes(model).items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            raise UserError(f"weight {name} is {tuple(tensors[name].shape)}, the configuration needs {shape}: "
                            "correct the model section")


def _check_mixers(model: ModelConfig) -> None:
    unknown = sorted(set(model.mixers) - set(BASED_MIXERS))
    if unknown or not model.ffn_size:
        raise UserError("the published BASED checkpoints have no names for "
                        f"{', '.join(unknown) or 'layers without MLP'}: only models of BASED's "
                        "mixers and of softmax attention are exported and imported")


def _reference_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    d, head, f = model.d_model, model.num_heads * model.head_dim, model.num_heads * model.feature_dim
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (model.vocab_size, d), "lm_head.weight": (model.vocab_size, d), "transformer.ln_f.weight": (d,)}
    mixers: dict[str, dict[str, tuple[int, ...]]] = {
        "linear_attention": {"proj_q.weight": (f, d), "proj_k.weight": (f, d), "proj_v.weight": (head, d),
                             "out_proj.weight": (d, head)},
        "gated_conv": {"in_proj.weight": (4 * d, d), "in_proj.bias": (4 * d,), "out_proj.weight": (d, 2 * d),
                       "out_proj.bias": (d,), "conv.conv.weight": (2 * d, 1, model.conv_kernel)}}
    softmax = {"Wqkv.weight": (3 * head, d), "out_proj.weight": (d, head)}
    for layer, kind in enumerate(model.mixers):
        names = {"norm1.weight": (d,), "norm2.weight": (d,), "mlp.fc1.weight": (2 * model.ffn_size, d),
                 "mlp.fc2.weight": (d, model.ffn_size)}
        names |= {f"mixer.{name}": shape for name, shape in mixers.get(kind, softmax).items()}
        shapes |= {f"transformer.layers.{layer}.{name}": shape for name, shape in names.items()}
    return shapes


def export_safetensors(checkpoint: str | Path, path: str | Path, model: torch.nn.Module) -> Path:
    """Write the weights of a training checkpoint; `model` (at TP 1) tells how they are cut."""
    folder = ckpt.resolve(checkpoint)
    tensors = to_reference(full_state(folder, model), read_config(folder).model)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(path).with_name(f".{Path(path).name}.writing")
        save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}") from error
    return Path(path)


def import_safetensors(path: str | Path, config: Config, directory: str | Path) -> Path:
    """Published weights → a checkpoint at step 0 in `directory`, to generate and to train from."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path} as safetensors: {error}") from error
    return ckpt.save_weights(from_reference(tensors, config.model), config, directory)
