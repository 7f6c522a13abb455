"""20 AdamW steps of the small model; rank 0 writes [loss, gradient norm] of each and the count of unequal replicas.

train_worker.py OUT.json TP ZERO SP(0|1) FAULT(none|norms|attributes) REFERENCE(0|1) [SYSTEM …]
SYSTEM: mixers of the layers, instead of BASED's.
REFERENCE runs plain PyTorch: no DeepSpeed, one process.
"""

import json
import sys

import warnings

warnings.simplefilter("ignore")

import torch  # noqa: E402
import torch.distributed as dist
from megatron.core import parallel_state

from based_mp.parallel import state
from tests.models import tiny_config

out, tp, zero, sp, fault, reference, *systems = sys.argv[1:]
layers = {} if not systems else {
    "num_layers": len(systems), "linear_attention_layers": [], "sliding_attention_layers": [],
    "mixer_layers": {kind: [i] for i, kind in enumerate(systems)}, "gla": {"num_heads": 2, "gate_rank": 4},
    "rwkv": {"head_dim": 16}, "mamba": {"d_state": 4}, "h3": {"d_state": 8},
    # With the usual 14, sines of sines of sines turn rounding noise into another run within two steps.
    "hyena": {"sine_frequency": 1.0}}
config = tiny_config(parallel={"tensor_parallel_size": int(tp), "zero_stage": int(zero),
                               "sequence_parallel": sp == "1"}, model=layers)
ranks = state.initialize(int(tp), device="cpu", seed=7)

from based_mp.model import based_model, gated_conv, norms  # noqa: E402
from based_mp.training import engine as training_engine  # noqa: E402

if fault == "norms":                      # negative control: partial gradients of the norms are not summed
    norms.replicated = gated_conv.replicated = lambda parameter, config: parameter
if fault == "attributes":                 # negative control: sharded parameters count as replicated
    gated_conv.set_tensor_model_parallel_attributes = lambda *args: None

T = config.training
STEPS, dp = T.steps, ranks.dp_size


def global_batch(step):
    ids = torch.randint(0, 120, (T.global_batch_size, T.seq_length + 1),
                        generator=torch.Generator().manual_seed(100 + step % 5))
    return {"tokens": ids[:, :-1], "labels": ids[:, 1:], "loss_mask": torch.ones(T.global_batch_size, T.seq_length)}


history = []
if reference == "1":
    model = based_model.build_model(config)
    o = config.optimizer
    optimizer = torch.optim.AdamW(training_engine.parameter_groups(model, o.weight_decay), lr=o.lr,
                                  betas=(o.beta1, o.beta2), eps=o.eps)
    for step in range(STEPS):
        loss = based_model.forward_loss(model, global_batch(step))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        history.append((loss.item(), norm.item()))
    unequal = 0
else:
    engine = training_engine.build_engine(config, ranks)
    micro = T.micro_batch_size
    for step in range(STEPS):
        batch, total = global_batch(step), torch.zeros((), dtype=torch.float64)
        accumulation = T.global_batch_size // (micro * dp)
        for m in range(accumulation):
            first = (m * dp + ranks.dp_rank) * micro
            loss = based_model.forward_loss(engine, {k: v[first : first + micro] for k, v in batch.items()})
            engine.backward(loss)
            engine.step()
            total += loss.detach().double() / accumulation
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
        history.append((total.item() / dp, float(engine.get_global_grad_norm())))
    unequal = training_engine.replicas_unequal(engine.module, int(tp)) if zero != "3" else 0
if ranks.rank == 0:
    with open(out, "w") as file:
        json.dump({"history": history, "unequal": unequal}, file)
state.destroy()
