"""Cross-entropy over vocabulary-parallel logits, without a second copy of them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from based_mp.ops import backends


def cross_entropy(logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> Tensor:
    """−log softmax(logits)[label] of every token, fp32.

    logits: [seq, batch, vocabulary / tp] of this rank, contiguous; labels: int64 [seq, batch]; group: tensor parallel.
    On a GPU the backward pass writes the logits' gradient over the logits, in their dtype: read them no more, and go
    backward once.
    """
    if backends.fused_backend(logits) == "triton":
        return _CrossEntropy.apply(logits, labels, group)
    return vocab_parallel_cross_entropy(logits, labels)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, group):
        from based_mp.ops.fused import kernels
        logits, labels = logits.contiguous(), labels.contiguous()
        vocab = logits.shape[-1]
        first = group.rank() * vocab
        largest, total, target = torch.empty(3, *labels.shape, dtype=torch.float32, device=logits.device)
        kernels.cross_entropy_forward[(labels.numel(),)](logits, labels, largest, total, target, first, VOCAB=vocab,
                                                         BLOCK=4096, num_warps=8)
        if group.size() > 1:
            own = largest
            largest = own.clone()
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
            sums = torch.stack([total * (own - largest).exp(), target])
            dist.all_reduce(sums, group=group)
            total, target = sums
        lse = largest + total.log()
        ctx.save_for_backward(logits, labels, lse)
        ctx.first = first
        return lse - target

    @staticmethod
    def backward(ctx, grad):
        from based_mp.ops.fused import kernels
        logits, labels, lse = ctx.saved_tensors
        vocab = logits.shape[-1]
        kernels.cross_entropy_backward[(labels.numel(), -(-vocab // 4096))](
            logits, labels, lse, grad.contiguous(), vocab, ctx.first, BLOCK=4096, num_warps=8)
        return logits, None, None
