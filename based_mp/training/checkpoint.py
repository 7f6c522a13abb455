"""Checkpoints: DeepSpeed shards written under a temporary name, published by one rename, `latest` switched last.

DIR/step_00000100/   DeepSpeed's shards, config.yaml, the tokenizer's files, meta.json (layout, every file's size)
DIR/latest           the name of the newest complete checkpoint
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from pydantic import ValidationError

from based_mp.config import Config, ModelConfig, TokenizerConfig
from based_mp.errors import UserError
from based_mp.parallel.state import Ranks
from based_mp.training.quiet import quiet

LATEST = "latest"
TOKENIZER = "tokenizer"


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def prepare(directory: str | Path, ranks: Ranks) -> None:
    """Make the folder, so that a run which could not save does not start. Raises UserError."""
    with _all_ranks(f"cannot write to checkpoint.dir={directory}"):
        if ranks.rank == 0:
            Path(directory).mkdir(parents=True, exist_ok=True)
            if not os.access(directory, os.W_OK):
                raise PermissionError("no permission to write there")


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
        with _failing_at_the_end(engine):
            engine.save_checkpoint(str(root), tag=temporary.name, client_state={"step": step}, save_latest=False)
    with _all_ranks(f"cannot publish the checkpoint {final}; older checkpoints are unchanged", temporary):
        if ranks.rank == 0:
            write_config(temporary, config)
            shutil.rmtree(final, ignore_errors=True)
            publish(temporary, final, {
                "step": step, "samples": step * config.training.global_batch_size, "universal": False,
                "layout": layout(config, ranks), "architecture": architecture(config.model)})
            _prune(final, config.checkpoint.keep_last)
    return final


def save_weights(state: dict[str, torch.Tensor], config: Config, directory: str | Path) -> Path:
    """Write whole weights by our names as a checkpoint at step 0, which loads at any layout. Raises UserError."""
    final = Path(directory) / step_name(0)
    temporary = final.with_name(f".writing_{final.name}")
    check_unused(directory)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        torch.save({"module": state}, temporary / "mp_rank_00_model_states.pt")
        write_config(temporary, config)
        publish(temporary, final, {
            "step": 0, "samples": 0, "universal": False, "weights_only": True,
            "layout": {"tensor_parallel": 1, "data_parallel": 1, "zero_stage": 1},
            "architecture": architecture(config.model)})
    except (OSError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"cannot write {final}: {' '.join(str(error).split())[:300]}") from error
    return final


def load(engine: Any, checkpoint: Path, config: Config, ranks: Ranks) -> int:
    """Put the state of `checkpoint` into the engine; returns the step to go on from. Raises UserError."""
    meta = read_meta(checkpoint)
    check_compatible(meta, checkpoint, config, ranks)
    with _all_ranks(f"cannot read the checkpoint {checkpoint}"):
        _check_bytes(sorted(checkpoint.rglob("*.pt"))[ranks.rank :: ranks.world_size])
    with _all_ranks(f"cannot read the checkpoint {checkpoint}"):
        with quiet():
            path, client = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
        if path is None:
            raise RuntimeError("DeepSpeed found no state for this layout")
    # From a universal checkpoint DeepSpeed leaves AdamW's step count on the host, which the fused AdamW refuses.
    for parameter, state in getattr(engine.optimizer, "optimizer", engine.optimizer).state.items():
        if "step" in state:
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=parameter.device)
    return int(client.get("step", meta["step"]))


def _check_bytes(files: list[Path]) -> None:
    """Read what torch.save wrote against its checksums. OSError where bytes are damaged (sizes were checked before).

    The ranks share the files out before any loads its own: DeepSpeed's loading has barriers too.
    """
    for file in files:
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
        except (zipfile.BadZipFile, EOFError):
            damaged = file.name
        if damaged:
            raise OSError(f"the bytes of {file.name} are damaged; write the name of an older checkpoint into {LATEST}")


def publish(temporary: Path, final: Path, meta: dict[str, Any]) -> None:
    """Describe the finished folder `temporary`, give it its name `final` in one step and point `latest` at it."""
    write_meta(temporary, meta)
    os.replace(temporary, final)
    point_at(final)


def point_at(checkpoint: Path) -> None:
    """Make `latest` name this one of its folder's checkpoints."""
    _write(checkpoint.parent / LATEST, checkpoint.name)


def newest(directory: str | Path) -> Path | None:
    """The checkpoint that `latest` names; None where nothing was saved yet. Raises UserError where it is gone."""
    pointer = Path(directory) / LATEST
    if not pointer.is_file():
        return None
    checkpoint = Path(directory) / pointer.read_text().strip()
    if not checkpoint.is_dir():
        raise UserError(f"{pointer} names {checkpoint.name}, which is not there: write the name of an existing "
                        "step_… folder into it, or give another checkpoint.dir to start again")
    return checkpoint


def check_unused(directory: str | Path) -> None:
    """UserError where `directory` holds checkpoints: another run's must not be mixed with or written over."""
    if any(Path(directory).glob("step_*")):
        raise UserError(f"{directory} holds checkpoints already: give another folder, or remove them")


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
        sizes = {checkpoint / name: size for name, size in meta["files"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{checkpoint} is not a complete checkpoint (no readable meta.json): use an older one by "
                        f"writing its name into {checkpoint.parent / LATEST}") from error
    for file, size in sizes.items():
        if not file.is_file() or file.stat().st_size != size:
            raise UserError(f"{checkpoint} is damaged ({file.name} is missing or not {size} bytes long): use an older "
                            f"checkpoint by writing its name into {checkpoint.parent / LATEST}")
    return meta


def check_compatible(meta: dict[str, Any], checkpoint: Path, config: Config, ranks: Ranks) -> None:
    """UserError for another architecture or, unless universal, another layout."""
    ours, theirs = architecture(config.model), meta["architecture"]
    with contextlib.suppress(ValidationError):           # keys that did not exist when it was written: their defaults
        theirs = architecture(ModelConfig.model_validate(theirs))
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
            "zero_stage": config.deepspeed_stage}


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


def tokenizer_files(tokenizer: TokenizerConfig) -> list[str]:
    return [f for f in (tokenizer.model, tokenizer.vocab_file, tokenizer.merge_file) if f is not None]


def _show(where: dict[str, int]) -> str:
    return (f"TP {where['tensor_parallel']} × DP {where['data_parallel']}, ZeRO {where['zero_stage']}")


def _write(path: Path, text: str) -> None:
    """Replace a small file in one step."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _prune(newest: Path, keep: int) -> None:
    """Keep `newest` and the ones before it; later ones are of a run that was gone back from, and stay."""
    complete = sorted(p for p in newest.parent.glob("step_*") if p.is_dir() and p.name <= newest.name)
    for old in complete[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    for left_over in newest.parent.glob(".writing_*"):
        shutil.rmtree(left_over, ignore_errors=True)


def _check_space(engine: Any, root: Path, ranks: Ranks) -> None:
    """Refuse before the first byte where the disk cannot hold the weights, their fp32 copy and two moments."""
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters()) * ranks.tp_size
    weight = next(engine.module.parameters()).element_size()
    need, free = parameters * (weight + 12), shutil.disk_usage(root).free
    if free < need:
        raise OSError(f"the disk has {free / 1e9:.2f} GB free and about {need / 1e9:.2f} GB are needed: free some, "
                      "lower checkpoint.keep_last or change checkpoint.dir")


@contextlib.contextmanager
def _failing_at_the_end(engine: Any) -> Iterator[None]:
    """Raise the first failure of DeepSpeed's writing after the block.

    Saving has barriers, at which the other ranks would wait for the one that raised.
    """
    failed: list[Exception] = []

    def postponing(write: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any, **kwargs: Any) -> None:
            try:
                write(*args, **kwargs)
            except Exception as error:
                failed.append(error)
        return call

    changed = {name: postponing(getattr(engine, name)) for name in ("_save_checkpoint", "_save_zero_checkpoint")}
    changed["_copy_recovery_script"] = lambda path: None          # scripts that do what launch/convert.py does
    with mock.patch.multiple(engine, **changed):
        yield
    if failed:
        raise failed[0]


@contextlib.contextmanager
def _all_ranks(problem: str, temporary: Path | None = None) -> Iterator[None]:
    """A block that every rank runs; where it fails on any, all raise the first such rank's reason as one UserError.

    So nobody waits for a rank that failed. The folder `temporary` is removed then.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    nobody = dist.get_world_size()
    first = torch.tensor([nobody if failure is None else dist.get_rank()], device=device)
    dist.all_reduce(first, op=dist.ReduceOp.MIN)
    if first.item() == nobody:
        return
    if temporary is not None:
        shutil.rmtree(temporary, ignore_errors=True)
    told = [str(failure) if isinstance(failure, UserError) else f"{problem}: {' '.join(str(failure).split())[:300]}"]
    dist.broadcast_object_list(told, src=int(first.item()), device=device)
    raise UserError(told[0]) from failure
