#!/usr/bin/env python3
"""Generate text from a training checkpoint.

    python launch/generate.py --checkpoint runs/smoke_cpu/checkpoints --prompt "def " --max-new-tokens 64

Tensor parallel: torchrun --nproc_per_node 2 launch/generate.py --tensor-parallel-size 2 …
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from based_mp.errors import UserError, run_cli  # noqa: E402


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a step_… folder, or a folder of them (the newest)")
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times")
    parser.add_argument("--prompt-file", type=Path, help="a prompt a line")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt; prompt i takes seed + i")
    parser.add_argument("--stop", action="append", default=[], help="end before this text; may be given several times")
    parser.add_argument("--json", action="store_true", help="one JSON object a prompt instead of text")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    a = parse()
    prompts = list(a.prompt)
    if a.prompt_file is not None:
        try:
            prompts += a.prompt_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the prompts in {a.prompt_file}: {error}") from error
    if not prompts:
        raise UserError("no prompt: give --prompt or --prompt-file")
    from based_mp.parallel import state
    ranks = state.initialize(a.tensor_parallel_size, device=a.device)
    from based_mp.inference.generate import Generator
    try:
        generator = Generator.from_checkpoint(a.checkpoint, ranks)
        options = {"max_new_tokens": a.max_new_tokens, "temperature": a.temperature, "top_k": a.top_k,
                   "top_p": a.top_p, "seed": a.seed, "stop": a.stop}
        say = print if ranks.rank == 0 else lambda *args, **kwargs: None
        if len(prompts) == 1 and not a.json:                      # text as it comes
            say(prompts[0], end="", flush=True)
            for piece in generator.stream(prompts, **options):
                say(piece.text, end="", flush=True)
            say()
            return
        for prompt, completion in zip(prompts, generator.generate(prompts, **options), strict=True):
            record = {"prompt": prompt, **dataclasses.asdict(completion)}
            say(json.dumps(record, ensure_ascii=False) if a.json else prompt + completion.text)
    finally:
        state.destroy()


if __name__ == "__main__":
    run_cli(main)
