"""Checkpoints: DeepSpeed shards written under a temporary name, published by one rename, `latest` switched last.

DIR/step_00000100/   DeepSpeed's shards, config.yaml, the tokenizer's files, meta.json (layout, every file's size)
DIR/latest           the name of the newest complete checkpoint
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from based_mp.config import Config, ModelConfig, TokenizerConfig
from based_mp.errors import UserError
from based_mp.parallel.state import Ranks

LATEST = "latest"
TOKENIZER = "tokenizer"


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def save(engine: Any, directory: str | Path, config: Config, ranks: Ranks, step: int) -> Path:
    """Write the training state after `step` steps; on any failure the older checkpoints stay as they are."""
    root = Path(directory)
    final, temporary = root / step_name(step), root / f".writing_{step_name(step)}"
    with _all_ranks(f"cannot write the checkpoint {final}; older checkpoints are unchanged"):
        if ranks.rank == 0:
            root.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            _check_space(engine, root, ranks)
    with _all_ranks(f"cannot write the checkpoint {final}; older checkpoints are unchanged", temporary):
        engine.save_checkpoint(str(root), tag=temporary.name, client_state={"step": step}, save_latest=False)
    with _all_ranks(f"cannot publish the checkpoint {final}; older checkpoints are unchanged", temporary):
        if ranks.rank == 0:
            _describe(temporary, config, ranks, step)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
            write_latest(root, final.name)
            _prune(root, config.checkpoint.keep_last)
    return final


def load(engine: Any, checkpoint: Path, config: Config, ranks: Ranks) -> int:
    """Put the state of `checkpoint` into the engine; returns the step to go on from. Raises UserError."""
    meta = read_meta(checkpoint)
    check_compatible(meta, checkpoint, config, ranks)
    with _all_ranks(f"cannot read the checkpoint {checkpoint}"):
        path, client = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
        if path is None:
            raise RuntimeError("DeepSpeed found no state for this layout")
    return int(client.get("step", meta["step"]))


def write_latest(root: Path, name: str) -> None:
    """Point `latest` at a published checkpoint, in one step."""
    _write(root / LATEST, name)


def newest(directory: str | Path) -> Path | None:
    """The checkpoint that `latest` names; None where nothing was saved yet. Raises UserError where it is gone."""
    pointer = Path(directory) / LATEST
    if not pointer.is_file():
        return None
    checkpoint = Path(directory) / pointer.read_text().strip()
    if not checkpoint.is_dir():
        raise UserError(f"{pointer} names {checkpoint.name}, which is not there: write the name of an existing "
                        "step_… folder into it, or delete it to start again")
    return checkpoint


def resolve(path: str | Path) -> Path:
    """A checkpoint folder, or the newest one in a folder of checkpoints. Raises UserError where there is none."""
    path = Path(path)
    if (path / "meta.json").is_file():
        return path
    found = newest(path) if path.is_dir() else None
    if found is None:
        raise UserError(f"no checkpoint in {path}: give a step_… folder or a folder that holds `{LATEST}`")
    return found


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """meta.json, after checking that every file it lists is there whole."""
    try:
        meta = json.loads((checkpoint / "meta.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint} is not a complete checkpoint (no readable meta.json): use an older one by "
                        f"writing its name into {checkpoint.parent / LATEST}") from error
    for name, size in meta["files"].items():
        file = checkpoint / name
        if not file.is_file() or file.stat().st_size != size:
            raise UserError(f"{checkpoint} is damaged ({name} is missing or not {size} bytes long): use an older "
                            f"checkpoint by writing its name into {checkpoint.parent / LATEST}")
    return meta


def check_compatible(meta: dict[str, Any], checkpoint: Path, config: Config, ranks: Ranks) -> None:
    """UserError for another architecture or, unless universal, another layout."""
    ours, theirs = architecture(config.model), meta["architecture"]
    differing = [key for key in ours if ours[key] != theirs.get(key)]
    if differing:
        key = differing[0]
        raise UserError(f"{checkpoint} holds another architecture (model.{key} is {theirs.get(key)!r} there and "
                        f"{ours[key]!r} here): use its config, or another checkpoint.dir")
    here = layout(config, ranks)
    if meta["universal"] and here["zero_stage"] not in (1, 2):
        raise UserError(f"{checkpoint} was converted from ZeRO {meta['layout']['zero_stage']} and loads into ZeRO 1 or "
                        f"2, not {here['zero_stage']}: set parallel.zero_stage=1")
    if meta.get("weights_only"):
        return
    if not meta["universal"] and meta["layout"] != here:
        raise UserError(f"{checkpoint} was saved at {_show(meta['layout'])}, this run has {_show(here)}: convert it "
                        "with launch/convert.py reshard, or start the run with its layout")


def architecture(model: ModelConfig) -> dict[str, Any]:
    """What must be equal for weights to fit."""
    ignored = ("init_std", "kernels")
    return {key: value for key, value in model.model_dump().items() if key not in ignored}


def layout(config: Config, ranks: Ranks) -> dict[str, int]:
    return {"tensor_parallel": ranks.tp_size, "data_parallel": ranks.dp_size,
            "zero_stage": config.parallel.zero_stage}


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """meta.json with the size of every other file, all of them flushed to the disk."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "meta.json")
    for file in files:
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    meta["files"] = {str(p.relative_to(folder)): p.stat().st_size for p in files}
    _write(folder / "meta.json", json.dumps(meta, indent=1))


def write_config(folder: Path, config: Config) -> None:
    """config.yaml and copies of the tokenizer's files, so that a checkpoint generates wherever it is moved."""
    (folder / "config.yaml").write_text(config.to_yaml())
    if config.data.tokenizer is not None:
        (folder / TOKENIZER).mkdir()
        for file in tokenizer_files(config.data.tokenizer):
            shutil.copy(file, folder / TOKENIZER)


def _describe(folder: Path, config: Config, ranks: Ranks, step: int) -> None:
    write_config(folder, config)
    write_meta(folder, {
        "step": step, "samples": step * config.training.global_batch_size, "universal": False,
        "layout": layout(config, ranks), "architecture": architecture(config.model)})


def tokenizer_files(tokenizer: TokenizerConfig) -> list[str]:
    return [f for f in (tokenizer.model, tokenizer.vocab_file, tokenizer.merge_file) if f is not None]


def _show(where: dict[str, int]) -> str:
    return (f"TP {where['tensor_parallel']} × DP {where['data_parallel']}, ZeRO {where['zero_stage']}")


def _write(path: Path, text: str) -> None:
    """Replace a small file in one step."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)


def _prune(root: Path, keep: int) -> None:
    complete = sorted(p for p in root.glob("step_*") if p.is_dir())
    for old in complete[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    for left_over in root.glob(".writing_*"):
        shutil.rmtree(left_over, ignore_errors=True)


def _check_space(engine: Any, root: Path, ranks: Ranks) -> None:
    """Refuse before the first byte where the disk cannot hold fp32 weights and two moments."""
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters()) * ranks.tp_size
    need, free = parameters * 14, shutil.disk_usage(root).free
    if free < need:
        raise OSError(f"the disk has {free / 1e9:.2f} GB free and about {need / 1e9:.2f} GB are needed: free some, "
                      "lower checkpoint.keep_last or change checkpoint.dir")


class _all_ranks:
    """Run a block on every rank; if it failed on any, all raise one UserError, so that nobody waits for the dead."""

    def __init__(self, problem: str, temporary: Path | None = None) -> None:
        self.problem, self.temporary = problem, temporary

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if error is not None and not isinstance(error, Exception):
            return False
        device = torch.cuda.current_device() if dist.get_backend() == "nccl" else "cpu"
        failed = torch.tensor([error is not None], dtype=torch.int32, device=device)
        dist.all_reduce(failed)
        if not failed.item():
            return False
        if self.temporary is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)
        if isinstance(error, UserError):
            return False
        reason = " ".join(str(error).split())[:300] if error else "another rank failed"
        raise UserError(f"{self.problem}: {reason}") from error
