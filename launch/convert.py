#!/usr/bin/env python3
"""Convert checkpoints.

    python launch/convert.py reshard --checkpoint runs/a/checkpoints --output runs/b/checkpoints
        then start a run with checkpoint.dir=runs/b/checkpoints at any tensor- and data-parallel size
    python launch/convert.py export --checkpoint runs/a/checkpoints --output model.safetensors
    python launch/convert.py import --weights model.safetensors --config configs/based_360m.yaml --output runs/c
        weights in the names of the published BASED checkpoints
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from based_mp.errors import run_cli  # noqa: E402


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    reshard = commands.add_parser("reshard", help="make a training checkpoint loadable at any TP and DP size")
    reshard.add_argument("--checkpoint", required=True, help="a step_… folder, or a folder of them (the newest)")
    reshard.add_argument("--output", required=True, help="the checkpoint.dir of the new run")
    reshard.add_argument("--workers", type=int, default=1, help="processes that extract and merge")
    reshard.set_defaults(run=run_reshard)
    export = commands.add_parser("export", help="write the weights as safetensors in the published names")
    export.add_argument("--checkpoint", required=True, help="a step_… folder, or a folder of them (the newest)")
    export.add_argument("--output", required=True, help="the .safetensors file")
    export.set_defaults(run=run_export)
    importing = commands.add_parser("import", help="make a checkpoint from weights in the published names")
    importing.add_argument("--weights", required=True, help="the .safetensors file")
    importing.add_argument("--config", required=True, help="configuration of the model")
    importing.add_argument("--output", required=True, help="a checkpoint.dir to train or generate from")
    importing.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides of the config")
    importing.set_defaults(run=run_import)
    return parser.parse_args()


def run_export(arguments: argparse.Namespace) -> None:
    from based_mp.parallel import state
    state.initialize(device="cpu")
    from based_mp.export import export_safetensors
    from based_mp.inference.load import read_config
    from based_mp.model.based_model import build_model
    from based_mp.training.checkpoint import resolve
    try:
        config = read_config(resolve(arguments.checkpoint))
        parallel = config.parallel.model_copy(update={"tensor_parallel_size": 1})
        training = config.training.model_copy(update={"device": "cpu"})
        model = build_model(config.model_copy(update={"parallel": parallel, "training": training}))
        print(f"wrote {export_safetensors(arguments.checkpoint, arguments.output, model)}")
    finally:
        state.destroy()


def run_import(arguments: argparse.Namespace) -> None:
    from based_mp.config import load_config
    from based_mp.export import import_safetensors
    config = load_config(arguments.config, arguments.overrides)
    print(f"wrote {import_safetensors(arguments.weights, config, arguments.output)}")


def run_reshard(arguments: argparse.Namespace) -> None:
    from based_mp.parallel import state
    state.quiet_imports()
    from based_mp.training.reshard import reshard
    final = reshard(arguments.checkpoint, arguments.output, workers=arguments.workers)
    print(f"wrote {final}: start a run of any layout with checkpoint.dir={final.parent}")


def main() -> None:
    arguments = parse()
    arguments.run(arguments)


if __name__ == "__main__":
    run_cli(main)
