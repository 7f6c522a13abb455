"""launch/evaluate.py on a checkpoint of a run: perplexity, tasks, speed, and what it refuses."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.cpu.test_slices import write_corpus
from tests.helpers import REPO
from tests.models import tiny_config

pytestmark = pytest.mark.timeout(300)


def byte_tokenizer(path):
    """Byte-level tokens without merges, and <|endoftext|>."""
    import tokenizers
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.Tokenizer(tokenizers.models.BPE({**{c: i for i, c in enumerate(letters)},
                                                       "<|endoftext|>": 256}, []))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.save(str(path))
    return str(path)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of two steps with a GLA layer among BASED's."""
    from based_mp.parallel import state
    from based_mp.training.loop import Trainer
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    train, test = (write_corpus(folder, name, rng.integers(0, 257, 3000)) for name in ("train", "test"))
    config = tiny_config(
        model={"vocab_size": 257, "mixer_layers": {"gla": [3]}, "gla": {"num_heads": 2, "gate_rank": 4}},
        data={"train": [{"path": train}], "test": [{"path": test, "name": "books"}], "cache_dir": str(folder / "cache"),
              "tokenizer": {"type": "hf", "model": byte_tokenizer(folder / "tokenizer.json")}},
        training={"steps": 2}, checkpoint={"dir": str(folder / "checkpoints")}, validation={"batches": 1})
    Trainer(config, state.initialize(device="cpu")).run()
    state.destroy()
    return folder


def launch(*command):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MASTER_", "RANK", "WORLD_SIZE", "LOCAL_RANK"))}
    return subprocess.run([sys.executable, *command], cwd=REPO, capture_output=True, text=True, timeout=250, env=clean)


def evaluate(folder, *options):
    return launch("launch/evaluate.py", "--checkpoint", folder / "checkpoints", "--device", "cpu", "--output",
                  folder / "results.json", *options)


def test_perplexity_and_speed_land_in_one_file(run_folder):
    for options in (["--perplexity", "test"], ["--speed", "2x20x4"]):
        result = evaluate(run_folder, "--name", "tiny", *options)
        assert result.returncode == 0, result.stderr
    record = json.loads((run_folder / "results.json").read_text())["tiny"]
    books = record["perplexity"]["books"]
    assert books["tokens"] == 8 * 32 and 100 < books["perplexity"] < 600
    assert books["other_perplexity"] == pytest.approx(books["perplexity"], rel=0.1)
    assert record["speed"]["tokens_per_second"] > 0 and record["speed"]["state_bytes"] > 1000


def test_recall_task_on_a_checkpoint(run_folder):
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    documents = [{"text": f"the value is {i}, I say", "value": str(i)} for i in range(3)]
    (run_folder / "fda.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    result = evaluate(run_folder, "--task", f"fda={run_folder / 'fda.jsonl'}", "--samples", "--limit", "2",
                      "--max-length", "80")
    assert result.returncode == 0, result.stderr
    task = json.loads(result.stdout)["tasks"]["fda"]
    assert task["documents"] == 2 == len(task["samples"])
    assert 0 <= task["metrics"]["contains"]["value"] <= 1


def test_the_tradeoff_in_one_command(run_folder, tmp_path):
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    pytest.importorskip("matplotlib")
    (tmp_path / "swde.jsonl").write_text(json.dumps({"text": "one is", "value": "1"}) + "\n")
    command = ["launch/tradeoff.py", "--model", f"tiny={run_folder / 'checkpoints'}", "--task",
               f"swde={tmp_path / 'swde.jsonl'}", "--speed", "2x8x4", "--device", "cpu", "--output", tmp_path / "t.png"]
    result = launch(*command)
    assert result.returncode == 0, result.stderr
    assert "| tiny |" in result.stdout and (tmp_path / "t.png").exists()
    measured = (tmp_path / "t.json").read_text()
    again = launch(*command)
    assert again.stdout == result.stdout and (tmp_path / "t.json").read_text() == measured
    broken = launch("launch/tradeoff.py", "--model", "other=nowhere", "--output", tmp_path / "t.png")
    assert broken.returncode != 0 and "other could not be measured" in broken.stderr


@pytest.mark.parametrize("options, told", [
    ([], "nothing to measure"), (["--task", "swde"], "NAME=FILE"), (["--task", "swde=nowhere.jsonl"], "is missing"),
    (["--speed", "fast"], "16x1024x128")])
def test_mistakes_are_told(run_folder, options, told):
    result = evaluate(run_folder, *options)
    assert result.returncode != 0 and told in result.stderr and result.stderr.count("\n") == 1, result.stderr


WITHOUT_EXTRAS = """
import importlib, importlib.util, sys
real, missing = importlib.util.find_spec, ("lm_eval", "datasets", "fla")
sys.modules.update({name: None for name in missing})
importlib.util.find_spec = lambda name, *more: None if name in missing else real(name, *more)
for module in ("training.loop", "inference.server", "evaluation.recall_sweep", "evaluation.perplexity"):
    importlib.import_module("based_mp." + module)
from based_mp.config import ModelConfig
from based_mp.errors import UserError
from based_mp.model.layer_specs import block_spec
model = {"d_model": 64, "num_layers": 2, "num_heads": 2, "other_layers": "gla"}
block_spec(ModelConfig(**model))
for use in (lambda: importlib.import_module("based_mp.evaluation.harness"),
            lambda: block_spec(ModelConfig(**model, kernels="fla"))):
    try:
        use()
    except UserError as error:
        print(error)
"""


def test_without_the_extras_everything_else_works():
    result = launch("-c", WITHOUT_EXTRAS)
    assert result.returncode == 0, result.stderr
    told = [line for line in result.stdout.splitlines() if "[WARNING]" not in line]        # DeepSpeed's, of no GPU
    assert len(told) == 2 and "pip install '.[eval]'" in told[0] and "pip install '.[fla]'" in told[1]
