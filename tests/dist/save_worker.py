"""Saves that fail on one rank for real, one after another in one run: save_worker.py CONFIG OUT.json

OUT.json gets, of each fault, what every rank was told, what `latest` names then and what else is in the folder.
A fault is a limit on the size of the files that one rank may write, or a small disk.
"""

import contextlib
import json
import resource
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch.distributed as dist

from based_mp.config import load_config
from based_mp.errors import UserError
from based_mp.parallel import state
from based_mp.training import checkpoint


@contextlib.contextmanager
def limited(rank: int, size: int, function: str | None = None) -> Iterator[None]:
    """`rank` can write no file above `size` bytes; with a function of `checkpoint`, from its start on."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit() -> None:
        if dist.get_rank() == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    try:
        if function is None:
            limit()
            yield
        else:
            original = getattr(checkpoint, function)
            with mock.patch.object(checkpoint, function, lambda *args: (limit(), original(*args))[1]):
                yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


FAULTS = {
    "small disk": mock.patch.object(checkpoint.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000)),
    "weights of rank 0": limited(0, 20_000), "any file of rank 1": limited(1, 20_000),
    "optimizer of rank 1": limited(1, 400_000), "any file of rank 0": limited(0, 0, "save"),
    "config": limited(0, 10, "write_config"), "meta": limited(0, 10, "write_meta"),
    "latest": limited(0, 0, "point_at")}

config, out = load_config(sys.argv[1]), Path(sys.argv[2])
ranks = state.initialize(config.parallel.tensor_parallel_size, device="cpu", seed=config.training.seed)
from based_mp.training import loop  # noqa: E402

trainer, root = loop.Trainer(config, ranks), Path(config.checkpoint.dir)
trainer.run(2)
found = {}
for name, fault in FAULTS.items():
    told = "saved"
    with fault:
        try:
            trainer.run(trainer.step + 1)
        except UserError as error:
            told = str(error)
    everybody = [None] * ranks.world_size
    dist.all_gather_object(everybody, told)
    found[name] = {"told": everybody, "latest": (root / "latest").read_text(),
                   "there": sorted(path.name for path in root.iterdir())}
    dist.barrier()
trainer.run(trainer.step + 1)
if ranks.rank == 0:
    out.write_text(json.dumps({"step": trainer.step, "latest": (root / "latest").read_text(), "faults": found}))
state.destroy()
