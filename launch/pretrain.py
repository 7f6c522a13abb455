#!/usr/bin/env python3
"""Pretrain a BASED language model (or its attention baseline).

    deepspeed launch/pretrain.py --config configs/based_360m.yaml [section.key=value …]

Also under torchrun, mpirun and srun, or directly as one process.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from based_mp.config import Config, help_text, load_config  # noqa: E402
from based_mp.errors import UserError, run_cli  # noqa: E402


def parse() -> tuple[Config, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, epilog=help_text(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file, such as configs/based_360m.yaml")
    parser.add_argument("--dry-run", action="store_true",
                        help="print parameters, FLOPs, memory and time, and start nothing")
    parser.add_argument("--world-size", type=int, default=None, help="with --dry-run: the number of GPUs")
    parser.add_argument("--tokens", type=float, default=10e9, help="with --dry-run: tokens to train on")
    parser.add_argument("--mfu", type=float, default=0.4, help="with --dry-run: assumed MFU")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)     # added by deepspeed
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides of the config")
    arguments = parser.parse_intermixed_args()
    if arguments.world_size is not None and not arguments.dry_run:
        raise UserError("--world-size goes with --dry-run: the launcher sets the number of processes")
    for name, most in (("world_size", math.inf), ("tokens", 1e18), ("mfu", 1)):
        value = getattr(arguments, name)
        if value is not None and not 0 < value <= most:
            raise UserError(f"--{name.replace('_', '-')} {value}: give a number above 0" + ", at most 1" * (most == 1))
    return load_config(arguments.config, arguments.overrides), arguments


def main() -> None:
    config, arguments = parse()
    if config.model.kernels == "fla":
        from based_mp.ops.backends import check_kernels
        check_kernels(config.model.kernels)
    if arguments.dry_run:
        from based_mp.estimate import estimate_text
        print(estimate_text(config, arguments.world_size or config.parallel.tensor_parallel_size,
                            arguments.tokens, arguments.mfu))
        return
    if config.training.fp8 == "none":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":0:0")     # which it would zero before most products
    from based_mp.parallel import state
    world = state.launcher_env()[1]
    config.check_world(world)
    ranks = state.initialize(config.parallel.tensor_parallel_size, device=config.training.device,
                             seed=config.training.seed)
    from based_mp.training.loop import Trainer
    try:
        Trainer(config, ranks).run()
    finally:
        state.destroy()


if __name__ == "__main__":
    run_cli(main)
