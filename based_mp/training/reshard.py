"""A training checkpoint rewritten so that it loads at any tensor- and data-parallel size (DeepSpeed universal)."""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch

from based_mp.errors import UserError
from based_mp.training import checkpoint as ckpt
from based_mp.training.quiet import import_deepspeed


def reshard(source: str | Path, output: str | Path, *, workers: int = 1) -> Path:
    """Write the checkpoint `source` (or the newest in that folder) into the folder `output`; returns where.

    The result is published like any checkpoint, so a run with checkpoint.dir=`output` goes on from it whatever its
    layout. workers: processes that extract and merge; each needs the memory of a few parameters. Raises UserError.
    """
    checkpoint, root = ckpt.resolve(source), Path(output)
    meta = ckpt.read_meta(checkpoint)
    check_convertible(meta, checkpoint)
    final, temporary = root / checkpoint.name, root / f".writing_{checkpoint.name}"
    ckpt.check_unused(root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        _convert(checkpoint, temporary, workers)
        (root / "latest_universal").unlink(missing_ok=True)
        shutil.copy(checkpoint / "config.yaml", temporary)
        if (checkpoint / ckpt.TOKENIZER).is_dir():
            shutil.copytree(checkpoint / ckpt.TOKENIZER, temporary / ckpt.TOKENIZER)
        ckpt.publish(temporary, final, {**meta, "universal": True})
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"cannot convert {checkpoint} to {final}: {' '.join(str(error).split())[:300]}; the source "
                        "is unchanged") from error
    return final


def check_convertible(meta: dict[str, Any], checkpoint: Path) -> None:
    """UserError for what DeepSpeed cannot take apart."""
    layout = meta["layout"]
    if meta["universal"]:
        raise UserError(f"{checkpoint} is universal already: start a run of any layout with checkpoint.dir="
                        f"{checkpoint.parent}")
    if meta.get("weights_only"):
        raise UserError(f"{checkpoint} holds imported weights alone, which load at any layout as they are: set "
                        f"checkpoint.dir={checkpoint.parent}")
    if layout["zero_stage"] == 0:
        raise UserError(f"{checkpoint} was saved with ZeRO 0, which has no shards to convert: go on from it with its "
                        "layout, or train with parallel.zero_stage=1")
    if layout["zero_stage"] == 3:
        raise UserError(f"{checkpoint} was saved with ZeRO 3, which cannot be resharded: go on from it with its "
                        "layout, or train with parallel.zero_stage 1 or 2")


def _convert(checkpoint: Path, target: Path, workers: int) -> None:
    import_deepspeed(torch.device("cpu"))
    from deepspeed.checkpoint import ds_to_universal
    target.mkdir()
    choices = argparse.Namespace(
        input_folder=str(checkpoint), output_folder=str(target), num_extract_workers=workers,
        num_merge_workers=workers, keep_temp_folder=False, strict=True, inject_missing_state=False)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        ds_to_universal.main(choices)
