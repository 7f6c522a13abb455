"""AdamW steps of the small model, several times over; rank 0 writes what happened.

train_worker.py OUT.json CASES: a JSON list of {tp, zero, sp, steps, fault, changes}, all of one tp. OUT.json gets of each
case [loss, gradient norm] of every step and the count of unequal replicas. changes: sections of the configuration.
zero: null for plain PyTorch in one process, without DeepSpeed. fault: "none", "norms", or the class of a mixer.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

warnings.simplefilter("ignore")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from based_mp.config import Config  # noqa: E402
from based_mp.parallel import state  # noqa: E402
from tests.models import tiny_config  # noqa: E402


def global_batch(step: int, config: Config) -> dict[str, torch.Tensor]:
    rows, length = config.training.global_batch_size, config.training.seq_length
    ids = torch.randint(0, 120, (rows, length + 1), generator=torch.Generator().manual_seed(100 + step % 5))
    return {"tokens": ids[:, :-1], "labels": ids[:, 1:], "loss_mask": torch.ones(rows, length)}


def plain(config: Config) -> dict[str, Any]:
    from based_mp.model import based_model
    from based_mp.training.engine import parameter_groups
    model, o, history = based_model.build_model(config), config.optimizer, []
    optimizer = torch.optim.AdamW(parameter_groups(model, o.weight_decay), lr=o.lr, betas=(o.beta1, o.beta2),
                                  eps=o.eps)
    for step in range(config.training.steps):
        loss = based_model.forward_loss(model, global_batch(step, config))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        history.append((loss.item(), norm.item()))
    return {"history": history, "unequal": 0}


def parallel(config: Config, ranks: state.Ranks) -> dict[str, Any]:
    from megatron.core import parallel_state

    from based_mp.model import based_model
    from based_mp.training import engine as training_engine
    engine, history = training_engine.build_engine(config, ranks), []
    micro, dp = config.training.micro_batch_size, ranks.dp_size
    accumulation = config.training.global_batch_size // (micro * dp)
    for step in range(config.training.steps):
        batch, total = global_batch(step, config), torch.zeros((), dtype=torch.float64)
        for m in range(accumulation):
            first = (m * dp + ranks.dp_rank) * micro
            loss = based_model.forward_loss(engine, {k: v[first : first + micro] for k, v in batch.items()})
            engine.backward(loss)
            engine.step()
            total += loss.detach().double() / accumulation
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
        history.append((total.item() / dp, float(engine.get_global_grad_norm())))
    return {"history": history, "unequal": training_engine.replicas_unequal(engine.module, ranks.tp_size)}


def broken(fault: str) -> list[Any]:
    """The patches of a negative control."""
    if fault == "none":
        return []
    from based_mp.model import gated_conv, norms
    from based_mp.model.mixer import Mixer
    from based_mp.training import engine as training_engine
    if fault == "norms":                  # partial gradients of the norms and of the convolution's bias are not summed
        return [mock.patch.object(module, "replicated", lambda parameter, config: parameter)
                for module in (norms, gated_conv)]
    build_model, mixers = training_engine.build_model, {kind.__name__: kind for kind in Mixer.__subclasses__()}

    def untagged(config: Config) -> torch.nn.Module:
        """Sharded parameters of one kind of mixer count as replicated."""
        model = build_model(config)
        tags = [p for m in model.modules() if isinstance(m, mixers[fault]) for p in m.parameters()
                if getattr(p, "tensor_model_parallel", False)]
        assert tags
        for parameter in tags:
            parameter.tensor_model_parallel = False
        return model

    return [mock.patch.object(training_engine, "build_model", untagged)]


def main(out: Path, cases: list[dict[str, Any]]) -> None:
    results = []
    for case in cases:
        changes = {"training": {"steps": case["steps"]}, **case["changes"]}
        config = tiny_config(**changes, parallel={
            "tensor_parallel_size": case["tp"], "zero_stage": case["zero"] or 0, "sequence_parallel": case["sp"]})
        ranks = state.initialize(case["tp"], device="cpu", seed=7)
        with contextlib.ExitStack() as faults:
            for fault in broken(case["fault"]):
                faults.enter_context(fault)
            results.append(plain(config) if case["zero"] is None else parallel(config, ranks))
        gc.collect()
    if ranks.rank == 0:
        out.write_text(json.dumps(results))
    state.destroy()


main(Path(sys.argv[1]), json.loads(sys.argv[2]))
