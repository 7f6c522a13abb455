"""What launch/pretrain.py leaves behind: TensorBoard, sample text, the newest checkpoints; and what signals do."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer, models

from data_prep.tokenizers import load_tokenizer
from tests.cpu.test_data_datasets import EOD, write_corpus
from tests.helpers import REPO, die_with_parent, free_port, run_distributed
from tests.models import tiny_config

TRAIN = ["train/loss", "train/perplexity", "train/lr", "train/grad_norm", "speed/tokens_per_second_per_gpu",
         "speed/mfu", "speed/data_wait", "memory/gib"]
VALID = [f"{name}/{kind}" for name in ("valid", "valid_two", "valid_held out") for kind in ("loss", "perplexity")]
HEALTH = ["linear_attention/min_denominator_layer_1", "linear_attention/state_norm_layer_1"]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """One training corpus, two for validation, a tokenizer of letters, documents kept apart."""
    folder = tmp_path_factory.mktemp("run")
    letters = str(folder / "letters.json")
    Tokenizer(models.BPE({"<|endoftext|>": EOD} | {chr(i + 32): i for i in range(1, 95)}, [])).save(letters)
    sha256 = load_tokenizer("hf", model=letters).fingerprint()
    corpora = [write_corpus(folder / name, base, 400, tokenizer={"sha256": sha256})
               for name, base in (("one", 1), ("two", 31), ("three", 61))]
    file = folder / "run.yaml"
    file.write_text(tiny_config(
        data={"train": [{"path": corpora[0]}], "cache_dir": str(folder / "cache"), "valid": [
            {"path": corpora[1], "weight": 3.0}, {"path": corpora[2], "name": "held out"}],
            "tokenizer": {"type": "hf", "model": letters}, "eod_mask_loss": True, "reset_state_at_documents": True},
        training={"steps": 6}, validation={"interval": 2, "batches": 1},
        logging={"log_interval": 1, "sample_interval": 2, "sample_tokens": 5, "sample_prompt": "ab"},
        checkpoint={"interval": 1, "keep_last": 2}).to_yaml())
    return file


def options(folder: Path) -> list[str]:
    return [f"checkpoint.dir={folder}/checkpoints", f"logging.tensorboard_dir={folder}/tensorboard"]


def pretrain(processes: int, config: Path, folder: Path, *overrides: str) -> str:
    return run_distributed(processes, REPO / "launch" / "pretrain.py",
                           ["--config", config, *options(folder), *overrides])[0]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def points(found: EventAccumulator, tag: str) -> dict[int, float]:
    """Value by step; every step once and in order."""
    steps = [event.step for event in found.Scalars(tag)]
    assert steps == sorted(set(steps)), (tag, steps)
    return {event.step: event.value for event in found.Scalars(tag)}


@pytest.fixture(scope="module")
def single(config, tmp_path_factory) -> Path:
    """The folder of a run on one process that got to step 5 and went on from step 4."""
    folder = tmp_path_factory.mktemp("single")
    pretrain(1, config, folder, "training.steps=5")
    assert checkpoints(folder) == ["latest", "step_00000004", "step_00000005"]         # keep_last
    (folder / "checkpoints" / "latest").write_text("step_00000004")
    assert "step_00000004 at step 4" in pretrain(1, config, folder)
    return folder


def test_tensorboard_has_every_curve_once(single):
    found = events(single)
    assert sorted(found.Tags()["scalars"]) == sorted(TRAIN + VALID + HEALTH)
    for tag in TRAIN:
        assert list(points(found, tag)) == [1, 2, 3, 4, 5, 6], tag
    for tag in VALID + HEALTH:
        assert list(points(found, tag)) == [2, 4, 6], tag
    loss, two, other = (points(found, f"{name}/loss") for name in ("valid", "valid_two", "valid_held out"))
    assert all(loss[step] == pytest.approx((3 * two[step] + other[step]) / 4) for step in loss)
    assert points(found, "train/lr")[3] == pytest.approx(3e-3)
    assert points(found, "train/loss")[6] < points(found, "train/loss")[1]


def test_tensorboard_has_config_and_sample_text(single):
    found = events(single)
    [text] = [event.tensor_proto.string_val[0].decode() for event in found.Tensors("config/text_summary")
              if event.step == 0]
    assert "feature_dim: 8" in text and "clip_grad_norm: 0.5" in text
    samples = found.Tensors("sample/text_summary")
    assert [event.step for event in samples] == [2, 4, 6]
    assert all(event.tensor_proto.string_val[0].decode().startswith("ab") for event in samples)


@pytest.mark.parametrize("layout", [["parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true"],
                                    ["parallel.zero_stage=3"]], ids=["tensor parallel", "data parallel"])
def test_numbers_do_not_depend_on_the_layout(config, single, tmp_path, layout):
    """Losses are over all tokens that count, health over all ranks; writing text leaves the training as it was."""
    pretrain(2, config, tmp_path, "training.steps=4", *layout)
    one, two = events(single), events(tmp_path)
    for tag in ["train/loss", *VALID, *HEALTH]:
        a, b = points(one, tag), points(two, tag)
        assert [b[step] for step in b] == pytest.approx([a[step] for step in b], rel=1e-4), tag
    texts = [[event.tensor_proto.string_val[0] for event in found.Tensors("sample/text_summary")]
             for found in (one, two)]
    assert texts[1] == texts[0][:2]


@pytest.mark.parametrize("mistake, told", [
    ("training.stepz=3", "unknown key training.stepz"), ("training.global_batch_size=6", "global_batch_size=6"),
    ("data.train.0.path=nowhere", "nowhere.bin is missing")])
def test_a_mistake_is_told_once(config, tmp_path, mistake, told):
    """Whether all processes find it before they meet or after."""
    outputs = run_distributed(2, REPO / "launch" / "pretrain.py", ["--config", config, *options(tmp_path), mistake],
                              check=False)
    lines = [line for output in outputs for line in output.splitlines()]
    assert len(lines) == 1 and lines[0].startswith("error: ") and told in lines[0], lines
    assert not (tmp_path / "checkpoints").exists()


@contextlib.contextmanager
def running(command: list[str | Path], log: Path, until: str) -> Iterator[subprocess.Popen]:
    """The command in a process group of its own, from the moment its output has `until`."""
    # Tests that join a group of one in this process leave its variables behind.
    environment = {name: value for name, value in os.environ.items()
                   if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=REPO, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                                   env=environment | {"DS_ACCELERATOR": "cpu"}, preexec_fn=die_with_parent)
    try:
        end = time.monotonic() + 180
        while until not in log.read_text() and process.poll() is None:
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def saved_step(folder: Path) -> int:
    return int((folder / "checkpoints" / "latest").read_text().removeprefix("step_"))


LONG = ["training.steps=2000", "checkpoint.interval=0", "validation.interval=0", "logging.sample_interval=0"]


SRUN = """for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=2 SLURM_STEP_ID=0 SLURM_JOB_ID=$0 \\
  "$@" & done; wait -n && wait -n"""


@pytest.mark.parametrize("launcher", ["deepspeed", "mpirun", "srun"])
def test_launchers(config, tmp_path, launcher):
    """Two processes meet and train; srun is played by its variables (torchrun starts another test)."""
    if launcher == "mpirun" and not (shutil.which("mpirun") and importlib.util.find_spec("mpi4py")):
        pytest.skip("mpirun or mpi4py is not installed (apt-get install openmpi-bin; pip install '.[mpi]')")
    script = ["launch/pretrain.py", "--config", config, *options(tmp_path), *LONG, "training.steps=1"]
    command = {
        "deepspeed": [Path(sys.executable).parent / "deepspeed", "--num_accelerators", "2", "--master_port",
                      str(free_port()), *script],
        "mpirun": ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, *script],
        "srun": ["bash", "-c", SRUN, str(os.getpid()), sys.executable, *script]}[launcher]
    with running(command, tmp_path / "log", "saved") as process:
        assert process.wait(100) == 0, (tmp_path / "log").read_text()
    meta = json.loads((tmp_path / "checkpoints" / "step_00000001" / "meta.json").read_text())
    assert meta["layout"]["data_parallel"] == 2


def test_sigterm_to_all_processes_of_a_job_saves(config, tmp_path):
    """slurm's way: the loaders get it too."""
    command = [sys.executable, "launch/pretrain.py", "--config", config, *options(tmp_path), *LONG,
               "data.num_workers=2"]
    with running(command, tmp_path / "log", "step      3/") as process:
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(100) == 0, (tmp_path / "log").read_text()
    assert "asked to stop" in (tmp_path / "log").read_text()
    step = saved_step(tmp_path)
    assert step >= 3
    assert f"at step {step}" in pretrain(1, config, tmp_path, *LONG, f"training.steps={step + 1}")
    assert saved_step(tmp_path) == step + 1


def test_sigusr1_to_one_rank_saves_and_ends_all(config, tmp_path):
    """As torchrun starts them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port",
               str(free_port()), "launch/pretrain.py", "--config", config, *options(tmp_path), *LONG]
    with running(command, tmp_path / "log", "step      3/") as process:
        ranks = psutil.Process(process.pid).children()
        assert len(ranks) == 2
        ranks[1].send_signal(signal.SIGUSR1)
        assert process.wait(100) == 0, (tmp_path / "log").read_text()
    assert saved_step(tmp_path) >= 3


def test_sigterm_in_a_long_validation_saves(config, tmp_path):
    command = [sys.executable, "launch/pretrain.py", "--config", config, *options(tmp_path), *LONG,
               "validation.interval=3", "validation.batches=20000", "data.num_workers=1"]
    with running(command, tmp_path / "log", "step      3/") as process:
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(100) == 0, (tmp_path / "log").read_text()
    assert saved_step(tmp_path) == 3
    assert "valid at" not in (tmp_path / "log").read_text()
    assert json.loads((tmp_path / "checkpoints" / "step_00000003" / "meta.json").read_text())["step"] == 3
