"""DeepSpeed's bf16 optimizer (ZeRO-1: fp32 sums, master weights and states) with fewer passes over the gradients.

A linear layer's weight gradient is added to the fp32 sum by the matrix product that computes it, so that it never
exists in bf16 (megatron-core's gradient_accumulation_fusion); those of norms, convolutions and the embedding by their
kernels (`based_mp.ops.gradient_sum`); every other gradient by one kernel more. Each data-parallel rank gets the sums of
its partition alone: with ZeRO-1 by one reduce-scatter a step (where DeepSpeed all-reduces), with ZeRO-2, of matrices,
during every backward pass. The gradient norm takes a few kernels, averaging, clipping and the test for infinities
happen inside the fused AdamW, and the host never waits for the GPU.
"""

from __future__ import annotations

from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import is_model_parallel_parameter
from megatron.core.tensor_parallel import layers
from torch import Tensor

from based_mp.ops.gradient_sum import GradientSum
from based_mp.training.sharded_gradients import ShardedGradients


def add_weight_gradient(x: Tensor, dy: Tensor, total: Tensor, *more: tuple[Tensor, Tensor]) -> None:
    """total += dyᵀ x, of `more` pairs too. x: bf16 [tokens, in]; dy: bf16 [tokens, out]; total: fp32 [out, in].

    Where `total` has a function `made` it is overwritten instead, and that is called (`GradientSum`).
    """
    made = getattr(total, "made", None)
    for i, (inputs, gradients) in enumerate(((x, dy), *more)):
        add = i > 0 or made is None
        if total.is_cuda:
            torch.ops.aten.addmm.dtype_out(total, gradients.t(), inputs, torch.float32, beta=int(add), out=total)
        elif add:
            total.add_(gradients.t() @ inputs)
        else:
            total.copy_(gradients.t() @ inputs)
    if made is not None:
        made()


class FusedBF16Optimizer(BF16_Optimizer):
    """What an engine's BF16_Optimizer (with immediate_grad_update) becomes, by `fuse`."""

    sharded: ShardedGradients | None = None

    def fuse_weight_gradients(self, model: torch.nn.Module) -> None:
        """Lets the linear layers of `model` add to the fp32 sums themselves."""
        layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(wgrad_gemm_accum_fp32=add_weight_gradient)
        for parameters, sums in zip(self.bf16_groups, self.fp32_groups_gradients, strict=True):
            for parameter, total in zip(parameters, sums, strict=True):
                parameter.main_grad = total.view(parameter.shape)
        for module in model.modules():
            if hasattr(module, "gradient_accumulation_fusion"):
                module.gradient_accumulation_fusion = True

    def shard_gradients(self) -> None:
        """ZeRO-2 for the first group, the matrices; what the others hold is too little to cut."""
        kept = self.fp32_groups_gradient_flat_partition[0].clone()
        named = ((self.param_names[p], p) for p in self.bf16_groups[0])
        self.sharded = ShardedGradients(named, kept, self.dp_process_group)
        self.fp32_groups_gradients[0] = self.fp32_groups_gradient_dict[0] = [p.main_grad for p in self.bf16_groups[0]]
        for sums in (self.fp32_groups_gradients_flat, self.fp32_groups_actual_gradients_flat,
                     self.fp32_groups_gradient_flat_partition, self.non_expert_gradients):
            sums[0] = kept                                     # the sums of the whole group are let go

    @torch.no_grad()
    def accumulate_hp_grads_and_remove_lp(self, lp_param: Any, group_idx: int, param_idx: int) -> None:
        """Of each parameter whose gradient autograd has made."""
        if lp_param.grad is not None:
            summed = GradientSum(lp_param)
            summed.total(lp_param.shape, lp_param.device).add_(lp_param.grad)
            summed.made()
            lp_param.grad = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Clips and steps; a step whose gradients are not all finite changes nothing."""
        ranks = dist.get_world_size(self.dp_process_group)
        if self.sharded is not None:
            self.sharded.finish()
        if ranks > 1:
            for total, own in zip(self.fp32_groups_gradients_flat, self.fp32_groups_gradient_flat_partition,
                                  strict=True):
                if total is own:                               # by `sharded`
                    continue
                # NCCL sums in place; gloo must not.
                dist.reduce_scatter_tensor(own, total if total.is_cuda else total.clone(), group=self.dp_process_group)
        norm = self._norm() / ranks
        self._global_grad_norm = norm
        self.optimizer.grad_scale = ((norm + 1e-6) / self.clip_grad).clamp(min=1) * ranks
        self.optimizer.found_inf = (~norm.isfinite()).float()
        for parameter, gradient in zip(self.fp32_groups_flat_partition, self.fp32_groups_gradient_flat_partition,
                                       strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self._lazy_init_hp_params_optimizer_state()
        self.update_lp_params()

    def destroy(self) -> None:
        """DeepSpeed ties the parameters to themselves, so that they are never freed: the sums are, nevertheless."""
        super().destroy()
        for parameter in (p for group in self.bf16_groups for p in group):
            parameter.__dict__.pop("main_grad", None)      # destroyed twice: by its user and by itself

    def _norm(self) -> Tensor:
        """Of the gradients summed over the ranks; those of replicated parameters count on the first tensor-parallel
        rank."""
        norm = self.fp32_groups_flat_partition[0].new_zeros(())
        if self._counted:
            norm = torch.nn.utils.get_total_norm(self._counted)
        if dist.get_world_size() > 1:
            norm = norm.square()
            dist.all_reduce(norm)
            norm = norm.sqrt()
        return norm

    @cached_property
    def _counted(self) -> list[Tensor]:
        """Views of what lies of every parameter's gradient in this rank's partition and counts in the norm."""
        first = self.mpu.get_tensor_model_parallel_rank() == 0
        rank, views = dist.get_rank(self.dp_process_group), []
        for parameters, own in zip(self.bf16_groups, self.fp32_groups_gradient_flat_partition, strict=True):
            end, (low, high) = 0, (rank * own.numel(), (rank + 1) * own.numel())
            for parameter in parameters:
                start, end = end, end + parameter.numel()
                if (first or is_model_parallel_parameter(parameter)) and start < high and end > low:
                    views.append(own[max(start, low) - low : min(end, high) - low])
        return views


def fuse(engine: Any, *, shard_gradients: bool = False) -> None:
    """The engine's bf16 optimizer as `FusedBF16Optimizer`, with ZeRO-2 where `shard_gradients`; other optimizers
    (ZeRO-3, fp32) stay."""
    if type(engine.optimizer) is BF16_Optimizer:
        engine.optimizer.__class__ = FusedBF16Optimizer
        engine.optimizer.fuse_weight_gradients(engine.module)
        if shard_gradients and engine.dp_world_size > 1:
            engine.optimizer.shard_gradients()
        engine.enable_backward_allreduce = False               # the optimizer sums over the ranks
