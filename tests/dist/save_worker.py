"""Saves that fail on one rank for real, one after another in one run: save_worker.py CONFIG OUT.json

OUT.json gets, of each fault, what every rank was told, what `latest` names then and what else is in the folder.
A fault is a limit on the size of the files that one rank may write, from some moment on.
"""

import contextlib
import json
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch.distributed as dist

from based_mp.config import load_config
from based_mp.errors import UserError
from based_mp.parallel import state
from based_mp.training import checkpoint

# name: the rank, the bytes that a file may have, and the function of `checkpoint` at whose start the limit falls
FAULTS = {"weights of rank 0": (0, 20_000, None), "any file of rank 1": (1, 20_000, None),
          "optimizer of rank 1": (1, 400_000, None), "no byte more on rank 0": (0, 0, "save"),
          "config": (0, 10, "write_config"), "meta": (0, 10, "write_meta"), "latest": (0, 0, "point_at")}


@contextlib.contextmanager
def limited(rank: int, size: int, function: str | None) -> Iterator[None]:
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


config, out = load_config(sys.argv[1]), Path(sys.argv[2])
ranks = state.initialize(config.parallel.tensor_parallel_size, device="cpu", seed=config.training.seed)
from based_mp.training import loop  # noqa: E402

trainer, root = loop.Trainer(config, ranks), Path(config.checkpoint.dir)
trainer.run(2)
found = {}
for name, fault in FAULTS.items():
    told = "saved"
    with limited(*fault):
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
