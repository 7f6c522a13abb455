#!/usr/bin/env python3
"""Serve a training checkpoint over HTTP, with OpenAI's completions interface, on one device.

    python launch/serve.py --checkpoint runs/smoke_cpu/checkpoints --port 8000
    curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
      -d '{"model": "based", "prompt": "def ", "max_tokens": 32}'

SIGTERM and Ctrl-C finish the requests that were accepted, and end.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from based_mp.errors import UserError, run_cli  # noqa: E402


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a step_… folder, or a folder of them (the newest)")
    parser.add_argument("--model-name", default="based", help="what clients call the model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--slots", type=int, default=64, help="sequences that run at once")
    parser.add_argument("--max-waiting", type=int, default=256, help="sequences that may queue for a slot; then 429")
    parser.add_argument("--max-length", type=int, default=8192, help="tokens of a prompt and its continuation")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    return parser.parse_args()


def main() -> None:
    a = parse()
    for name in ("slots", "max_length"):
        if getattr(a, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(a, name)}: give at least 1")
    for package in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{package} is not installed: pip install '.[serve]'")
    from based_mp.parallel import state
    ranks = state.initialize(device=a.device)
    from based_mp.inference.generate import Generator
    from based_mp.inference.server import Service, new_server
    try:
        generator = Generator.from_checkpoint(a.checkpoint, ranks)
        service = Service(generator, a.model_name, slots=a.slots, length=a.max_length, waiting=a.max_waiting)
        new_server(service, a.host, a.port).run()
    finally:
        state.destroy()


if __name__ == "__main__":
    run_cli(main)
