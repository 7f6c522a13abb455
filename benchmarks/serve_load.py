"""Many mixed requests against a completions server: whole and streamed, cancelled, and bad.

    python benchmarks/serve_load.py --requests 10000 [--concurrency 32] [--device cuda]

Serves a tiny random model from this process, on a free loopback port. Every text is compared with what the model says
alone. On the CPU they are the same; on a GPU products round differently beside other rows, which turns near ties: there
the log probabilities of all tokens of the answers that were not streamed are compared with the model's own for the same
text. At the end all slots must be free and memory must not have grown. tests/cpu/test_server.py runs a few hundred.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import time
from pathlib import Path

import httpx
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from based_mp.inference.generate import Generator
from based_mp.inference.server import Service, new_server, port_of

TOLERANCE = {"cpu": 1e-3, "cuda": 0.25}      # of a log probability: fp32, bf16; another prompt's differ by more than 1

BAD = [({"prompt": "a", "model": "other"}, 404), ({"prompt": "a", "max_tokens": 0}, 400), ({}, 400),
       ({"prompt": "a", "echo": True}, 400), ({"prompt": "a" * 500}, 400), ({"prompt": [5, 99999]}, 400),
       ({"prompt": "a", "temperature": "hot"}, 400), ({"prompt": "a", "presence_penalty": 1}, 400),
       ({"prompt": "a", "unheard_of": 1}, 400), ({"prompt": []}, 400), ({"prompt": "a", "stop": ""}, 400)]


@contextlib.asynccontextmanager
async def serving(service: Service):
    """The address of a server that runs on this event loop."""
    server = new_server(service, "127.0.0.1", 0, log_level="error")
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port_of(server)}"
    finally:
        server.should_exit = True
        await task


def request_of(i: int) -> dict:
    """Request number i: of few kinds, so that the lone runs stay few, and all lengths."""
    pick = random.Random(i)
    return {"model": "tiny", "prompt": "".join(pick.choice("abcdefgh ") for _ in range(pick.choice([0, 1, 3, 10, 40]))),
            "max_tokens": pick.choice([1, 2, 5, 12, 30]), "temperature": pick.choice([0.0, 0.8, 1.2]),
            "top_p": pick.choice([1.0, 0.9]), "seed": pick.randrange(1000), "n": pick.choice([1, 1, 1, 3]),
            "stop": pick.choice([None, None, "e", ["ab", "xyz"]])} | pick.choice([{"stream": True}, {"logprobs": 0}])


async def one(client: httpx.AsyncClient, i: int) -> tuple[str, list[dict]]:
    """What came of request i: "done" with its choices, "left", "bad" or "busy". A wrong answer is an AssertionError."""
    pick = random.Random(-i - 1)
    if pick.random() < 0.1:
        body, status = pick.choice(BAD)
        response = await client.post("/v1/completions", json={"model": "tiny"} | body)
        assert response.status_code in (status, 429), (body, response.status_code, response.text)
        assert response.json()["error"]["message"]
        return "bad", []
    body, leaves = request_of(i), pick.random() < 0.15
    if "stream" not in body:
        call = client.post("/v1/completions", json=body)
        try:
            response = await (asyncio.wait_for(call, pick.random() * 0.05) if leaves else call)
        except TimeoutError:
            return "left", []
        if response.status_code == 429:
            return "busy", []
        assert response.status_code == 200, response.text
        return "done", response.json()["choices"]
    choices = [{"text": ""} for _ in range(body["n"])]
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code == 429:
            return "busy", []
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if leaves and pick.random() < 0.2:
                return "left", []
            if line == "data: [DONE]":
                return "done", choices
            if line:
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    choices[choice["index"]]["text"] += choice["text"]
    raise AssertionError("the stream ended without [DONE]")


async def load(service: Service, requests: int,
               concurrency: int) -> tuple[dict[str, int], dict[int, list[dict]], list[int]]:
    """(outcomes, choices by request, resident bytes after each tenth). Raises AssertionError for a leak."""
    counts, choices, memory, process = {}, {}, [], psutil.Process()
    numbers = iter(range(requests))

    async def worker(client: httpx.AsyncClient) -> None:
        for i in numbers:
            outcome, said = await one(client, i)
            counts[outcome] = counts.get(outcome, 0) + 1
            if outcome == "done":
                choices[i] = said
            if i % max(1, requests // 10) == 0:
                memory.append(process.memory_info().rss)

    async with serving(service) as address:
        async with httpx.AsyncClient(base_url=address, timeout=60) as client:
            await asyncio.gather(*(worker(client) for _ in range(concurrency)))
            end = time.monotonic() + 10
            while (health := (await client.get("/health")).json())["accepted"] or \
                    health["free_slots"] != health["slots"]:
                assert time.monotonic() < end, f"slots are not free again: {health}"
                await asyncio.sleep(0.05)
    scheduler = service.scheduler
    assert not scheduler._jobs and not scheduler.pending and scheduler.engine.idle and scheduler.failure is None
    return counts, choices, memory


def same_alone(generator: Generator, choices: dict[int, list[dict]]) -> float:
    """The share of the answers that equal those of their own runs."""
    same = 0
    for i, said in choices.items():
        body = request_of(i)
        stop = [body["stop"]] if isinstance(body["stop"], str) else body["stop"]
        alone = generator.generate([body["prompt"]] * body["n"], max_new_tokens=body["max_tokens"],
                                   temperature=body["temperature"], top_p=body["top_p"], seed=body["seed"], stop=stop)
        same += [c.text for c in alone] == [c["text"] for c in said]
    return same / max(len(choices), 1)


@torch.no_grad()
def differences(generator: Generator, choices: dict[int, list[dict]]) -> list[float]:
    """Of every answer with log probabilities: the largest difference of one from the model's own for the same text."""
    model, tokenizer, found = generator.model, generator.tokenizer, []
    pool = model.new_pool(1, 128)
    for i, said in choices.items():
        prompt = tokenizer.encode(request_of(i)["prompt"]) or [tokenizer.eod]
        for told in (c["logprobs"] for c in said if c.get("logprobs") and c["logprobs"]["tokens"]):
            tokens = tokenizer.encode("".join(told["tokens"]))
            logits = model.prefill(pool, [prompt + tokens[:-1]], [0], [0], every=True)[-len(tokens) :]
            own = logits[:, : model.config.vocab_size].float().log_softmax(-1)
            own = own.gather(-1, torch.tensor(tokens, device=own.device)[:, None])[:, 0].tolist()
            found.append(max(abs(a - b) for a, b in zip(own, told["token_logprobs"], strict=True)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10000)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    from tests.models import tiny_generator
    generator = tiny_generator(args.device)
    start = time.monotonic()
    counts, choices, memory = asyncio.run(load(Service(generator, "tiny", slots=8, length=128, waiting=40),
                                               args.requests, args.concurrency))
    print(f"{args.requests} requests in {time.monotonic() - start:.0f} s: {counts}")
    print("resident MiB:", [round(m / 2**20) for m in memory])
    same, told = same_alone(generator, choices), differences(generator, choices)
    worst = max(told, default=0.0)                                       # of a few requests none may tell
    print(f"{same:.2%} of {len(choices)} answers equal their lone runs; log probabilities of {len(told)} lie within "
          f"{worst:.1e} of the model's own; all slots are free")
    if worst > TOLERANCE[args.device] or same < 1 and args.device == "cpu":
        raise SystemExit("error: answers depend on the other requests")


if __name__ == "__main__":
    main()
