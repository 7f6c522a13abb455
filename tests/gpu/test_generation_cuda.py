"""Generation on a GPU: every kernel against the plain torch operation, graphs against eager, long decoding."""

import pytest
import torch
import torch.nn.functional as F

from based_mp.ops import backends, decode_torch
from based_mp.ops.reference import taylor_feature_dim
from tests.models import as_trained, tiny_config

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or backends.extension() is None, reason="needs a Hopper GPU and based_mp._C")

SLOTS = [3, -1, 0, 5]            # of four rows, one of them idle
BASED = {"d_model": 256, "num_heads": 4, "num_layers": 6, "feature_dim": 16, "window": 32, "ffn_hidden_size": 512,
         "linear_attention_layers": [1, 4], "sliding_attention_layers": [2], "init_std": 0.06}
ATTENTION = BASED | {"d_model": 280, "linear_attention_layers": [], "sliding_attention_layers": [],
                     "other_layers": "softmax_attention", "rotary_fraction": 0.5}


@pytest.fixture
def cuda():
    from based_mp.ops import decode_cuda
    torch.manual_seed(0)
    return decode_cuda


@pytest.fixture
def slots():
    rows = torch.tensor(SLOTS, dtype=torch.int32, device="cuda")
    return rows, rows >= 0


def randn(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda").to(dtype)


def error(x, ref):
    assert x.isfinite().all()
    return ((x.double() - ref.double()).norm() / ref.double().norm().clamp_min(1e-30)).item()


def double(pending):
    if pending is None:
        return None
    return decode_torch.Pending(pending.out.double(), None if pending.bias is None else pending.bias.double())


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9, 16, 17, 30, 50, 100, 128, 200, 300])
def test_norms_and_products(cuda, rows):
    """A wide layer, whose products are split over clusters, and a narrow one that fills no tile."""
    for d, f, dtype in ((1792, 3584, torch.bfloat16), (72, 200, torch.bfloat16), (72, 200, torch.float32)):
        x, out, bias = randn(rows, d, dtype=dtype) * 3, randn(rows, d), randn(d)
        fc1, fc2, y = randn(2 * f, d) / d**0.5, randn(d, f) / f**0.5, randn(rows, f)
        for before in (None, decode_torch.Pending(out, None), decode_torch.Pending(out, bias)):
            for swiglu in (False, True):
                a, b = x.clone(), x.double()
                got = cuda.norm_linear(a, before, 1e-5, fc1, swiglu=swiglu)
                ref = decode_torch.norm_linear(b, double(before), 1e-5, fc1.double(), swiglu=swiglu)
                assert error(got, ref) < 8e-3 and error(a, b) < 4e-3
        assert error(cuda.linear(y, fc2), y.double() @ fc2.double().T) < 4e-3
        for own in (None, bias):
            a, b = x.clone(), x.double()
            pending = cuda.linear_add(y, fc2, own, a)
            many = cuda.Pending if own is not None or dtype == torch.float32 else type(None)
            kind = type(None) if rows <= cuda.FEW_ROWS else cuda.Summed if rows <= cuda.MOST_ROWS else many
            assert isinstance(pending, kind)
            ref = decode_torch.linear_add(y.double(), fc2.double(), None if own is None else own.double(), b)
            got = cuda.norm_linear(a, pending, 1e-5, fc1, swiglu=True)
            assert error(got, decode_torch.norm_linear(b, ref, 1e-5, fc1.double(), swiglu=True)) < 8e-3
            assert error(a, b) < 4e-3


@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize("rows, d, c", [(1, 128, 200), (2, 128, 200), (4, 128, 200), (13, 2056, 200), (33, 128, 200),
                                        (300, 128, 200), (70, 2312, 4104), (70, 2312, 200)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_convolution(cuda, taps, rows, d, c, dtype):
    """With the norm and the product before it, and the bias after; one row is idle."""
    slots = torch.randperm(rows + 2, device="cuda")[:rows].int()
    slots[rows // 2] = -1 if rows > 1 else 2
    real = slots >= 0
    x, weight, bias, conv = randn(rows, d, dtype=dtype) * 3, randn(2 * c, d) / d**0.5, randn(2 * c), randn(c, taps)
    carry, out_bias = randn(rows + 2, taps - 1, c), randn(d)
    a, b, stream = carry.clone(), carry.float(), x.clone()
    y, left = cuda.norm_conv_step(stream, None, 1e-5, weight, bias, conv, out_bias, slots, a)
    ref, _ = decode_torch.norm_conv_step(x[real].float(), None, 1e-5, weight.float(), bias.float(), conv.float(), None,
                                         slots[real], b)
    assert error(y[real], ref) < 1e-2 and error(a, b) < 4e-3
    added = rows > cuda.MOST_ROWS and dtype == torch.bfloat16
    assert (left is None) == added and torch.equal(stream[real], (x + out_bias if added else x)[real])
    assert torch.equal(a[:, :-1][slots[real].long()], carry[:, 1:][slots[real].long()])
    rest = [i for i in range(rows + 2) if i not in slots.tolist()]
    assert torch.equal(a[rest], carry[rest])


@pytest.mark.parametrize("d", backends.HEAD_DIMS)
@pytest.mark.parametrize("f", backends.FEATURE_DIMS)
def test_taylor(cuda, slots, f, d):
    (rows, real), decay = slots, d % 32 == 0
    kv, z = randn(6, 2, taylor_feature_dim(f), d, dtype=torch.float32), torch.rand(6, 2, taylor_feature_dim(f)).cuda()
    z[..., 0] += 300
    log = torch.tensor([-0.1, -0.02], device="cuda") if decay else None
    a, b, pool, recent = (kv.clone(), z.clone()), (kv.clone(), z.clone()), Pool(100), randn(6, 2, cuda.RECENT, f + d)
    recent[:] = torch.nan                                  # what lies there from before is not read
    for _ in range(3 * cuda.RECENT + 1):
        x = randn(4, 2 * (2 * f + d))
        y = cuda.taylor_step_(x, rows, pool, *a, recent, log, f)
        ref = decode_torch.taylor_step_(x[real].float(), rows[real], pool, *b, None, log, f)
        assert error(y[real], ref) < 4e-3
        pool.positions[rows[real].long()] += 1
        whole = cuda.settled(pool, rows[real], *a, recent, log, f)
        assert all(error(ours, theirs[rows[real].long()]) < 2e-6 for ours, theirs in zip(whole, b, strict=True))


@pytest.mark.parametrize("d, half, capacity", [(64, 32, 256), (70, 17, 600), (70, 17, 4096), (112, 56, 64),
                                               (128, 64, 31), (16, 0, 8)])
def test_attention(cuda, slots, d, half, capacity):
    (rows, real), padded = slots, -(-d // 8) * 8
    positions = torch.tensor([0, 7, capacity - 1, 2 * capacity + 3 if capacity < 500 else 500, 5, capacity // 2],
                             dtype=torch.int32, device="cuda")
    keys, values = randn(2, 6, 2, capacity, padded)
    keys[..., d:] = values[..., d:] = 0
    rotation = decode_torch.rotations(positions[rows.clamp(min=0).long()], torch.rand(half, device="cuda"))
    x, a, b = randn(4, 2 * 3 * d), (keys.clone(), values.clone()), (keys.clone(), values.clone())
    y = cuda.attention_step(x, rows, positions, rotation, *a, d)
    decode_torch.attention_step(x[real], rows[real], positions, rotation[real], *b, d)
    ref = decode_torch.attention_step(x[real].float(), rows[real], positions, rotation[real],
                                      *(t.float() for t in b), d)
    assert error(y[real], ref) < 6e-3
    assert error(a[0], b[0]) < 1e-3 and torch.equal(a[1], b[1])
    got = cuda.rope_run(x, rotation, 2, d, padded)
    ref = decode_torch.rope_run(x.float(), rotation, 2, d, padded)
    assert all(error(p, q) < 4e-3 for p, q in zip(got, ref, strict=True))


def test_mixers_of_many_rows(cuda):
    """The input product of more rows than MOST_ROWS takes the stream without its norm, whose factor the mixer finds."""
    n, f, d, heads, window = 80, 16, 64, 2, 32
    slots = torch.randperm(n + 2, device="cuda")[:n].int()
    slots[7] = -1
    real = slots >= 0
    pool, log = Pool(100, slots=n + 2), torch.tensor([-0.1, -0.02], device="cuda")
    pool.positions, pool.starts = pool.positions % 40, pool.starts % 40
    rotation = decode_torch.rotations(pool.positions[slots.clamp(min=0).long()], torch.rand(d // 2, device="cuda"))
    for width in (72, 2312, 4400):
        x = randn(n, width) * 3
        kv, z = randn(n + 2, heads, taylor_feature_dim(f), d, dtype=torch.float32), torch.rand(n + 2, heads, 153).cuda()
        z[..., 0] += 300
        a, b, recent = (kv.clone(), z.clone()), (kv.clone(), z.clone()), randn(n + 2, heads, cuda.RECENT, f + d)
        weight = randn(heads * (2 * f + d), width) / width**0.5
        y = cuda.norm_taylor_step_(x, None, 1e-5, weight, slots, pool, *a, recent, log, f)
        ref = decode_torch.norm_taylor_step_(x[real].float(), None, 1e-5, weight.float(), slots[real], pool, *b, None,
                                             log, f)
        assert error(y[real], ref) < 1e-2
        pool.positions += 1                                          # one token lies in `recent`
        assert all(error(ours, theirs[slots[real].long()]) < 4e-3 for ours, theirs in
                   zip(cuda.settled(pool, slots[real], *a, recent, log, f), b, strict=True))
        pool.positions -= 1
        keys, values = randn(2, n + 2, heads, window, d)
        a, b = (keys.clone(), values.clone()), (keys.float(), values.float())
        weight = randn(heads * 3 * d, width) / width**0.5
        y = cuda.norm_attention_step(x, None, 1e-5, weight, slots, pool.positions, rotation, *a, d)
        ref = decode_torch.norm_attention_step(x[real].float(), None, 1e-5, weight.float(), slots[real], pool.positions,
                                               rotation[real], *b, d)
        assert error(y[real], ref) < 1.2e-2 and all(error(p, q) < 4e-3 for p, q in zip(a, b, strict=True))


class Pool:
    """What `embed_step` and `sample` read."""

    def __init__(self, vocab_size, temperature=0.0, top_k=0, top_p=1.0, slots=6):
        self.vocab_size = vocab_size
        self.tokens, self.positions, self.starts = (torch.arange(slots, device="cuda").int() for _ in range(3))
        self.temperature, self.top_p = (torch.full((slots,), x, device="cuda") for x in (temperature, top_p))
        self.top_k = torch.full((slots,), top_k, dtype=torch.int32, device="cuda")
        self.seeds = torch.randint(-2**62, 2**62, (slots,), device="cuda")
        self.chosen = torch.full((slots, 3), -1, dtype=torch.int32).pin_memory()
        self.logprobs = torch.full((slots, 3), torch.nan).pin_memory()

    def last(self, rows):
        """What `sample` left for these rows of slots; nothing else may be there."""
        torch.cuda.synchronize()
        rows = rows.long().cpu()
        place = rows, self.positions.cpu()[rows] % 3
        assert (self.chosen >= 0).sum() == self.logprobs.isfinite().sum() == len(rows)
        return self.chosen[place], self.logprobs[place]


def test_embedding_and_rotation_at_large_positions(cuda, slots):
    (rows, real), table = slots, randn(100, 72)
    pool, frequency = Pool(100), torch.tensor([1.0, 0.01], device="cuda")
    pool.positions += 1_000_000
    for first in (0, 4):
        x, rotation = cuda.embed_step(pool, rows, table, first, torch.float32, frequency)
        ref, angle = decode_torch.embed_step(pool, rows[real], table, first, torch.float32, frequency)
        assert torch.equal(x[real], ref) and (rotation[real] - angle).abs().max() < 1e-6


@pytest.mark.parametrize("options", [
    {}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 5}, {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 0.9, "top_k": 50, "top_p": 0.6}, {"temperature": 1.0, "top_p": 0.01}])
def test_sampling(cuda, slots, options):
    """Up to ties of noise the same token as in torch; ids beyond the vocabulary are never taken."""
    (rows, real), same = slots, 0
    logits = randn(4, 50304) * 3
    logits[:, 50257:] = 100
    for seed in range(10):
        torch.manual_seed(seed)
        a = Pool(50257, **options)
        torch.manual_seed(seed)
        b = Pool(50257, **options)
        idle = (0, 16, 96)[seed % 3]               # a cluster of 8 blocks a row, of 4, and a block
        b.chosen, b.logprobs = b.chosen.cuda(), b.logprobs.cuda()
        cuda.sample(logits.repeat(1 + idle // 4, 1), a, F.pad(rows, (0, idle), value=-1), 1)
        decode_torch.sample(logits[real], b, rows[real], 1)
        (x, p), (y, q) = a.last(rows[real]), (t.cpu() for t in b.last(rows[real]))
        same += (x == y).sum().item()
        assert torch.equal(a.positions, b.positions) and (x < 50257).all()
        agree = x == y
        assert (p[agree] - q[agree]).abs().max() < 2e-4
    assert same >= 29


@pytest.fixture(scope="module", params=["based", "attention"])
def pair(request):
    """The bf16 training module, its inference model, and the same module in fp32."""
    from based_mp.parallel import state
    state.initialize(device="cuda", seed=3)
    from based_mp.inference.model import InferenceModel
    from based_mp.model.based_model import build_model
    sizes = BASED if request.param == "based" else ATTENTION
    made = [tiny_config(model=sizes, training={"precision": p, "device": "cuda", "seq_length": 512})
            for p in ("bf16", "fp32")]
    module, exact = (as_trained(build_model(config).eval()) for config in made)
    exact.load_state_dict({name: weight.float() for name, weight in module.state_dict().items()})
    model = InferenceModel(module, made[0].model)
    assert model.ops.__name__.endswith("decode_cuda")
    yield module, model, exact
    state.destroy()


def decoded(model, tokens, cut, last):
    """Logits at every position: prefill, single tokens, and a prefill that continues."""
    slots = torch.randperm(len(tokens) + 5)[: len(tokens)].tolist()
    pool = model.new_pool(len(tokens) + 5, tokens.shape[1])
    rows = torch.tensor(slots, dtype=torch.int32, device="cuda")

    def part(a, e):
        pieces = [row[a:e].tolist() for row in tokens]
        return model.prefill(pool, pieces, slots, [a] * len(slots), every=True).view(len(slots), e - a, -1)

    out = [part(0, cut)]
    for t in range(cut, last):
        pool.tokens[rows.long()] = tokens[:, t].int()
        out.append(model.step(pool, rows)[:, None])
        pool.positions[rows.long()] += 1
    return torch.cat([*out, part(last, tokens.shape[1])], 1).float()


@pytest.mark.parametrize("rows, length", [(3, 400), (12, 200), (40, 120), (90, 120)])
def test_as_exact_as_the_full_forward(pair, rows, length):
    """Against fp32, prefill + decode is no worse than the bf16 forward pass."""
    module, model, exact = pair
    tokens = torch.randint(0, 120, (rows, length), device="cuda")
    with torch.no_grad():
        truth, full = (m(tokens, torch.zeros_like(tokens), None) for m in (exact, module))
    got = decoded(model, tokens, 3 * length // 8, 3 * length // 4)
    print(f"relative error: decode {error(got, truth):.2e}, full forward {error(full, truth):.2e}")
    assert error(got, truth) < 1.2 * error(full, truth) + 1e-3
    ours, theirs = ((x.argmax(-1) == truth.argmax(-1)).float().mean().item() for x in (got, full))
    assert ours > theirs - 0.01


def test_long_decoding_does_not_drift(pair):
    """The perplexity of 4096 tokens by single steps is that of all at once, and losses part no further with time."""
    from benchmarks.long_decode import decoded_losses, parallel_losses
    model = pair[1]
    tokens = torch.randint(0, 120, (4096,), device="cuda")
    stepped, whole = decoded_losses(model, tokens), parallel_losses(model, tokens)
    first, late = ((stepped - whole)[part].square().mean().sqrt().item() for part in (slice(1024), slice(-1024, None)))
    ratio = (stepped.mean() - whole.mean()).exp().item()
    print(f"perplexity ratio {ratio:.6f}; losses differ by {first:.2e} at first, {late:.2e} at last")
    assert abs(ratio - 1) < 1e-3
    assert 0 < first < 5e-2 and late < 1.3 * first + 2e-3


def run(model, graphs, slots):
    from based_mp.inference.engine import Engine, Sequence
    from based_mp.inference.sampling import Sampling
    engine = Engine(model, 0, slots=slots, length=512, graphs=graphs, prefill_tokens=64)
    sequences = [Sequence(list(range(1, 2 + 9 * (i % 11))), Sampling(40 - i % 11, 0.9 * (i % 2), None, 0.95, i))
                 for i in range(slots + 3)]
    for sequence in sequences:
        engine.submit(sequence)
    while not engine.idle:
        engine.step()
    assert sorted(engine.free) == list(range(slots))
    assert engine.prefiller._packs and bool(engine.prefiller._captured) == graphs
    return sequences


@pytest.mark.parametrize("slots", [8, 100])
def test_graphs_equal_eager_bitwise(pair, slots):
    """Sequences come and go through several batch sizes."""
    eager, graphs = (run(pair[1], graphs, slots) for graphs in (False, True))
    assert all(a.tokens == b.tokens and a.logprobs == b.logprobs for a, b in zip(eager, graphs, strict=True))
    assert len({len(s.tokens) for s in graphs}) > 1


def test_ragged_batch_equals_each_alone(pair):
    """The states and logits after prompts of different lengths, in passes that cut some, and alone."""
    from based_mp.inference.engine import Engine, Sequence
    from based_mp.inference.sampling import Sampling
    model = pair[1]
    together = Engine(model, 0, slots=4, length=512, prefill_tokens=64)
    prompts = [torch.randint(1, 120, (n,)).tolist() for n in (1, 40, 200, 63)]
    logits = together.prefill([Sequence(p, Sampling(), slot=i) for i, p in enumerate(prompts)])
    for i, prompt in enumerate(prompts):
        alone = Engine(model, 0, slots=1, length=512)
        assert error(logits[i], alone.prefill([Sequence(prompt, Sampling(), slot=0)])[0]) < 2e-2


def test_prompts_after_states_are_graphs_too(pair):
    """What continues a state, beside a prompt that starts a document: as eager bitwise, and as the whole text alone."""
    from based_mp.inference.engine import Engine, Sequence
    from based_mp.inference.sampling import Sampling
    model, start = pair[1], torch.randint(1, 120, (90,)).tolist()
    ends = [torch.randint(1, 120, (n,)).tolist() for n in (1, 17, 5, 30, 2)]
    results = []
    for graphs in (False, True):
        engine = Engine(model, 0, slots=5, length=512, graphs=graphs)
        state = engine.state_of(start)
        for _ in range(3):                             # the second time is captured, the third replayed
            sequences = [Sequence(end, Sampling(), state if i != 2 else None, slot=i) for i, end in enumerate(ends)]
            logits = engine.prefill(sequences).clone()
        results.append(logits)
        assert ((64, 9, False) in engine.prefiller._packs) == model.continuable
        assert ((64, 9, False) in engine.prefiller._captured) == (graphs and model.continuable)
    assert torch.equal(*results)
    for i, end in enumerate(ends):
        alone = Engine(model, 0, slots=1, length=512)
        text = end if i == 2 else start + end
        assert error(results[0][i], alone.prefill([Sequence(text, Sampling(), slot=0)])[0]) < 2e-2
