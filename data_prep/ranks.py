"""The processes of a run: this one alone, or those of `mpirun`."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable
from typing import Any

from data_prep.errors import UserError


class Alone:
    """The part of an MPI communicator that the programs use, for one process."""

    rank, size = 0, 1

    def bcast(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def allgather(self, value: Any) -> list[Any]:
        return [value]

    def scatter(self, values: list[Any] | None) -> Any:
        return values[0]                                          # type: ignore[index]

    def run(self, function: Callable[[], Any]) -> Any:
        return function()


class Mpi(Alone):
    """All processes that mpirun started. A failure of one ends them all, as the others would wait for it for ever."""

    def __init__(self) -> None:
        if importlib.util.find_spec("mpi4py") is None:
            raise UserError("--mpi needs mpi4py and an MPI library: pip install '.[mpi]'")
        from mpi4py import MPI
        self.world = MPI.COMM_WORLD
        self.rank, self.size = self.world.rank, self.world.size
        self.bcast, self.gather, self.scatter = self.world.bcast, self.world.gather, self.world.scatter
        self.allgather = self.world.allgather

    def run(self, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except BaseException as error:
            if isinstance(error, UserError):
                print(f"error: {error}", file=sys.stderr, flush=True)
            else:
                traceback.print_exc()
            self.world.Abort(2)
