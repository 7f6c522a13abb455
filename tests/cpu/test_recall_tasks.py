"""The recall tasks' sanity ladder: an oracle has 100, a silent model 0, the harness's own metric agrees with ours."""

import json
import random

import pytest
import torch
import zstandard

from based_mp.errors import UserError
from based_mp.evaluation import recall

pytest.importorskip("lm_eval", reason="needs the extra eval")


def documents(count=12, seed=0):
    rng = random.Random(seed)
    out = []
    for i in range(count):
        value = "".join(rng.choices("abc(+.*)XYZ 019", k=rng.randint(1, 12))).strip() or "x"
        text = f"  name: {value}\nother: {rng.random()}\nthe name is "
        out.append({"doc_id": str(i), "key": "name", "value": f" {value} ", "text": text})
    return out


def write(path, items):
    text = "".join(json.dumps(item) + "\n" for item in items).encode()
    path.write_bytes(zstandard.compress(text) if path.suffix == ".zst" else text)
    return str(path)


class Letters:
    """A tokenizer of single characters."""

    vocab_size, eod = 120, 0

    def encode(self, text):
        return [ord(c) - 9 if c == "\n" else ord(c) - 30 for c in text]

    def decode(self, ids):
        return "".join(chr(i + 9) if i == 1 else chr(i + 30) for i in ids)


class Answers:
    """A generator that answers from the prompt by a rule."""

    tokenizer = Letters()

    def __init__(self, rule):
        self.rule, self.prompts = rule, []

    def generate(self, prompts, *, max_new_tokens, stop):
        from based_mp.inference.generate import Completion
        assert max_new_tokens == 48 and stop == ["\n"]
        self.prompts += prompts
        return [Completion(text=self.rule(self.tokenizer.decode(p))) for p in prompts]


def harness_model(rule, max_length=2048):
    from based_mp.evaluation.harness import HarnessModel
    module = torch.nn.Module()
    module.embedding = torch.nn.Module()
    module.embedding.word_embeddings = torch.nn.Embedding(2, 2)
    return HarnessModel(module, Answers(rule), max_length=max_length, batch_size=5)


@pytest.mark.parametrize("task", recall.TASKS)
def test_oracle_and_silence(task, tmp_path):
    from based_mp.evaluation.harness import evaluate
    path = write(tmp_path / "d.jsonl.zst", documents())

    def score(rule):
        return evaluate(harness_model(rule), {task: path})["tasks"][task]

    oracle = score(lambda prompt: "well, " + prompt.split("name: ")[1].split("\n")[0].swapcase() + " it is")
    assert oracle["metrics"]["contains"]["value"] == 1 and oracle["documents"] == 12
    assert score(lambda prompt: "")["metrics"]["contains"]["value"] == 0
    half = score(lambda prompt: prompt.split("name: ")[1].split("\n")[0] if float(prompt.split(": ")[2].split("\n")[0])
                 < 0.5 else "")["metrics"]["contains"]
    low, high = half["ci95"]
    assert 0 < half["value"] < 1 and low < half["value"] < high
    low, high = oracle["metrics"]["contains"]["ci95"]                      # Wilson: 12 / (12 + 1.96²)
    assert low == pytest.approx(0.7575, abs=1e-3) and high == 1


def test_long_prompts_lose_their_beginning(tmp_path):
    from based_mp.evaluation.harness import evaluate
    model = harness_model(lambda prompt: "", max_length=60)
    result = evaluate(model, {"swde": write(tmp_path / "d.jsonl", documents(3))}, limit=2)
    assert result["tasks"]["swde"]["documents"] == 2 and result["harness"].startswith("lm-eval 0.")
    assert model.generator.prompts
    assert all(len(p) == 12 and Letters().decode(p) == "\nthe name is" for p in model.generator.prompts)


def test_our_metric_is_the_harness_metric():
    from lm_eval.tasks.fda.task import contains_score
    rng = random.Random(1)
    agreed = {True: 0, False: 0}
    for _ in range(200):
        value = "".join(rng.choices("ab(.*+)? AB", k=rng.randint(1, 3))).strip() or "a"
        continuation = "".join(rng.choices("ab(.*+)? AB\n", k=rng.randint(0, 30)))
        ours = recall.contains(value, continuation)
        assert ours == bool(contains_score(continuation, [value]))
        agreed[ours] += 1
    assert min(agreed.values()) > 20


@pytest.mark.parametrize("text, told", [
    ("{}", "document 1 has no text"), ('{"text": "a"}', "no value"), ("[]", "not a JSON object"), ("{", "not JSON"),
    ("", "no document")])
def test_bad_files_are_told(tmp_path, text, told):
    (tmp_path / "d.jsonl").write_text(text)
    with pytest.raises(UserError, match=told):
        recall.read_recall_documents(tmp_path / "d.jsonl")


@pytest.fixture(scope="module")
def real_model():
    from based_mp.evaluation.harness import HarnessModel
    from based_mp.inference.generate import Generator
    from based_mp.inference.model import InferenceModel
    from based_mp.model.based_model import build_model
    from based_mp.parallel import state
    from tests.models import tiny_config
    state.initialize(device="cpu", seed=3)
    config = tiny_config(model={"init_std": 0.2})
    module = build_model(config).eval()
    yield HarnessModel(module, Generator(InferenceModel(module, config.model), Letters()), max_length=64, batch_size=3)
    state.destroy()


def test_scores_are_the_sums_of_log_probabilities(real_model):
    rows = [([5, 9, 17], [3, 40]), ([7] * 90, [1, 2, 3]), ([2], [4])]
    got = real_model._loglikelihood_tokens([(("", ""), c, t) for c, t in rows], disable_tqdm=True)
    for (context, target), (score, greedy) in zip(rows, got, strict=True):
        ids = torch.tensor([(context + target)[-65:]])
        with torch.no_grad():
            logits = real_model.module(ids[:, :-1], ids[:, :-1] * 0, None)[0, -len(target):, :120].log_softmax(-1)
        assert score == pytest.approx(sum(logits[i, t].item() for i, t in enumerate(target)), rel=1e-4)
        assert greedy == (logits.argmax(-1).tolist() == target)


def test_library_tasks_on_local_files(real_model, tmp_path):
    from based_mp.evaluation.harness import evaluate
    piqa = [{"goal": "open it", "sol1": "push", "sol2": "pull", "label": i % 2} for i in range(4)]
    arc = [{"id": "a", "question": "what is two", "choices": {"text": ["2", "3"], "label": ["A", "B"]},
            "answerKey": "A"}]
    lambada = [{"text": "the cat sat on the mat"}]
    winogrande = [{"sentence": "Ann met Bo and _ left.", "option1": "Ann", "option2": "Bo", "answer": "2"}]
    files = {"piqa": piqa, "arc_easy": arc, "lambada_openai": lambada, "winogrande": winogrande}
    result = evaluate(real_model, {name: write(tmp_path / f"{name}.jsonl", items) for name, items in files.items()})
    tasks = result["tasks"]
    assert tasks["piqa"]["metrics"]["acc"]["value"] == 0.5 and tasks["piqa"]["documents"] == 4
    assert tasks["lambada_openai"]["metrics"]["perplexity"]["value"] > 1
    assert set(tasks) == set(files)
    with pytest.raises(UserError, match="no task nonsense"):
        evaluate(real_model, {"nonsense": str(tmp_path / "piqa.jsonl")})


def test_a_text_is_scored_in_windows(real_model):
    from lm_eval.api.instance import Instance
    text = "the quick brown fox " * 10
    ids = Letters().encode(text)
    got = real_model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)[0]
    alone = real_model._loglikelihood_tokens([(("", ""), [0], ids[:64])], disable_tqdm=True)[0][0]
    assert got < alone < 0
