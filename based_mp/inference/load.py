"""Model weights out of a training checkpoint, at any tensor-parallel size."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from based_mp.config import Config, load_config
from based_mp.errors import UserError
from based_mp.parallel.state import Ranks
from based_mp.training import checkpoint as ckpt


def read_config(checkpoint: Path, overrides: list[str] | None = None) -> Config:
    """The checkpoint's configuration for inference: no sequence parallelism, no recomputation, own tokenizer files."""
    config = load_config(checkpoint / "config.yaml", overrides)
    changes: dict[str, Any] = {
        "parallel": config.parallel.model_copy(update={"sequence_parallel": False}),
        "training": config.training.model_copy(update={"recompute": "none"})}
    if config.data.tokenizer is not None:
        copies = {name: str(checkpoint / ckpt.TOKENIZER / Path(value).name)
                  for name in ("model", "vocab_file", "merge_file")
                  if (value := getattr(config.data.tokenizer, name)) is not None}
        tokenizer = config.data.tokenizer.model_copy(update=copies)
        changes["data"] = config.data.model_copy(update={"tokenizer": tokenizer})
    return config.model_copy(update=changes)


def open_model(path: str | Path, ranks: Ranks, overrides: list[str] | None = None) -> tuple[Config, torch.nn.Module]:
    """A checkpoint's (or the newest one's of a folder) configuration, changed by `section.key=value` overrides, and
    model, in eval mode, at the tensor-parallel size of `ranks`."""
    from based_mp.model.based_model import build_model
    checkpoint = ckpt.resolve(path)
    config = read_config(checkpoint, overrides)
    parallel = config.parallel.model_copy(update={"tensor_parallel_size": ranks.tp_size})
    training = config.training.model_copy(update={"device": ranks.device.type})
    config = config.model_copy(update={"parallel": parallel, "training": training})
    model = build_model(config).eval()
    load_state(model, full_state(checkpoint, model), ranks.tp_rank, ranks.tp_size)
    return config, model


def merge(parts: list[Tensor], dim: int, stride: int) -> Tensor:
    """The whole of a tensor-parallel parameter. stride 2: each rank holds [first half | second half] of its own."""
    blocks = [part.chunk(stride, dim) for part in parts]
    return torch.cat([block[i] for i in range(stride) for block in blocks], dim)


def cut(whole: Tensor, dim: int, stride: int, rank: int, size: int) -> Tensor:
    """One rank's part: the inverse of `merge`."""
    return torch.cat([block.chunk(size, dim)[rank] for block in whole.chunk(stride, dim)], dim)


def partition(parameter: Tensor) -> tuple[int, int] | None:
    """(dim, stride) of a tensor-parallel parameter; None for a replicated one."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    return parameter.partition_dim, parameter.partition_stride


def full_state(checkpoint: Path, model: torch.nn.Module) -> dict[str, Tensor]:
    """Whole (unsharded) weights by our names, on the CPU; `model`, at any TP size, tells how each is cut."""
    meta = ckpt.read_meta(checkpoint)
    if meta["layout"]["zero_stage"] == 3 or meta["universal"]:
        shards = [_fp32_state(checkpoint, meta)]
    else:
        files = sorted(checkpoint.glob("mp_rank_*_model_states.pt"),
                       key=lambda p: int(re.findall(r"mp_rank_(\d+)", p.name)[0]))
        shards = [_read(file)["module"] for file in files]
    names = dict(model.named_parameters())
    missing = sorted(set(names) - set(shards[0]))
    if missing:
        raise UserError(f"{checkpoint} has no weight {missing[0]}: it holds another architecture")
    out = {}
    for name, parameter in names.items():
        cutting = partition(parameter)
        parts = [shard[name] for shard in shards]
        out[name] = parts[0] if cutting is None or len(parts) == 1 else merge(parts, *cutting)
    return out


def _read(file: Path) -> dict[str, Any]:
    """One file of a checkpoint, on the CPU. Raises UserError where its bytes are damaged (its size was checked)."""
    try:
        return torch.load(file, map_location="cpu", weights_only=False)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"{file} is damaged and cannot be read ({' '.join(str(error).split())[:100]}): use an older "
                        "checkpoint, or fetch this one again") from error


def _fp32_state(checkpoint: Path, meta: dict[str, Any]) -> dict[str, Tensor]:
    if meta["universal"]:                                            # every parameter whole, in a folder of its name
        return {path.parent.name: _read(path)["param"] for path in sorted((checkpoint / "zero").glob("*/fp32.pt"))}
    if meta["layout"]["tensor_parallel"] > 1:
        raise UserError(f"{checkpoint} was saved with ZeRO-3 and tensor parallelism, which cannot be merged: save "
                        "with parallel.zero_stage 1 or 2")
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)


@torch.no_grad()
def load_state(model: torch.nn.Module, state: dict[str, Tensor], tp_rank: int, tp_size: int) -> None:
    """Copy whole weights into this rank's part of the model."""
    for name, parameter in model.named_parameters():
        cutting = partition(parameter)
        value = state[name] if cutting is None else cut(state[name], *cutting, tp_rank, tp_size)
        if value.shape != parameter.shape:
            raise UserError(f"weight {name} is {tuple(value.shape)} in the checkpoint and {tuple(parameter.shape)} in "
                            "the model: it holds another architecture")
        parameter.copy_(value)
