"""Mistakes of a user that no other file tests: each ends in one sentence that says what to change."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from based_mp.data.datasets import check_corpora
from based_mp.errors import UserError
from based_mp.export import export_safetensors
from based_mp.inference.load import full_state
from based_mp.model.based_model import build_model
from based_mp.parallel import state
from based_mp.training import checkpoint as ckpt
from tests.cpu.test_data_datasets import EOD, write_corpus
from tests.models import tiny_config

REPO = Path(__file__).parents[2]
WEIGHTS = "mp_rank_00_model_states.pt"


def checkpoint(root: Path) -> Path:
    """A published checkpoint with the weights of a small model, as DeepSpeed would write them with ZeRO-1."""
    config = tiny_config()
    folder, temporary = root / "step_00000005", root / ".writing"
    temporary.mkdir(parents=True)
    weights = {name: p.detach() for name, p in build_model(config).named_parameters()}
    torch.save({"module": weights}, temporary / WEIGHTS)
    ckpt.write_config(temporary, config)
    ckpt.publish(temporary, folder, {
        "step": 5, "samples": 5, "universal": False, "architecture": ckpt.architecture(config.model),
        "layout": {"tensor_parallel": 1, "data_parallel": 1, "zero_stage": 1}})
    return folder


def damage(file: Path) -> None:
    """Zero both ends of a file, whose size stays what meta.json tells."""
    data = bytearray(file.read_bytes())
    data[:400] = data[-400:] = bytes(400)
    file.write_bytes(data)


def test_damaged_bytes_of_the_right_length(tmp_path, gloo_process):
    folder, model = checkpoint(tmp_path / "run"), build_model(tiny_config())
    assert full_state(folder, model)
    damage(folder / WEIGHTS)
    with pytest.raises(UserError, match="mp_rank_00_model_states.pt is damaged"):
        full_state(folder, model)
    kept = tmp_path / "kept.safetensors"
    kept.write_bytes(b"another file")
    with pytest.raises(UserError, match="is damaged"):
        export_safetensors(folder, kept, model)
    assert kept.read_bytes() == b"another file"


def test_resharding_damaged_bytes_leaves_nothing(tmp_path, gloo_process):
    folder = checkpoint(tmp_path / "run")
    optimizer = folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": {}}, optimizer)
    ckpt.write_meta(folder, ckpt.read_meta(folder))
    damage(folder / WEIGHTS)
    done = subprocess.run(
        [sys.executable, "launch/convert.py", "reshard", "--checkpoint", tmp_path / "run", "--output",
         tmp_path / "new"], cwd=REPO, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(REPO)})
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "error: cannot convert" in done.stderr and "invalid load key" in done.stderr
    assert "the source is unchanged" in done.stderr
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("size", [0, -1, 2])
def test_tensor_parallel_size_that_the_processes_do_not_fit(size):
    with pytest.raises(UserError, match=f"tensor-parallel groups of {size}"):
        state.initialize(size, device="cpu")


def test_slurm_without_scontrol(monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node-[1-2]")
    monkeypatch.setenv("SLURM_NNODES", "2")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="export MASTER_ADDR"):
        state._first_slurm_host()


def test_corpus_without_read_permission(tmp_path, monkeypatch):
    """Root reads everything, so the system's answer is played."""
    prefix = write_corpus(tmp_path / "one", 1, 20)

    def refuse(_: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), f"{prefix}.json")

    config = tiny_config(data={"train": [{"path": prefix}]})
    assert check_corpora(config) == EOD
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match=r"cannot read .*one\.json .*correct its permissions"):
        check_corpora(config)
