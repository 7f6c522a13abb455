"""Generation against the full forward pass: every position, ragged batches, chunks, forks, sampling."""

import pytest
import torch

from based_mp.inference import state as generation_state
from based_mp.inference.sampling import next_tokens
from based_mp.parallel import state
from tests.models import tiny_config

LENGTHS = [1, 7, 65, 200]


class Letters:
    """A tokenizer of single characters."""

    vocab_size, eod = 120, 0

    def encode(self, text):
        return [ord(c) - 32 for c in text]

    def decode(self, ids):
        return "".join(chr(i + 32) for i in ids)


@pytest.fixture(scope="module")
def model():
    state.initialize(device="cpu", seed=3)
    from based_mp.model.based_model import build_model
    layers = {"num_layers": 5, "linear_attention_layers": [1], "sliding_attention_layers": [2, 3]}
    yield build_model(tiny_config(model=layers | {"init_std": 0.2})).eval()
    state.destroy()


@pytest.fixture(scope="module")
def softmax_model():
    state.initialize(device="cpu", seed=3)
    from based_mp.model.based_model import build_model
    layers = {"linear_attention_layers": [], "sliding_attention_layers": [], "other_layers": "softmax_attention"}
    yield build_model(tiny_config(model=layers | {"init_std": 0.2, "rotary_fraction": 0.5})).eval()


@pytest.fixture
def generator(model):
    from based_mp.inference.generate import Generator
    return Generator(model, Letters(), 120)


def tokens_of(length, batch=2):
    return torch.randint(1, 120, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("which", ["model", "softmax_model"])
@pytest.mark.parametrize("length", LENGTHS)
def test_prefill_and_decode_equal_the_full_forward(which, length, request):
    from based_mp.model.based_model import extend, init_states
    model, tokens = request.getfixturevalue(which), tokens_of(length)
    with torch.no_grad():
        full = model(tokens, torch.zeros_like(tokens), None)
    states, cut = init_states(model, 2), (length + 1) // 2
    steps = [extend(model, tokens[:, :cut], states)]
    steps += [extend(model, tokens[:, t : t + 1], states) for t in range(cut, length)]
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("which", ["model", "softmax_model"])
def test_ragged_batch_equals_the_full_forward_at_every_position(which, request):
    """Prompts of different lengths prefilled together, then decoded together, one given token at a time."""
    from based_mp.model.based_model import extend, init_states
    model, lengths, new = request.getfixturevalue(which), [1, 40, 9, 23], 20
    rows = [tokens_of(n + new, 1)[0] for n in lengths]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    prompts = torch.cat([row[:n] for row, n in zip(rows, lengths, strict=True)])[None]
    states = init_states(model, len(rows))
    prefilled = extend(model, prompts, states, bounds)[0]
    decoded = [extend(model, torch.stack([row[n + t] for row, n in zip(rows, lengths, strict=True)])[:, None], states)
               for t in range(new)]
    for i, row in enumerate(rows):
        with torch.no_grad():
            full = model(row[None], torch.zeros_like(row[None]), None)[0]
        found = torch.cat([prefilled[bounds[i] : bounds[i + 1]], *(step[i] for step in decoded)])
        torch.testing.assert_close(found, full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("which", ["model", "softmax_model"])
@pytest.mark.parametrize("chunk", [1, 16, 4096])
def test_ragged_batch_equals_each_alone(which, chunk, request):
    from based_mp.inference.generate import Generator
    generator = Generator(request.getfixturevalue(which), Letters(), 120)
    prompts = [tokens_of(n, 1)[0].tolist() for n in (1, 40, 9, 23)]
    logits, states = generator.prefill(prompts, chunk=chunk)
    together = [c.tokens for c in generator.generate(prompts, max_new_tokens=20, prefill_chunk=chunk)]
    for row, prompt in enumerate(prompts):
        alone, _ = generator.prefill([prompt])
        torch.testing.assert_close(logits[row], alone[0], rtol=1e-4, atol=1e-4)
        assert generator.generate([prompt], max_new_tokens=20)[0].tokens == together[row]


def test_forked_state_equals_a_fresh_run(generator, tmp_path):
    prompt = tokens_of(30, 1)[0].tolist()
    _, states = generator.prefill([prompt])
    generation_state.save(states, tmp_path / "state.pt")
    fork = generation_state.select(states, [0, 0])
    followers = torch.tensor([5, 60])
    forked = generator.decode(followers, fork)
    for row, token in enumerate(followers.tolist()):
        fresh, _ = generator.prefill([[*prompt, token]])
        torch.testing.assert_close(forked[row], fresh[0], rtol=1e-4, atol=1e-4)
    restored = generator.decode(followers[:1], generation_state.load(tmp_path / "state.pt"))
    torch.testing.assert_close(restored[0], forked[0])
    torch.testing.assert_close(generator.decode(followers[:1], generation_state.clone(states))[0], forked[0])


def test_packed_training_equals_separate_documents(model):
    from based_mp.model.based_model import token_losses
    tokens = tokens_of(40)
    bounds = torch.tensor([0, 10, 40, 55, 80], dtype=torch.int32)
    batch = {"tokens": tokens, "labels": tokens.roll(-1, 1), "cu_seqlens": bounds}
    with torch.no_grad():
        packed = token_losses(model, batch).flatten()
        for a, b in zip(bounds[:-1], bounds[1:], strict=True):
            piece = {k: v.flatten()[a:b][None] for k, v in batch.items() if k != "cu_seqlens"}
            torch.testing.assert_close(packed[a:b], token_losses(model, piece)[0], rtol=1e-4, atol=1e-4)


def test_sampling_is_a_function_of_the_seed(generator):
    def run(**options):
        return [c.tokens for c in generator.generate(["hello", "a"], max_new_tokens=12, **options)]

    assert run(temperature=1.0, seed=1) == run(temperature=1.0, seed=1)
    assert run(temperature=1.0, seed=1) != run(temperature=1.0, seed=2)
    assert run(temperature=1.0, seed=[7, 1])[1] == generator.generate(["a"], max_new_tokens=12, temperature=1.0,
                                                                     seed=1)[0].tokens
    assert run(temperature=2.0, top_k=1) == run()


def test_top_p_keeps_the_fewest_tokens():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(400, 1)
    seeds = [torch.Generator().manual_seed(i) for i in range(400)]
    drawn = next_tokens(logits, temperature=1.0, top_k=None, top_p=0.7, generators=seeds)
    assert set(drawn.tolist()) == {0, 1}


def test_stop_strings_end_of_document_and_length(generator):
    free = generator.generate(["abc"], max_new_tokens=30)[0]
    assert free.finish_reason == "length" and len(free.tokens) == 30
    stop = free.text[4:6]
    stopped = generator.generate(["abc"], max_new_tokens=30, stop=[stop])[0]
    assert stopped.finish_reason == "stop" and stopped.text == free.text[: free.text.index(stop)]

    class Ends(Letters):
        eod = free.tokens[3]

    from based_mp.inference.generate import Generator
    ended = Generator(generator.model, Ends(), 120).generate(["abc"], max_new_tokens=30)[0]
    assert ended.finish_reason == "eod" and ended.tokens == free.tokens[: free.tokens.index(free.tokens[3])]


@pytest.mark.parametrize("options, word", [({"temperature": -1}, "temperature"), ({"top_p": 0}, "top_p"),
                                           ({"top_k": 0}, "top_k"), ({"max_new_tokens": 0}, "max_new_tokens")])
def test_options_out_of_range_are_refused(generator, options, word):
    from based_mp.errors import UserError
    with pytest.raises(UserError, match=word):
        generator.generate(["a"], **options)
