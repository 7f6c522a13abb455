"""Continuous batching: sequences come and go, every step advances all that run by one token."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from based_mp.errors import UserError
from based_mp.inference.cuda_graph import Decoder, Prefiller
from based_mp.inference.model import InferenceModel
from based_mp.inference.sampling import Sampling
from based_mp.inference.state import LAG, SequenceState, StatePool, to_device

# A pass over prompts makes all that run wait, and takes hardly longer for several prompts than for one. While more
# sequences wait than there are free slots, it is made once a share of the slots is free, or after some steps.
ADMIT_SHARE, PATIENCE = 1 / 8, 8


@dataclass(eq=False)
class Sequence:
    """One continuation. prompt: token ids, after those of `state` where there is one.

    tokens, logprobs: what has come out; finish_reason: "eod", "length", or what `Engine.release` was given.
    """

    prompt: list[int]
    sampling: Sampling
    state: SequenceState | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    slot: int | None = None
    launched: int = 0

    @property
    def start(self) -> int:
        """Tokens seen when the first one is chosen; an empty prompt starts a document."""
        return self.state.position + len(self.prompt) if self.state else max(1, len(self.prompt))


@dataclass
class _Launched:
    """A step whose results are on their way to the host."""

    sequences: list[Sequence]
    slots: list[int]
    positions: list[int]
    ready: torch.cuda.Event | None


def _leaders(sequences: list[Sequence]) -> list[int]:
    """For each sequence the first one with its state and prompt."""
    alike: dict[tuple, list[int]] = {}                 # long prompts are compared only where their ends are the same
    leaders = []
    for i, sequence in enumerate(sequences):
        seen = alike.setdefault((id(sequence.state), len(sequence.prompt), *sequence.prompt[-16:]), [])
        leader = next((j for j in seen if sequences[j].prompt == sequence.prompt), i)
        if leader == i:
            seen.append(i)
        leaders.append(leader)
    return leaders


class Engine:
    """slots: sequences that run at once. length: most tokens of a sequence that full attention keeps.

    prefill_tokens: prompt tokens of one pass through the model; longer prompts go through in several. With tensor
    parallelism every rank makes the same calls in the same order.
    """

    def __init__(self, model: InferenceModel, eod: int, *, slots: int, length: int, prefill_tokens: int = 65536,
                 graphs: bool = True) -> None:
        self.model, self.eod, self.prefill_tokens = model, eod, prefill_tokens
        self.pool: StatePool = model.new_pool(slots, length)
        self.decoder = Decoder(model, self.pool, graphs=graphs)
        self.prefiller = Prefiller(model, self.pool, graphs=graphs)
        self.free = list(range(slots))[::-1]
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._launched: deque[_Launched] = deque()
        self._rows: list[Sequence] = []
        self._held = 0                                 # steps that free slots have been held back

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises UserError where full attention or Hyena cannot keep all its tokens."""
        seen = sequence.state.position if sequence.state else 0
        total = seen + max(1, len(sequence.prompt)) + sequence.sampling.max_new_tokens
        config, limit = self.model.config, self.pool.length
        if "hyena" in config.mixers:
            limit = min(limit, config.hyena.filter_length)
        if total > limit and config.keeps_every_token:
            raise UserError(f"the prompt and max_new_tokens are {total} tokens together, and at most {limit} are kept: "
                            "shorten one of them")
        self.waiting.append(sequence)

    def release(self, sequence: Sequence, reason: str) -> None:
        """End a sequence, waiting or running, and free its slot."""
        if sequence.finish_reason is not None:
            return
        sequence.finish_reason = reason
        if sequence.slot is None:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            self.free.append(sequence.slot)            # later work on the slot queues behind what runs on the device
            sequence.slot = None

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.running or self._launched)

    @torch.no_grad()
    def step(self) -> list[Sequence]:
        """Admit, launch one step, and take in what is ready. Returns the sequences that got a token or ended."""
        self._admit()
        rows = [s for s in self.running if s.launched < s.sampling.max_new_tokens]
        if rows:
            if rows != self._rows:
                self.decoder.set_rows([s.slot for s in rows])
                self._rows = rows
            self.decoder.step()
            self._expect(rows)
        lag = LAG if rows and self.model.device.type == "cuda" else 0
        touched: list[Sequence] = []
        while len(self._launched) > lag:
            touched += self._collect(self._launched.popleft())
        return list(dict.fromkeys(touched))            # each once, though it may have got several tokens

    def _expect(self, sequences: list[Sequence]) -> None:
        """Note where what the step just launched chooses for them is to be found."""
        ready = None
        if self.model.device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record()
        self._launched.append(_Launched(sequences, [s.slot for s in sequences],
                                        [s.start + s.launched for s in sequences], ready))
        for sequence in sequences:
            sequence.launched += 1

    def _collect(self, launched: _Launched) -> list[Sequence]:
        if launched.ready is not None:
            launched.ready.synchronize()
        touched = []
        results = self.pool.results(launched.slots, launched.positions)
        for sequence, token, logprob in zip(launched.sequences, *results, strict=True):
            if sequence.finish_reason is not None:     # ended after this step was launched
                continue
            touched.append(sequence)
            if token == self.eod:
                self.release(sequence, "eod")
                continue
            sequence.tokens.append(token)
            sequence.logprobs.append(logprob)
            if len(sequence.tokens) == sequence.sampling.max_new_tokens:
                self.release(sequence, "length")
        return touched

    def _admit(self) -> None:
        """Give free slots to waiting sequences, run their prompts, and choose their first tokens."""
        few = len(self.free) < min(len(self.waiting), self.pool.slots * ADMIT_SHARE)
        if few and self.running and self._held < PATIENCE:
            self._held += bool(self.free)
            return
        self._held = 0
        admitted: list[Sequence] = []
        while self.waiting and self.free:
            sequence = self.waiting.popleft()
            sequence.slot = self.free.pop()
            admitted.append(sequence)
        if not admitted:
            return
        logits = self.prefill(admitted)
        slots, options = [s.slot for s in admitted], [s.sampling for s in admitted]
        self.pool.set_sampling(slots, [o.temperature for o in options], [o.top_k or 0 for o in options],
                               [1.0 if o.top_p is None else o.top_p for o in options], [o.seed for o in options])
        rows = to_device(torch.tensor(slots, dtype=torch.int32), self.model.device)
        self.running += admitted
        self.model.ops.sample(logits, self.pool, rows, 0)
        self._expect(admitted)

    def prefill(self, sequences: list[Sequence]) -> Tensor:
        """Put the states and prompts of sequences into their slots. Returns the logits after each [n, padded vocab].

        What is given several times, states too, is put there once and copied.
        """
        same = _leaders(sequences)
        after: list[Tensor | None] = [None] * len(sequences)
        left = []                                      # (sequence, tokens to run, tokens seen)
        written: dict[int, int] = {}                   # slots of states that several sequences may continue
        forks = []
        for i in dict.fromkeys(same):
            sequence = sequences[i]
            seen, prompt = 0, sequence.prompt
            if sequence.state is not None:
                source = written.setdefault(id(sequence.state), sequence.slot)
                if source == sequence.slot:
                    self.pool.write(source, sequence.state)
                else:
                    forks.append((source, sequence.slot))
                seen, after[i] = sequence.state.position, sequence.state.logits.to(self.model.device)
            elif not prompt:
                prompt = [self.eod]                    # an empty prompt starts a document
            if prompt:
                left.append((i, prompt, seen))
        if forks:
            self.pool.copy(*zip(*forks, strict=True))
        while left:
            pieces, budget, rest = [], self.prefill_tokens, []
            for i, prompt, seen in left:
                cut = len(prompt) > self.prefill_tokens            # others run whole, in a later pass if need be
                now = prompt[:budget] if cut or len(prompt) <= budget else []
                budget -= len(now)
                if now:
                    pieces.append((i, now, seen))
                if len(now) < len(prompt):
                    rest.append((i, prompt[len(now) :], seen + len(now)))
            logits = self.prefiller.run([now for _, now, _ in pieces], [sequences[i].slot for i, _, _ in pieces],
                                        [seen for *_, seen in pieces])
            if rest:
                logits = logits.clone()                # the next pass may be of the same size
            for row, (i, *_) in enumerate(pieces):
                after[i] = logits[row]
            left = rest
        copies = [(sequences[leader].slot, sequences[i].slot) for i, leader in enumerate(same) if leader != i]
        if copies:
            self.pool.copy(*zip(*copies, strict=True))
        return torch.stack([after[leader] for leader in same])

    def state_of(self, prompt: list[int], state: SequenceState | None = None) -> SequenceState:
        """The state after a prompt (after another state), as a value; borrows a free slot."""
        if not self.free:
            raise UserError("all slots are taken: wait until one is free")
        sequence = Sequence(prompt, Sampling(), state)
        sequence.slot = self.free[-1]
        logits = self.prefill([sequence])
        return self.pool.read(sequence.slot, sequence.start, logits[0])
