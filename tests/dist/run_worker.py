"""Trains as launch/pretrain.py does and records every step: run_worker.py CONFIG OUT.json [STOP_AFTER] [FAULT]

OUT.json gets [step, loss, gradient norm] of each step. FAULT, from step 3 on: die_in_save (the process ends in the middle
of a save), disk_full_1 (rank 1 can write no file above 20 kB); nan (so is the loss of step 3).
"""

import json
import os
import resource
import sys
from pathlib import Path

from based_mp.config import load_config
from based_mp.errors import run_cli
from based_mp.parallel import state

config = load_config(sys.argv[1])
out = Path(sys.argv[2])
stop_after = int(sys.argv[3]) if len(sys.argv) > 3 else None
fault = sys.argv[4] if len(sys.argv) > 4 else "none"


def main():
    ranks = state.initialize(config.parallel.tensor_parallel_size, device="cpu", seed=config.training.seed)
    from based_mp.training import checkpoint, loop, micro_batch
    steps = []
    if fault == "nan":
        losses, calls = micro_batch.token_losses, []

        def broken(*args):
            calls.append(1)
            return losses(*args) * (float("nan") if len(calls) > 2 * trainer.accumulation else 1)
        micro_batch.token_losses = broken
    trainer = loop.Trainer(config, ranks)

    def record(step, loss, lr, norm):
        steps.append([step, loss, norm])
        if step == 3 and fault == "die_in_save":
            checkpoint.publish = lambda *args: os._exit(9)
        if step == 3 and fault == "disk_full_1" and ranks.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    trainer.metrics.log_step = record
    try:
        trainer.run(stop_after)
    finally:
        if ranks.rank == 0:
            out.write_text(json.dumps(steps))
        state.destroy()


run_cli(main)
