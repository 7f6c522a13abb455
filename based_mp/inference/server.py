"""An HTTP server with the OpenAI-compatible completions interface, over continuous batching.

The event loop takes requests and writes answers; one thread owns the engine. Every sequence has a state of the same
size, so a request runs as soon as a slot is free.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from based_mp.errors import UserError
from based_mp.inference.engine import Engine, Sequence
from based_mp.inference.generate import Completion, Continuation, Generator
from based_mp.inference.sampling import Sampling
from based_mp.inference.text import TextStream

# A piece of text costs Python about 0.1 ms, which the engine waits for: one stream gets every token as it comes, many
# get several at a time.
SECONDS_PER_STREAM = 0.0006
POLL_SECONDS = 0.25              # between looks whether a client that waits for its whole answer is still there


class StreamOptions(BaseModel):
    include_usage: bool = False


class CompletionRequest(BaseModel):
    """The body of POST /v1/completions. top_k goes beyond OpenAI's interface; fields that are not here are refused."""

    model_config = ConfigDict(extra="forbid")

    model: str
    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int = Field(16, ge=1)
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    n: int = Field(1, ge=1, le=128)
    seed: int | None = Field(None, ge=-(2**62), lt=2**62)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: int | None = Field(None, ge=0)
    user: str | None = None
    # Known, and only taken at the value that changes nothing.
    echo: bool = False
    suffix: str | None = None
    best_of: int | None = None
    presence_penalty: float = 0
    frequency_penalty: float = 0
    logit_bias: dict[str, float] | None = None

    def refusal(self) -> tuple[str, str] | None:
        """(field, what to change) of the first thing that is not offered."""
        offered = {
            "echo": (not self.echo, "the prompt is not repeated: set echo to false"),
            "suffix": (not self.suffix, "text is only continued at its end: leave suffix out"),
            "best_of": (self.best_of in (None, self.n), "candidates are not ranked: leave best_of out"),
            "presence_penalty": (self.presence_penalty == 0, "penalties are not offered: leave presence_penalty out"),
            "frequency_penalty": (self.frequency_penalty == 0, "penalties are not offered: leave it out"),
            "logit_bias": (not self.logit_bias, "logits are not biased: leave logit_bias out"),
            "logprobs": (self.logprobs is None or (self.logprobs == 0 and not self.stream),
                         "only the chosen tokens' log probabilities are given, without stream: set logprobs to 0"),
            "prompt": (self.prompt != [], "give at least one prompt"),
            "stop": (all(self.stops), "a stop string is empty: leave it out"),
            "stream_options": (self.stream or self.stream_options is None, "stream_options need stream: true"),
        }
        return next(((field, text) for field, (fine, text) in offered.items() if not fine), None)

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        one = isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int))
        return [self.prompt] if one else self.prompt


class Refused(Exception):
    """An answer in OpenAI's form of an error."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        kind = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}.get(status, "invalid_request_error")
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": None}}


@dataclass(eq=False)
class Job:
    """One choice of a request. events: shared by its choices; an exception among them means that the engine failed."""

    index: int
    run: Continuation
    events: asyncio.Queue
    streams: bool                # text is wanted while it runs
    text: str = ""               # final, and not yet sent
    due: float = 0.0             # when what has come is to be sent


class Scheduler:
    """The thread that owns the engine. `submit` and `cancel` are called on the event loop, and so are deliveries."""

    def __init__(self, engine: Engine, limit: int) -> None:
        self.engine, self.limit = engine, limit
        self.pending: set[Job] = set()                 # accepted and not ended, on the event loop's side
        self.failure: BaseException | None = None
        self._jobs: dict[int, Job] = {}                # by id of the sequence, on the thread's side
        self._commands: list[tuple[str, Job]] = []
        self._wake, self._stopping = threading.Condition(), False
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, jobs: list[Job]) -> None:
        if self.failure is not None:
            raise Refused(503, f"the engine has stopped ({self.failure}): restart the server")
        if len(self.pending) + len(jobs) > self.limit:
            raise Refused(429, f"{len(self.pending)} sequences are running or waiting, and at most {self.limit} may: "
                               "try again later")
        self.pending.update(jobs)
        self._tell("submit", jobs)

    def cancel(self, jobs: list[Job]) -> None:
        """End what has not ended."""
        open_jobs = [job for job in jobs if job in self.pending]
        self.pending.difference_update(open_jobs)
        self._tell("cancel", open_jobs)

    async def stop(self) -> None:
        """Finish what was accepted, then end the thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)

    def _tell(self, what: str, jobs: list[Job]) -> None:
        with self._wake:
            self._commands += [(what, job) for job in jobs]
            self._wake.notify()

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    while not self._commands and self.engine.idle and not self._stopping:
                        self._wake.wait()
                    if not self._commands and self.engine.idle:
                        return
                    commands, self._commands = self._commands, []
                for what, job in commands:
                    self._obey(what, job)
                events = list(self._step())
                if events:
                    self._loop.call_soon_threadsafe(self._deliver, events)
        except BaseException as error:                 # whatever it is, the clients must hear of it
            self._loop.call_soon_threadsafe(self._fail, error)
            raise

    def _obey(self, what: str, job: Job) -> None:
        sequence = job.run.sequence
        if what == "submit":
            self._jobs[id(sequence)] = job
            self.engine.submit(sequence)
        elif self._jobs.pop(id(sequence), None):
            self.engine.release(sequence, "cancelled")

    def _step(self) -> Iterator[tuple[Job, str, Completion | None]]:
        now = time.monotonic()
        jobs = [self._jobs[id(sequence)] for sequence in self.engine.step()]
        pause = SECONDS_PER_STREAM * sum(job.streams for job in jobs)
        for job in jobs:
            sequence, due = job.run.sequence, job.streams and now >= job.due
            if not (due or job.run.text.stop or sequence.finish_reason is not None):
                continue
            job.text += job.run.advance(self.engine)
            if sequence.finish_reason is not None:
                del self._jobs[id(sequence)]
                yield job, job.text, job.run.completion
            elif due and job.text:
                yield job, job.text, None
                job.text, job.due = "", now + pause

    def _deliver(self, events: list[tuple[Job, str, Completion | None]]) -> None:
        for job, text, completion in events:
            if completion is not None:
                self.pending.discard(job)
            job.events.put_nowait((job, text, completion))

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        for job in self.pending:
            job.events.put_nowait(error)
        self.pending.clear()


class Service:
    """What the routes share. length: most tokens of a sequence; waiting: sequences that may queue for a slot."""

    def __init__(self, generator: Generator, name: str, *, slots: int, length: int, waiting: int) -> None:
        self.generator, self.name, self.slots, self.length, self.waiting = generator, name, slots, length, waiting
        self.created = int(time.time())
        self.scheduler: Scheduler | None = None

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """The engine lives as long as the server; at the end it finishes what was accepted."""
        engine = self.generator.new_engine(self.slots, self.length)
        self.scheduler = Scheduler(engine, self.slots + self.waiting)
        yield
        await self.scheduler.stop()

    def jobs(self, body: CompletionRequest) -> list[Job]:
        """The sequences of a request. Raises Refused or UserError for what cannot be done."""
        if body.model != self.name:
            raise Refused(404, f"there is no model {body.model!r}: this server has {self.name!r}", "model")
        if (refusal := body.refusal()) is not None:
            raise Refused(400, refusal[1], refusal[0])
        seed = secrets.randbits(62) if body.seed is None else body.seed
        events: asyncio.Queue = asyncio.Queue()
        jobs = []
        for prompt in (p for p in body.prompts for _ in range(body.n)):
            ids = self.generator.encode(prompt)
            if len(ids) + body.max_tokens > self.length:
                raise Refused(400, f"the prompt has {len(ids)} tokens, which with max_tokens {body.max_tokens} is more "
                                   f"than {self.length}: shorten one of them", "max_tokens")
            sampling = Sampling(body.max_tokens, body.temperature, body.top_k, body.top_p, seed + len(jobs))
            sequence = Sequence(ids, sampling)
            run = Continuation(sequence, TextStream(self.generator.tokenizer, ids, body.stops))
            jobs.append(Job(len(jobs), run, events, body.stream))
        return jobs


def create_app(service: Service) -> FastAPI:
    """GET /health, GET /v1/models, POST /v1/completions; interactive documentation under /docs."""
    app = FastAPI(title="based_mp", lifespan=service.lifespan)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][1:] if isinstance(part, str) and part.islower())
        return answer(Refused(400, f"{field or 'the body'}: {first['msg']}", field or None))

    @app.exception_handler(UserError)
    async def unusable(request: Request, error: UserError) -> JSONResponse:
        return answer(Refused(400, str(error)))

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return answer(error)

    @app.get("/health")
    async def health() -> JSONResponse:
        scheduler = service.scheduler
        if scheduler.failure is not None:
            raise Refused(503, f"the engine has stopped ({scheduler.failure}): restart the server")
        return JSONResponse({"status": "ok", "slots": service.slots, "free_slots": len(scheduler.engine.free),
                             "accepted": len(scheduler.pending), "limit": scheduler.limit})

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [{"id": service.name, "object": "model", "created": service.created,
                                            "owned_by": "based_mp"}]}

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> dict | StreamingResponse:
        jobs = service.jobs(body)
        service.scheduler.submit(jobs)
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()),
                "model": service.name}
        if body.stream:
            return StreamingResponse(stream(service, jobs, body, head), media_type="text/event-stream")
        return await whole(service, jobs, body, request, head)

    return app


def new_server(service: Service, host: str, port: int, *, log_level: str = "info") -> uvicorn.Server:
    """A server whose `run` serves until SIGTERM or Ctrl-C. port 0: a free one, `port_of` says which."""
    return uvicorn.Server(uvicorn.Config(create_app(service), host=host, port=port, log_level=log_level))


def port_of(server: uvicorn.Server) -> int:
    """Where a server that has started listens."""
    return server.servers[0].sockets[0].getsockname()[1]


def answer(error: Refused) -> JSONResponse:
    return JSONResponse(error.body, error.status, headers={"Retry-After": "1"} if error.status == 429 else None)


async def whole(service: Service, jobs: list[Job], body: CompletionRequest, request: Request, head: dict) -> dict:
    """All choices in one answer; what a client that has left was waiting for is cancelled."""
    done: dict[int, Completion] = {}
    try:
        while len(done) < len(jobs):
            try:
                event = await asyncio.wait_for(jobs[0].events.get(), POLL_SECONDS)
            except TimeoutError:
                if await request.is_disconnected():
                    raise Refused(499, "the client has left") from None
                continue
            job, _, completion = opened(event)
            if completion is not None:
                done[job.index] = completion
    finally:
        service.scheduler.cancel(jobs)
    choices = [choice(i, done[i].text, done[i]) for i in range(len(jobs))]
    if body.logprobs is not None:
        for entry in choices:
            tokens = [service.generator.tokenizer.decode([token]) for token in done[entry["index"]].tokens]
            entry["logprobs"] = {"tokens": tokens, "token_logprobs": done[entry["index"]].logprobs,
                                 "top_logprobs": None, "text_offset": None}
    return head | {"choices": choices, "usage": usage(jobs, body.n)}


async def stream(service: Service, jobs: list[Job], body: CompletionRequest, head: dict) -> AsyncIterator[str]:
    """Server-sent events, a piece of text of one choice in each. A client that leaves ends the generator."""
    left = len(jobs)
    try:
        while left:
            job, text, completion = opened(await jobs[0].events.get())
            left -= completion is not None
            yield sse(head | {"choices": [choice(job.index, text, completion)]})
        if body.stream_options is not None and body.stream_options.include_usage:
            yield sse(head | {"choices": [], "usage": usage(jobs, body.n)})
        yield "data: [DONE]\n\n"
    except Refused as error:
        yield sse(error.body)
    finally:
        service.scheduler.cancel(jobs)


def sse(body: dict) -> str:
    return f"data: {json.dumps(body)}\n\n"               # ASCII: many clients split lines at U+0085 and U+2028 too


def opened(event: tuple | BaseException) -> tuple[Job, str, Completion | None]:
    if isinstance(event, BaseException):
        raise Refused(500, f"the engine has stopped ({event}): restart the server")
    return event


def choice(index: int, text: str, completion: Completion | None) -> dict:
    """An entry of `choices`; finish_reason "stop" stands for the end of the document too."""
    reason = None if completion is None else {"eod": "stop"}.get(completion.finish_reason, completion.finish_reason)
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}


def usage(jobs: list[Job], n: int) -> dict[str, int]:
    prompt = sum(len(job.run.sequence.prompt) for job in jobs[::n])
    new = sum(len(job.run.sequence.tokens) for job in jobs)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
