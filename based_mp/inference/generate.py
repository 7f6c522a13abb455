"""Text from a trained model: prefill, then one token at a time on a constant-size state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from based_mp.config import TokenizerConfig
from based_mp.errors import UserError
from based_mp.inference.engine import Engine, Sequence
from based_mp.inference.load import full_state, load_state, read_config
from based_mp.inference.model import InferenceModel
from based_mp.inference.sampling import Sampling
from based_mp.inference.state import SequenceState
from based_mp.inference.text import TextStream
from based_mp.model.based_model import build_model
from based_mp.parallel.state import Ranks
from based_mp.training import checkpoint as ckpt
from data_prep.tokenizers import Tokenizer, load_tokenizer


@dataclass
class Completion:
    """What was generated, without the prompt. logprobs: of every token; finish_reason: "stop", "eod" or "length"."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    logprobs: list[float] = field(default_factory=list)


@dataclass
class Piece:
    """Text that became final. completion: all of it, with the last piece of prompt number `index`."""

    index: int
    text: str
    completion: Completion | None = None


@dataclass(eq=False)
class Continuation:
    """A sequence in an engine, and its text."""

    sequence: Sequence
    text: TextStream
    taken: int = 0

    def advance(self, engine: Engine) -> str:
        """Take in the sequence's new tokens, ending it at a stop string. Returns the text that became final."""
        new = self.sequence.tokens[self.taken :]
        self.taken += len(new)
        piece = self.text.add(new, last=self.sequence.finish_reason is not None)
        if self.text.stopped:
            engine.release(self.sequence, "stop")
            self.sequence.finish_reason = "stop"
        return piece

    @property
    def completion(self) -> Completion:
        s = self.sequence
        return Completion(self.text.text, list(s.tokens), s.finish_reason, list(s.logprobs))


def open_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that a configuration names."""
    return load_tokenizer(config.type, model=config.model, vocab_file=config.vocab_file,
                          merge_file=config.merge_file, eod_token=config.eod_token)


class Generator:
    """Generates with a model that is already on its device. max_batch: prompts that run at once; others wait."""

    def __init__(self, model: InferenceModel, tokenizer: Tokenizer, *, max_batch: int = 256,
                 prefill_tokens: int = 65536, graphs: bool = True) -> None:
        vocab_size = model.config.vocab_size
        if tokenizer.vocab_size > vocab_size:
            raise UserError(f"the tokenizer has {tokenizer.vocab_size} tokens and the model {vocab_size}: give the "
                            "tokenizer the model was trained with")
        self.model, self.tokenizer, self.max_batch = model, tokenizer, max_batch
        self._options = {"prefill_tokens": prefill_tokens, "graphs": graphs}
        self._engine: Engine | None = None

    @classmethod
    def from_checkpoint(cls, path: str | Path, ranks: Ranks, **options: int) -> Generator:
        """A checkpoint folder (or a folder of them: its newest), at the tensor-parallel size of `ranks`.

        options: as the constructor's. Raises UserError for a checkpoint that is damaged or has no tokenizer.
        """
        checkpoint = ckpt.resolve(path)
        config = read_config(checkpoint)
        if config.data.tokenizer is None:
            raise UserError(f"{checkpoint} was trained without data.tokenizer: add it to its config.yaml")
        parallel = config.parallel.model_copy(update={"tensor_parallel_size": ranks.tp_size})
        training = config.training.model_copy(update={"device": ranks.device.type})
        config = config.model_copy(update={"parallel": parallel, "training": training})
        module = build_model(config).eval()
        load_state(module, full_state(checkpoint, module), ranks.tp_rank, ranks.tp_size)
        return cls(InferenceModel(module, config.model), open_tokenizer(config.data.tokenizer), **options)

    def generate(self, prompts: list[str] | list[list[int]], *, max_new_tokens: int = 128, temperature: float = 0.0,
                 top_k: int | None = None, top_p: float | None = None, seed: int | list[int] = 0,
                 stop: list[str] | None = None, states: list[SequenceState] | None = None) -> list[Completion]:
        """Continue every prompt (text or token ids), greedily at temperature 0.

        seed: of each prompt, or one from which prompt i takes seed + i. states: what each prompt continues (prompts may
        be empty then). A completion ends at the end-of-document token, before the first of the `stop` strings, or after
        max_new_tokens. See `Sampling`. Raises UserError for options out of range.
        """
        engine, runs = self._begin(prompts, max_new_tokens, temperature, top_k, top_p, seed, stop, states)
        by_sequence = {id(run.sequence): run for run in runs}
        while not engine.idle:
            for sequence in engine.step():
                if stop or sequence.finish_reason is not None:
                    by_sequence[id(sequence)].advance(engine)
        return [run.completion for run in runs]

    def stream(self, prompts: list[str] | list[list[int]], *, max_new_tokens: int = 128, temperature: float = 0.0,
               top_k: int | None = None, top_p: float | None = None, seed: int | list[int] = 0,
               stop: list[str] | None = None, states: list[SequenceState] | None = None) -> Iterator[Piece]:
        """As `generate`, a piece of text at a time, in the order in which they come. Leaving early ends the rest."""
        engine, runs = self._begin(prompts, max_new_tokens, temperature, top_k, top_p, seed, stop, states)
        numbers = {id(run.sequence): i for i, run in enumerate(runs)}
        try:
            while not engine.idle:
                for sequence in engine.step():
                    i = numbers[id(sequence)]
                    text = runs[i].advance(engine)
                    if sequence.finish_reason is not None:
                        yield Piece(i, text, runs[i].completion)
                    elif text:
                        yield Piece(i, text)
        finally:
            for run in runs:
                engine.release(run.sequence, "cancelled")

    def state(self, prompt: str | list[int], state: SequenceState | None = None) -> SequenceState:
        """The state after a prompt, or after `state` and then the prompt; `generate(…, states=[…])` continues it."""
        return self._engine_for(1, self._length([self.encode(prompt)], [state], 0)).state_of(self.encode(prompt), state)

    def encode(self, prompt: str | list[int]) -> list[int]:
        """Token ids of a prompt. Raises UserError for ids the model does not have."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if any(not 0 <= token < self.model.config.vocab_size for token in ids):
            raise UserError(f"the prompt has a token id outside 0 … {self.model.config.vocab_size - 1}")
        return ids

    def _begin(self, prompts: list[str] | list[list[int]], max_new_tokens: int, temperature: float, top_k: int | None,
               top_p: float | None, seed: int | list[int], stop: list[str] | None,
               states: list[SequenceState] | None) -> tuple[Engine, list[Continuation]]:
        if not prompts:
            raise UserError("no prompt: give at least one")
        seeds = seed if isinstance(seed, list) else [seed + i for i in range(len(prompts))]
        given = states or [None] * len(prompts)
        if not len(seeds) == len(given) == len(prompts):
            raise UserError(f"{len(prompts)} prompts, {len(seeds)} seeds and {len(given)} states: give as many of each")
        ids = [self.encode(prompt) for prompt in prompts]
        sequences = [Sequence(i, Sampling(max_new_tokens, temperature, top_k, top_p, s), state)
                     for i, s, state in zip(ids, seeds, given, strict=True)]
        engine = self._engine_for(len(prompts), self._length(ids, given, max_new_tokens))
        for sequence in sequences:
            engine.submit(sequence)
        return engine, [Continuation(s, TextStream(self.tokenizer, s.prompt, stop or [])) for s in sequences]

    @staticmethod
    def _length(ids: list[list[int]], states: list[SequenceState | None], new: int) -> int:
        seen = [state.position if state else 0 for state in states]
        return max(n + max(1, len(i)) for n, i in zip(seen, ids, strict=True)) + new

    def _engine_for(self, sequences: int, length: int) -> Engine:
        """An engine with room; the last one where it has it. Room grows in powers of two."""
        slots = min(self.max_batch, 1 << (sequences - 1).bit_length())
        full = self.model.config.keeps_every_token
        engine = self._engine
        if engine is None or engine.pool.slots < slots or (full and engine.pool.length < length):
            if engine is not None and not engine.idle:
                raise UserError("this generator is streaming: finish or close the stream, or use another generator")
            slots = max(slots, engine.pool.slots if engine else 0)
            self._engine = engine = None               # its memory is free before the new one takes some
            self._engine = self.new_engine(slots, 1 << (length - 1).bit_length())
        return self._engine

    def new_engine(self, slots: int, length: int) -> Engine:
        """An engine of one's own, for `slots` sequences of at most `length` tokens (where attention is full)."""
        return Engine(self.model, self.tokenizer.eod, slots=slots, length=length, **self._options)
