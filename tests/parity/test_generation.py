"""Generation against the full forward pass: every position, ragged batches, pieces, forks, sampling, text."""

import pytest
import torch

from based_mp.inference.cuda_graph import Prefiller
from based_mp.inference.engine import PATIENCE, Engine, Sequence
from based_mp.inference.generate import Generator
from based_mp.inference.model import InferenceModel
from based_mp.inference.sampling import Sampling
from based_mp.inference.state import SequenceState
from based_mp.inference.text import TextStream
from based_mp.ops import decode_cuda, decode_torch
from based_mp.ops.reference import taylor_step
from based_mp.parallel import state
from tests.models import Letters, as_trained, tiny_config

LENGTHS = [1, 7, 65, 200]
SIZES = {
    "based": {"num_layers": 5, "linear_attention_layers": [1], "sliding_attention_layers": [2, 3]},
    # Every option of the architecture that generation sees, and a head_dim that is no multiple of 8.
    "options": {"num_layers": 5, "d_model": 72, "linear_attention_layers": [1], "sliding_attention_layers": [2, 3],
                "decay_exponent": -3, "fp32_residual": True, "tie_embeddings": False, "conv_kernel": 4,
                "rotary_fraction": 0.5},
    "systems": {"num_layers": 5, "linear_attention_layers": [], "sliding_attention_layers": [], "mixer_layers": {
        "gla": [0], "mamba": [1], "h3": [2], "hyena": [3], "rwkv": [4]}, "rwkv": {"head_dim": 16}},
    "attention": {"linear_attention_layers": [], "sliding_attention_layers": [], "other_layers": "softmax_attention",
                  "rotary_fraction": 0.5},
}


@pytest.fixture(scope="module", params=list(SIZES))
def trained(request):
    """The training module and its inference model."""
    state.initialize(device="cpu", seed=3)
    from based_mp.model.based_model import build_model
    config = tiny_config(model=SIZES[request.param] | {"init_std": 0.2})
    module = as_trained(build_model(config).eval())
    yield module, InferenceModel(module, config.model)
    state.destroy()


@pytest.fixture
def model(trained):
    return trained[1]


@pytest.fixture
def generator(model):
    return Generator(model, Letters())


def tokens_of(length, batch=2):
    return torch.randint(1, 120, (batch, length), generator=torch.Generator().manual_seed(length))


def prompt_of(length):
    return tokens_of(length, 1)[0].tolist()


@pytest.mark.parametrize("length", LENGTHS)
def test_prefill_and_decode_equal_the_full_forward(trained, length):
    """A first part, single tokens, and a part that continues them."""
    (module, model), tokens = trained, tokens_of(length)
    with torch.no_grad():
        full = module(tokens, torch.zeros_like(tokens), None)
    pool, first, last = model.new_pool(4, 256), (length + 2) // 3, length - length // 3
    slots = [3, 1]
    rows = torch.tensor(slots, dtype=torch.int32)

    def part(a, e):
        pieces = [row[a:e].tolist() for row in tokens]
        return model.prefill(pool, pieces, slots, [a, a], every=True).view(2, e - a, -1)

    out = [part(0, first)]
    for t in range(first, last):
        pool.tokens[rows.long()] = tokens[:, t].int()
        out.append(model.step(pool, rows)[:, None])
        pool.positions[rows.long()] += 1
    out += [part(last, length)] if last < length else []
    torch.testing.assert_close(torch.cat(out, 1), full, rtol=1e-4, atol=1e-4)


def late_taylor_step(x, slots, pool, kv, z, recent, decay, feature_dim):
    """As the CUDA kernel does: a token goes to `recent`, from where each head's state takes in sixteen at a time."""
    slots, f, heads = slots.long(), feature_dim, torch.arange(kv.shape[1])
    q, k, v = x.unflatten(-1, (kv.shape[1], -1)).split([f, f, kv.shape[3]], -1)
    o, after = taylor_step(q, k, v, decode_cuda.settled(pool, slots, kv, z, recent, decay, f), decay=decay)
    generated = (pool.positions - pool.starts)[slots][:, None]
    phase = (generated + heads) % decode_cuda.RECENT
    recent[slots[:, None], heads, torch.minimum(generated, phase)] = torch.cat([k, v], -1)
    due = (phase == decode_cuda.RECENT - 1)[..., None]
    z[slots] = after.z.where(due, z[slots])
    kv[slots] = after.kv.where(due[..., None], kv[slots])
    return o.flatten(1)


@pytest.mark.parametrize("trained", ["based", "options"], indirect=True)
def test_states_that_take_tokens_in_late(trained, tmp_path, monkeypatch):
    """Are worth the same in all that is done with them."""
    for name, value in (("RECENT", decode_cuda.RECENT), ("taylor_step_", late_taylor_step),
                        ("settled", decode_cuda.settled)):
        monkeypatch.setattr(decode_torch, name, value)
    for length in LENGTHS:
        test_prefill_and_decode_equal_the_full_forward(trained, length)
    test_ragged_batch_equals_each_alone(trained[1], 16)
    test_states_are_forked_saved_and_continued(Generator(trained[1], Letters()), tmp_path)


@pytest.mark.parametrize("prefill_tokens", [1, 16, 65536])
def test_ragged_batch_equals_each_alone(model, prefill_tokens):
    """More prompts than slots, so that slots are used again."""
    prompts = [prompt_of(n) for n in (1, 40, 9, 23, 90)]
    together = Generator(model, Letters(), max_batch=3, prefill_tokens=prefill_tokens).generate(
        prompts, max_new_tokens=20)
    for prompt, completion in zip(prompts, together, strict=True):
        alone = Generator(model, Letters()).generate([prompt], max_new_tokens=20)[0]
        assert alone.tokens == completion.tokens
        torch.testing.assert_close(torch.tensor(alone.logprobs), torch.tensor(completion.logprobs), rtol=1e-3,
                                   atol=1e-4)


def test_prompts_in_passes_of_fixed_sizes(model, monkeypatch):
    """Give what they give alone, in slots that held others, and leave the other slots as they were; so does what
    continues them, beside prompts that start documents, unless attention is to all earlier keys."""
    continues = all(getattr(layer.mixer, "window", 0) is not None for layer in model.layers)
    monkeypatch.setattr(model, "continuable", continues)
    prefiller = Prefiller(model, model.new_pool(4, 256), graphs=False)
    prefiller.fills, pool, alone = True, prefiller.pool, model.new_pool(1, 256)
    packs, seen, text = set(), [0] * 4, [[] for _ in range(4)]
    for lengths, again in (((31,), ()), ((30,), ()), ((1, 130, 20), ()), ((2, 5, 90), ()), ((32,), ()),
                           ((3, 26, 1), ()), ((5, 26), ()), ((32,), (2,)), ((7, 9, 1), (2, 0, 3)),
                           ((40, 17, 3), (0,)), ((5, 26), (2,))):
        prompts, slots = [prompt_of(n) for n in lengths], [2, 0, 3][: len(lengths)]
        for slot, prompt in zip(slots, prompts, strict=True):
            text[slot] = [*(text[slot] if slot in again else []), *prompt]
            seen[slot] = len(text[slot]) - len(prompt)
        rest = [slot for slot in range(4) if slot not in slots]
        before = [t[rest].clone() for layer in pool.states for t in layer.values()]
        logits = prefiller.run(prompts, slots, [seen[slot] for slot in slots])
        if continues or not again:
            packs.add((*prefiller._size(prompts), not again))
        after = [t[rest] for layer in pool.states for t in layer.values()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        for slot, own in zip(slots, logits, strict=True):
            torch.testing.assert_close(own, model.prefill(alone, [text[slot]], [0], [0])[0], rtol=1e-4, atol=1e-4)
            both = []
            for at, p in ((slot, pool), (0, alone)):
                p.tokens[at] = 7
                both.append(model.step(p, torch.tensor([at], dtype=torch.int32)))
            torch.testing.assert_close(*both, rtol=1e-4, atol=1e-4)
            text[slot] = [*text[slot], 7]
            pool.positions[slot] += 1
            pool.starts[slot] += 1
    assert prefiller._packs.keys() == packs
    fresh, others = ({(*size,) for *size, own in packs if own is kind} for kind in (True, False))
    assert fresh == {(32, 2), (192, 5), (128, 5), (32, 1), (32, 3), (32, 5)}
    assert others == ({(32, 1), (32, 5), (64, 5), (32, 3)} if continues else set())
    assert prefiller._size([[1] * 8193]) is prefiller._size([[1]] * 65) is None


def test_states_are_forked_saved_and_continued(generator, tmp_path):
    prompt, options = prompt_of(30), {"max_new_tokens": 15, "temperature": 1.0, "seed": [5, 6, 5]}
    fresh = [c.tokens for c in generator.generate([prompt] * 3, **options)]
    assert fresh[0] == fresh[2] != fresh[1]
    first = generator.state(prompt[:20])
    generator.state(prompt[20:], first).save(tmp_path / "state.pt")
    whole = SequenceState.load(tmp_path / "state.pt")
    assert [c.tokens for c in generator.generate([[]] * 3, states=[whole] * 3, **options)] == fresh
    assert [c.tokens for c in generator.generate([prompt[20:]] * 3, states=[first] * 3, **options)] == fresh
    ends = [prompt[20:], prompt[20:23], prompt[20:29]]                # of one state, and beside a text of its own
    apart = [generator.generate([prompt[:20] + end], max_new_tokens=15)[0].tokens for end in ends]
    texts, states = [*ends[:2], prompt[:20] + ends[2]], [first, first, None]
    assert [c.tokens for c in generator.generate(texts, states=states, max_new_tokens=15)] == apart


def test_state_of_another_model_is_refused(generator, tmp_path):
    from based_mp.errors import UserError
    made = generator.state([1, 2, 3])
    made.layers[1] = {"other": torch.zeros(1)}
    with pytest.raises(UserError, match="another model"):
        generator.generate([[]], states=[made])
    (tmp_path / "state.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match="not a saved generation state"):
        SequenceState.load(tmp_path / "state.pt")


def test_packed_training_equals_separate_documents(trained):
    from based_mp.model.based_model import token_losses
    module, tokens = trained[0], tokens_of(40)
    bounds = torch.tensor([0, 10, 40, 55, 80], dtype=torch.int32)
    batch = {"tokens": tokens, "labels": tokens.roll(-1, 1), "cu_seqlens": bounds}
    with torch.no_grad():
        packed = token_losses(module, batch).flatten()
        for a, b in zip(bounds[:-1], bounds[1:], strict=True):
            piece = {k: v.flatten()[a:b][None] for k, v in batch.items() if k != "cu_seqlens"}
            torch.testing.assert_close(packed[a:b], token_losses(module, piece)[0], rtol=1e-4, atol=1e-4)


def test_sampling_is_a_function_of_the_seed(generator):
    def run(prompts, **options):
        return [c.tokens for c in generator.generate(prompts, max_new_tokens=12, **options)]

    two = ["hello", "a"]
    assert run(two, temperature=1.0, seed=1) == run(two, temperature=1.0, seed=1)
    assert run(two, temperature=1.0, seed=1) != run(two, temperature=1.0, seed=2)
    assert run(two, temperature=1.0, seed=[7, 1])[1] == run(["a"], temperature=1.0, seed=1)[0]
    assert run(two, temperature=2.0, top_k=1) == run(two)


class Pool:
    """What `sample` reads: 2000 slots with the same options."""

    def __init__(self, vocab_size, temperature, top_k=0, top_p=1.0, rows=2000):
        self.vocab_size, self.tokens = vocab_size, torch.zeros(rows, dtype=torch.int32)
        self.positions, self.seeds = torch.zeros(rows, dtype=torch.int32), torch.arange(rows)
        self.temperature, self.top_p = torch.full((rows,), temperature), torch.full((rows,), top_p)
        self.top_k = torch.full((rows,), top_k, dtype=torch.int32)
        self.chosen, self.logprobs = torch.full((rows, 3), -1, dtype=torch.int32), torch.full((rows, 3), torch.nan)


@pytest.mark.parametrize("options, kept", [({}, 4), ({"top_k": 3}, 3), ({"top_p": 0.7}, 2), ({"top_p": 0.85}, 3),
                                           ({"top_k": 2, "top_p": 0.55}, 1), ({"top_k": 2, "top_p": 0.7}, 2)])
def test_samples_follow_the_distribution(options, kept):
    """top_p = 0.55 keeps one of the two that top_k = 2 leaves: 0.5 of 0.8 is enough."""
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = probabilities.log().repeat(2000, 1)
    pool = Pool(4, 1.0, **options)
    decode_torch.sample(logits, pool, torch.arange(2000), 1)
    chosen = pool.chosen[:, 1]                         # after one token
    share = torch.bincount(chosen, minlength=4) / 2000
    expected = probabilities * (torch.arange(4) < kept)
    assert (share - expected / expected.sum()).abs().max() < 0.04
    torch.testing.assert_close(pool.logprobs[:, 1], probabilities.log()[chosen.long()])


def test_noise_changes_with_the_position():
    pool, logits = Pool(50, 1.0, rows=300), torch.zeros(300, 50)
    for _ in range(3):
        decode_torch.sample(logits, pool, torch.arange(300), 1)
    draws = pool.chosen.T
    assert (draws >= 0).all() and torch.equal(pool.tokens, draws[0])               # the last after three tokens
    assert (draws[0] == draws[1]).float().mean() < 0.1 and (draws[:, 0] == draws[:, 1]).float().mean() < 1


def test_an_empty_prompt_starts_a_document(generator):
    empty, document = generator.generate([[], [generator.tokenizer.eod]], max_new_tokens=5)
    assert empty.tokens == document.tokens and empty.logprobs == document.logprobs


def test_stop_strings_end_of_document_and_length(generator):
    free = generator.generate(["abc"], max_new_tokens=30)[0]
    assert free.finish_reason == "length" and len(free.tokens) == len(free.logprobs) == 30
    stop = free.text[4:7]                              # three tokens of this tokenizer
    stopped = generator.generate(["abc"], max_new_tokens=30, stop=["never said", stop])[0]
    assert stopped.finish_reason == "stop" and stopped.text == free.text[: free.text.index(stop)]
    assert stopped.tokens == free.tokens[: free.text.index(stop) + 3]

    class Ends(Letters):
        eod = free.tokens[3]

    ended = Generator(generator.model, Ends()).generate(["abc"], max_new_tokens=30)[0]
    assert ended.finish_reason == "eod" and ended.tokens == free.tokens[: free.tokens.index(free.tokens[3])]


@pytest.mark.parametrize("new", [1, 2, 25])
@pytest.mark.parametrize("stop", [[], [" x"], ["aa"]])
def test_streaming_equals_generating(generator, stop, new):
    prompts, options = ["abc", "x", "hello there"], {"max_new_tokens": new, "temperature": 1.0, "stop": stop}
    expected = generator.generate(prompts, **options)
    texts, completions = [""] * 3, [None] * 3
    for piece in generator.stream(prompts, **options):
        assert completions[piece.index] is None
        texts[piece.index] += piece.text
        completions[piece.index] = piece.completion
    assert completions == expected and texts == [c.text for c in expected]


def test_leaving_a_stream_frees_its_slots(generator):
    next(generator.stream(["abc", "x"], max_new_tokens=25))
    engine = generator._engine
    assert sorted(engine.free) == list(range(engine.pool.slots)) and not engine.running and not engine.waiting


class Bytes:
    """A token a byte; decoding replaces what is no UTF-8."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


def test_text_comes_in_whole_characters():
    stream, ids = TextStream(Bytes(), list("né".encode()), []), list("aé😀z".encode())
    pieces = [stream.add([i]) for i in ids]
    assert pieces == ["a", "", "é", "", "", "", "😀", "z"]
    assert stream.add([0xC3]) == "" and stream.add([], last=True) == "\ufffd"


def test_text_that_may_become_a_stop_string_is_held_back():
    stream = TextStream(Bytes(), [], ["end.", "\n\n"])
    assert [stream.add([b]) for b in b"an en"] == ["a", "n", " ", "", ""]
    assert [stream.add([b]) for b in b"ds\n"] == ["", "ends", ""]
    assert stream.add([10]) == "" and stream.stopped and stream.text == "an ends"
    held = TextStream(Bytes(), [], ["end."])
    assert held.add(list(b"the en")) == "the " and held.add([], last=True) == "en" and not held.stopped


def test_sequences_come_and_go(model):
    """Submitted while others run, and taken back: waiting, running and done."""
    engine = Engine(model, 0, slots=2, length=256)
    runs = [Sequence(prompt_of(n), Sampling(max_new_tokens=m)) for n, m in ((5, 30), (9, 4), (3, 9), (40, 6))]
    for sequence in runs[:3]:
        engine.submit(sequence)
    for step in range(60):
        engine.step()
        if step == 2:
            engine.submit(runs[3])
            engine.release(runs[2], "cancelled")       # still waiting
        if step == 5:
            engine.release(runs[0], "cancelled")       # running
    assert engine.idle and sorted(engine.free) == [0, 1]
    assert [s.finish_reason for s in runs] == ["cancelled", "length", "cancelled", "length"]
    for sequence, prompt in zip(runs, (5, 9, 3, 40), strict=True):
        alone = Generator(model, Letters()).generate([prompt_of(prompt)], max_new_tokens=max(1, len(sequence.tokens)))
        assert sequence.tokens == alone[0].tokens[: len(sequence.tokens)]


@pytest.mark.parametrize("ends, waiting, passes", [
    ((3,), 1, {0: 16, 2: 1}), ((3, 4), 2, {0: 16, 3: 2}), ((3,), 2, {0: 16, 2 + PATIENCE: 1, 39: 1}),
    ((3, 3, 4), 4, {0: 16, 2: 2, 3 + PATIENCE: 1, 39: 1})])
def test_free_slots_are_filled_together(model, ends, waiting, passes):
    """While more wait than slots are free, a pass over prompts takes several; but none waits for it long. A step makes
    a token, the first one two. passes: by the step, how many prompts."""
    engine, made, step = Engine(model, -1, slots=16, length=256), {}, 0
    run = engine.prefiller.run

    def counted(tokens, *rest):
        made[step] = made.get(step, 0) + len(tokens)
        return run(tokens, *rest)

    engine.prefiller.run = counted
    for i in range(16 + waiting):
        new = ends[i] if i < len(ends) else 40 if i < 16 else 60
        engine.submit(Sequence([i + 1], Sampling(max_new_tokens=new)))
    while not engine.idle:
        engine.step()
        step += 1
    assert made == passes and sorted(engine.free) == list(range(16))


@pytest.mark.parametrize("options, word", [
    ({"temperature": -1}, "temperature"), ({"top_p": 0}, "top_p"), ({"top_k": 0}, "top_k"),
    ({"max_new_tokens": 0}, "max_new_tokens"), ({"seed": 2**70}, "seed"), ({"states": [None] * 2}, "states")])
def test_options_out_of_range_are_refused(generator, options, word):
    from based_mp.errors import UserError
    with pytest.raises(UserError, match=word):
        generator.generate(["a"], **options)


def test_token_ids_out_of_range_are_refused(generator):
    from based_mp.errors import UserError
    with pytest.raises(UserError, match="token id"):
        generator.generate([[5, 120]])
