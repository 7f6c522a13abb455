"""Maps a function over tasks in worker processes, results in order."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any

from data_prep.errors import UserError


def mapped(function: Callable[[Any], Any], tasks: Iterable[Any], workers: int, start: Callable[..., None],
           *arguments: Any) -> Iterator[Any]:
    """function(task) in the order of `tasks`, after start(*arguments) in every worker.

    One worker is this process. Tasks are taken from the iterable as workers need them, two a worker ahead.
    """
    if workers == 1:
        start(*arguments)
        yield from map(function, tasks)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start,
                             (start, arguments)) as pool:
        waiting: deque[tuple[Future, int]] = deque()
        try:
            for task in tasks:
                parcel = _pack(task)
                waiting.append((pool.submit(_call, function, os.getpid(), parcel), parcel))
                while waiting and (waiting[0][0].done() or len(waiting) > 2 * workers + 1):
                    yield _result(*waiting.popleft())
            while waiting:
                yield _result(*waiting.popleft())
        except BrokenProcessPool as error:
            raise UserError("a worker process died (killed, or out of memory): run the same command again, with fewer "
                            "--workers if memory was short") from error
        finally:
            pool.shutdown(cancel_futures=True)
            for _, parcel in waiting:
                os.close(parcel)


def _pack(task: Any) -> int:
    """The task in a file in memory, which goes when its processes go. Through the pool's pipe, 64 KiB at a time, a task
    of a megabyte would cost both sides many turns of waiting for each other."""
    parcel = os.memfd_create("task")
    with open(parcel, "wb", closefd=False) as file:
        pickle.dump(task, file, pickle.HIGHEST_PROTOCOL)
    return parcel


def _result(future: Future, parcel: int) -> Any:
    try:
        return future.result()
    finally:
        os.close(parcel)


_failure: UserError | None = None


def _start(start: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    global _failure
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        start(*arguments)
    except UserError as error:                                    # the pool would only say that it is broken
        _failure = error


def _call(function: Callable[[Any], Any], parent: int, parcel: int) -> Any:
    if _failure is not None:
        raise _failure
    with open(f"/proc/{parent}/fd/{parcel}", "rb") as file:
        return function(pickle.load(file))


def _die_with_parent() -> None:
    """A worker waits for tasks for ever, also those of a parent that was killed."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
