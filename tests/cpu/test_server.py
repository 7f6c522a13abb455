"""The completions server: its answers, bad requests, overload, clients that leave, the end."""

import asyncio
import json

import pytest

for package in ("fastapi", "uvicorn", "httpx"):
    pytest.importorskip(package)

import httpx  # noqa: E402

from based_mp.inference.server import Service  # noqa: E402
from benchmarks import serve_load  # noqa: E402
from tests.models import tiny_generator  # noqa: E402


@pytest.fixture(scope="module")
def generator():
    from based_mp.parallel import state
    yield tiny_generator()
    state.destroy()


def with_client(generator, test, **options):
    """Run `test(client, service)` against a server."""
    async def run():
        service = Service(generator, "tiny", **({"slots": 4, "length": 128, "waiting": 8} | options))
        async with serve_load.serving(service) as address, httpx.AsyncClient(base_url=address, timeout=30) as client:
            await test(client, service)
    asyncio.run(run())


def test_mixed_load_leaks_and_mixes_nothing(generator):
    counts, choices, memory = asyncio.run(serve_load.load(
        Service(generator, "tiny", slots=8, length=128, waiting=400), 400, 24))
    assert counts["done"] > 150 and counts["bad"] > 20 and counts["left"] > 10, counts
    assert max(memory[5:]) - memory[4] < 40 * 2**20, memory
    assert serve_load.same_alone(generator, choices) == 1
    told = serve_load.differences(generator, choices)
    assert len(told) > 60 and max(told) < serve_load.TOLERANCE["cpu"]


@pytest.mark.parametrize("body, status", serve_load.BAD)
def test_bad_requests_are_told_why(generator, body, status):
    async def test(client, service):
        response = await client.post("/v1/completions", json={"model": "tiny"} | body)
        error = response.json()["error"]
        assert response.status_code == status and error["type"] == "invalid_request_error" and error["message"]
        response = await client.post("/v1/completions", content=b"{not json")
        assert response.status_code == 400 and "error" in response.json()
    with_client(generator, test)


def test_answers(generator):
    async def test(client, service):
        models = (await client.get("/v1/models")).json()
        assert [m["id"] for m in models["data"]] == ["tiny"]
        body = {"model": "tiny", "prompt": ["abc", "x"], "max_tokens": 7, "n": 2, "seed": 5, "logprobs": 0}
        answer = (await client.post("/v1/completions", json=body)).json()
        expected = generator.generate(["abc", "abc", "x", "x"], max_new_tokens=7, temperature=1.0, seed=5)
        assert [c["text"] for c in answer["choices"]] == [c.text for c in expected]
        assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
        assert all(len(c["logprobs"]["token_logprobs"]) == len(c["logprobs"]["tokens"]) for c in answer["choices"])
        new = sum(len(c.tokens) for c in expected)
        assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": new, "total_tokens": 4 + new}
        reasons = {"eod": "stop", "length": "length"}
        assert [c["finish_reason"] for c in answer["choices"]] == [reasons[c.finish_reason] for c in expected]
        body = {"model": "tiny", "prompt": [65, 66], "seed": 5, "stream": True,
                "stream_options": {"include_usage": True}}
        response = await client.post("/v1/completions", json=body)
        lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
        assert response.headers["content-type"].startswith("text/event-stream") and lines[-1] == "[DONE]"
        events = [json.loads(line) for line in lines[:-1]]
        assert events[-1]["usage"]["prompt_tokens"] == 2 and events[-1]["choices"] == []
        [alone] = generator.generate(["ab"], max_new_tokens=16, temperature=1.0, seed=5)
        assert "".join(e["choices"][0]["text"] for e in events[:-1]) == alone.text
        assert events[-2]["choices"][0]["finish_reason"] == reasons[alone.finish_reason]
    with_client(generator, test)


@pytest.mark.parametrize("seconds, most", [(0.0, 29), (100.0, 2)])
def test_streams_get_several_tokens_at_a_time_where_there_are_many(generator, monkeypatch, seconds, most):
    """The first tokens, two in the first step, come at once, and so does the end."""
    monkeypatch.setattr("based_mp.inference.server.SECONDS_PER_STREAM", seconds)

    async def test(client, service):
        body = {"model": "tiny", "prompt": "abc", "max_tokens": 30, "temperature": 0, "stream": True}
        lines = [line async for line in (await client.post("/v1/completions", json=body)).aiter_lines() if line]
        pieces = [json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines[:-1]]
        [alone] = generator.generate(["abc"], max_new_tokens=30)
        assert "".join(pieces) == alone.text and len(alone.text) == 30
        assert len(pieces) == most and len(pieces[0]) == 2
    with_client(generator, test)


def test_overload_is_refused_and_a_client_that_leaves_frees_its_slot(generator):
    async def test(client, service):
        long = {"model": "tiny", "prompt": "a", "max_tokens": 120, "n": 3, "stream": True, "temperature": 0}
        async with client.stream("POST", "/v1/completions", json=long) as first:
            await anext(first.aiter_lines())
            response = await client.post("/v1/completions", json=long | {"stream": False})
            assert response.status_code == 429 and "try again" in response.json()["error"]["message"]
        for _ in range(100):
            health = (await client.get("/health")).json()
            if health["accepted"] == 0 and health["free_slots"] == 2:
                break
            await asyncio.sleep(0.02)
        assert health["accepted"] == 0 and health["free_slots"] == 2, health
    with_client(generator, test, slots=2, waiting=2)


def test_what_was_accepted_is_finished_at_the_end(generator):
    done = []

    async def test(client, service):
        body = {"model": "tiny", "prompt": "a", "max_tokens": 100}
        task = asyncio.create_task(client.post("/v1/completions", json=body))
        while not service.scheduler.pending:
            await asyncio.sleep(0.005)
        done.append(task)
        stop = asyncio.create_task(service.scheduler.stop())           # what the server does when it is told to end
        assert (await task).json()["choices"][0]["finish_reason"] in ("length", "stop")
        await stop
    with_client(generator, test)
    assert done[0].result().status_code == 200


def test_a_failed_engine_is_reported(generator):
    async def test(client, service):
        def fail():
            raise RuntimeError("out of memory")
        service.scheduler.engine.step = fail
        response = await client.post("/v1/completions", json={"model": "tiny", "prompt": "a"})
        assert response.status_code == 500 and "out of memory" in response.json()["error"]["message"]
        assert (await client.get("/health")).status_code == 503
        again = await client.post("/v1/completions", json={"model": "tiny", "prompt": "a"})
        assert again.status_code == 503
    with_client(generator, test)
