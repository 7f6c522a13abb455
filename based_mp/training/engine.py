"""The DeepSpeed engine around the Megatron-core model."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from based_mp.config import Config
from based_mp.errors import UserError
from based_mp.estimate import parameter_counts
from based_mp.inference.load import full_state, load_state
from based_mp.model.based_model import build_model
from based_mp.model.fp8 import use_fp8
from based_mp.parallel.mpu import MPU
from based_mp.parallel.state import Ranks
from based_mp.training.quiet import import_deepspeed, quiet


def deepspeed_config(config: Config, ranks: Ranks, *, universal: bool = False) -> dict[str, Any]:
    """The JSON that DeepSpeed reads, derived from ours: there is no second file to keep in step."""
    _, accumulation = config.check_world(ranks.world_size)
    # DeepSpeed allocates whole buckets: its default of 5e8 values would be more than a small model itself.
    bucket = min(sum(parameter_counts(config.model).values()), 100_000_000)
    settings: dict[str, Any] = {
        "train_batch_size": config.training.global_batch_size,
        "train_micro_batch_size_per_gpu": config.training.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optimizer.clip_grad_norm,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": config.deepspeed_stage, "overlap_comm": ranks.device.type == "cuda",
                              "reduce_bucket_size": bucket, "allgather_bucket_size": bucket},
        # It waits for the GPU before and after every micro-batch.
        "timers": {"throughput": {"enabled": False}},
    }
    if config.training.precision == "bf16":
        # Each gradient is added to the fp32 sum as soon as backward has made it, and its bf16 copy is dropped.
        settings["bf16"] = {"enabled": True, "immediate_grad_update": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    if universal:
        settings["checkpoint"] = {"load_universal": True}
    return settings


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases, norms (one dimension) and parameters marked `no_weight_decay` do not."""
    named = [p for p in model.parameters() if p.requires_grad]
    dims = [0 if getattr(p, "no_weight_decay", False) else len(getattr(p, "ds_shape", p.shape))   # ZeRO-3's are empty
            for p in named]
    return [{"params": [p for p, n in zip(named, dims, strict=True) if n > 1], "weight_decay": weight_decay},
            {"params": [p for p, n in zip(named, dims, strict=True) if n <= 1], "weight_decay": 0.0}]


def universal_checkpoint_info(model: torch.nn.Module) -> dict[str, Any]:
    """How DeepSpeed's universal checkpoints merge tensor-parallel slices, from the parameters' own attributes."""
    info: dict[str, Any] = {
        "universal_checkpoint_version": 0.2, "tp_replicated_parameter_patterns": [],
        "parameter_with_row_parallelism_patterns": [], "parameter_with_2_sub_params_cat_dim_0": []}
    for name, parameter in model.named_parameters():
        kind = None
        if not getattr(parameter, "tensor_model_parallel", False):
            kind = "tp_replicated_parameter_patterns"
        elif parameter.partition_stride == 2:
            kind = "parameter_with_2_sub_params_cat_dim_0"
        elif parameter.partition_dim == 1:
            kind = "parameter_with_row_parallelism_patterns"
        if kind:
            info[kind].append(re.escape(name) + "$")
    return info


def build_engine(config: Config, ranks: Ranks, *, universal: bool = False, weights: Path | None = None) -> Any:
    """The DeepSpeed engine of `config`.

    universal: its next load reads a universal checkpoint. weights: an imported checkpoint to start from.
    """
    if weights is not None and config.parallel.zero_stage == 3:
        raise UserError(f"{weights} holds imported weights, which ZeRO-3 cannot start from: set parallel.zero_stage=1")
    deepspeed = import_deepspeed(ranks.device)
    settings = deepspeed_config(config, ranks, universal=universal)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    mpu = MPU()
    sharded_init = contextlib.nullcontext()
    if config.parallel.zero_stage == 3:
        sharded_init = deepspeed.zero.Init(data_parallel_group=mpu.get_data_parallel_group(),
                                           config_dict_or_path=settings, mpu=mpu)
    with sharded_init:
        model = build_model(config)
    if weights is not None:
        load_state(model, full_state(weights, model), ranks.tp_rank, ranks.tp_size)
    model.universal_checkpoint_info = universal_checkpoint_info(model)
    o = config.optimizer
    optimizer = torch.optim.AdamW(parameter_groups(model, o.weight_decay), lr=o.lr, betas=(o.beta1, o.beta2),
                                  eps=o.eps, fused=True)
    if config.training.fp8 != "none":
        use_fp8(model, optimizer)
    with quiet():
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, mpu=mpu)
    from based_mp.training.bf16_optimizer import fuse  # imports DeepSpeed, quiet by now
    fuse(engine, shard_gradients=config.shards_gradients)
    return engine


def set_learning_rate(engine: Any, lr: float) -> None:
    """Of every parameter group."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


@torch.no_grad()
def whole_copy(engine: Any, config: Config) -> torch.nn.Module:
    """The engine's model for generation: itself, or a copy where its weights or its sequences are cut among ranks.

    Tensor parallelism stays.
    """
    if config.parallel.zero_stage < 3 and not config.parallel.sequence_parallel:
        return engine.module
    from deepspeed import zero
    parallel = config.parallel.model_copy(update={"sequence_parallel": False})
    copy = build_model(config.model_copy(update={"parallel": parallel}))
    for theirs, ours in zip(engine.module.parameters(), copy.parameters(), strict=True):
        with zero.GatheredParameters([theirs], enabled=config.parallel.zero_stage == 3):
            ours.copy_(theirs)
    return copy


def replicas_unequal(model: torch.nn.Module, tp_size: int) -> int:
    """Parameters that differ between ranks where they must be bit-equal (a check; gathers everything).

    Under ZeRO-3 those whose copies, put together from the data-parallel shards, differ between tensor-parallel ranks.
    """
    from deepspeed import zero
    parameters, bad = list(model.parameters()), 0
    with zero.GatheredParameters(parameters, enabled=any(hasattr(p, "ds_id") for p in parameters)):
        for parameter in parameters:
            copies = [torch.empty_like(parameter.data) for _ in range(dist.get_world_size())]
            dist.all_gather(copies, parameter.data.contiguous())
            stride = tp_size if getattr(parameter, "tensor_model_parallel", False) else 1
            bad += any(not torch.equal(copy, copies[rank % stride]) for rank, copy in enumerate(copies))
    return bad
