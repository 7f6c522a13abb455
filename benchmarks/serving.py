"""Speed of the completions server as clients on the same machine see it, beside the engine alone.

    python benchmarks/serving.py [--config based_1.3b_window64] [--clients 96] [--slots 64] [--json FILE]

Random weights, temperature 0.8, prompts of 16 to 100 token ids, answers of 16 to 64 tokens. Clients in a process of
their own send one request after the other over a connection each, first for whole answers, then for streams. Every
answer must have all its tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PROMPTS, ANSWERS, LENGTH = range(16, 101), range(16, 65), 192     # tokens; the most of both


def request_of(i: int) -> tuple[list[int], int]:
    """(prompt, tokens of the answer) of request number i."""
    prompt = [(i * 131 + j) % 50000 for j in range(PROMPTS[i % len(PROMPTS)])]
    return prompt, ANSWERS[i % len(ANSWERS)]


async def read_answer(reader: asyncio.StreamReader) -> tuple[float, bytes]:
    """When the first byte of an answer's body came, and the answer."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
    if length:
        return time.perf_counter(), head + await reader.readexactly(int(length[1]))
    first, body = 0.0, []
    while size := int(await reader.readline(), 16):                  # in chunks
        first = first or time.perf_counter()
        body.append(await reader.readexactly(size + 2))
    await reader.readexactly(2)
    return first, head + b"".join(body)


async def ask(connection: tuple[asyncio.StreamReader, asyncio.StreamWriter], i: int,
              stream: bool) -> tuple[float, float, int, int]:
    """Seconds to the first byte of the answer and to its end, its tokens and the events that brought them."""
    prompt, new = request_of(i)
    body = {"model": "m", "prompt": prompt, "max_tokens": new, "temperature": 0.8, "seed": i, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    content, (reader, writer), start = json.dumps(body).encode(), connection, time.perf_counter()
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                 b"Content-Length: %d\r\n\r\n" % len(content) + content)
    first, data = await read_answer(reader)
    tokens = int(re.search(rb'"completion_tokens": ?(\d+)', data)[1])
    if not data.startswith(b"HTTP/1.1 200") or tokens != new:
        raise SystemExit(f"error: request {i} got {tokens} tokens, not {new}: {data[:300]!r}")
    return first - start, time.perf_counter() - start, tokens, data.count(b"data: ")


async def load(port: int, clients: int, requests: int, stream: bool) -> dict[str, float]:
    numbers, answers = iter(range(requests)), []

    async def client() -> None:
        connection = await asyncio.open_connection("127.0.0.1", port)
        for i in numbers:
            answers.append(await ask(connection, i, stream))
        connection[1].close()

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - start
    first, whole, tokens, events = zip(*answers, strict=True)
    result = {"requests_per_s": requests / seconds, "tokens_per_ms": sum(tokens) / seconds / 1e3,
              "answer_ms": statistics.median(whole) * 1e3}
    if stream:
        result |= {"first_byte_ms": statistics.median(first) * 1e3, "tokens_per_event": sum(tokens) / sum(events)}
    return result


class Words:
    """A tokenizer with a word of letters for every id, decoded by the library that real ones are decoded by."""

    eod = -1

    def __init__(self, vocab_size: int) -> None:
        from tokenizers import Tokenizer, models
        self.vocab_size = vocab_size
        self._tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)


def serve(model, slots: int, clients: int, requests: int) -> dict[str, object]:
    """Serve as launch/serve.py does, and what the clients found."""
    from based_mp.inference.generate import Generator
    from based_mp.inference.server import Service, new_server, port_of
    generator, result = Generator(model, Words(model.config.vocab_size)), {}
    server = new_server(Service(generator, "m", slots=slots, length=LENGTH, waiting=2 * clients), "127.0.0.1", 0)

    def drive() -> None:
        try:
            while not server.started:
                time.sleep(0.05)
            for kind in ("whole", "whole", "streamed", "streamed"):         # the first of each captures graphs
                command = [sys.executable, __file__, "--client", *map(str, (port_of(server), kind, clients, requests))]
                result[kind] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        finally:
            server.should_exit = True

    driver = threading.Thread(target=drive)
    driver.start()
    server.run()
    driver.join()
    if "streamed" not in result:
        raise SystemExit("error: the clients failed, as said above")
    return result


def main() -> None:
    if sys.argv[1:2] == ["--client"]:
        port, kind, clients, requests = sys.argv[2:]
        print(json.dumps(asyncio.run(load(int(port), int(clients), int(requests), kind == "streamed"))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="based_1.3b_window64", help="of configs/")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--clients", type=int, default=96)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--json", help="append the record to this file, one line a run")
    parser.add_argument("--commit", help="commit to record (default: git's)")
    args = parser.parse_args()
    import torch

    from based_mp.parallel import state
    from benchmarks import generation
    from benchmarks.record import append, git_commit
    if not torch.cuda.is_available():
        raise SystemExit("error: needs a GPU")
    state.initialize(device="cuda")
    _, model, _ = generation.load(args.config)
    record = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "commit": args.commit or git_commit(),
              "configuration": args.config, "slots": args.slots, "clients": args.clients, "requests": args.requests,
              "engine_tokens_per_ms": generation.serving(model, args.slots, args.requests)["tokens_per_ms"]}
    record |= serve(model, args.slots, args.clients, args.requests)
    print(json.dumps(record, indent=1))
    append(record, args.json)
    state.destroy()


if __name__ == "__main__":
    main()
